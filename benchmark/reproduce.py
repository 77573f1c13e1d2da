r"""Measure the suites of benchmark/suites again, cell by cell, and write a page with table and plots for each.

    python benchmark/reproduce.py --suite recipe --scale tiny --num_workers 2
    python benchmark/reproduce.py --suite all --scale tiny --books FOLDER       # with train.jsonl and validation.jsonl
    python benchmark/reproduce.py --suite recipe --scale paper --dry_run        # lists the cells and their commands
    python benchmark/reproduce.py --suite recipe --report_only                  # the page anew, from finished cells

Every cell is a run of train.py and of the evaluation scripts, and one JSON file in OUTPUT_DIR/cells; finished cells are
skipped, so the same command goes on after a kill. A cell that fails is reported with the end of its log
(OUTPUT_DIR/logs), the others go on, and the exit code is 2. benchmark/reproduction/suite.py says what a suite's YAML
may hold, benchmark/suites/scales.yaml what a scale is.
"""

import argparse
import os
import shlex
from pathlib import Path

from longqlora.cli import require_folder, run_main
from longqlora.outputs import OutputFolder, check_outputs

REPO = Path(__file__).resolve().parents[1]
SUITES = sorted(path.stem for path in (REPO / "benchmark" / "suites").glob("*.yaml") if path.stem != "scales")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=[*SUITES, "all"], required=True, help="what to measure")
    parser.add_argument("--scale", choices=("tiny", "small", "paper"), default="tiny", help="model, lengths and "
                        "hardware (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, help="folder for data, cells and logs (default: "
                        "output/reproduce/SCALE)")  # fmt: skip
    parser.add_argument("--report_dir", type=Path, default=REPO / "docs" / "results", help="folder for the pages "
                        "(default: docs/results)")  # fmt: skip
    parser.add_argument("--books", type=Path, help="folder with train.jsonl and validation.jsonl, a book in each row "
                        '{"text"}: the suites that read books read these (default: leave books out)')  # fmt: skip
    parser.add_argument("--num_workers", type=int, default=1, help="trainings at a time, each on one thread where "
                        "there are several (default: %(default)s)")  # fmt: skip
    parser.add_argument("--num_threads", type=int, help="threads of a single worker (default: torch's own choice)")
    parser.add_argument("--keep_adapters", action="store_true", help="keep what was trained (default: delete it when "
                        "its cells are measured)")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="one cell of each suite, two steps of data/tiny-llama")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry_run", action="store_true", help="list the cells and their commands, then stop")
    what.add_argument("--report_only", action="store_true", help="run nothing; write the pages from finished cells")
    args = parser.parse_args()
    if args.num_workers < 1 or (args.num_threads or 1) < 1:
        raise ValueError("--num_workers and --num_threads: must be at least 1")
    if args.books:
        require_folder(args.books, "--books")
    if args.output_dir:
        # The runner's first file is a log.
        check_outputs({"--output_dir": OutputFolder(args.output_dir, "logs")}, {"--books": args.books})
    args.scale = "smoke" if args.smoke else args.scale
    args.output_dir = (args.output_dir or REPO / "output" / "reproduce" / args.scale).resolve()
    return args


def main() -> None:
    args = parse_args()
    # Read when the libraries are imported: logs without a thousand states of a bar, a look at GPUs that claims none.
    quiet = {"TQDM_MININTERVAL": "10", "TRANSFORMERS_VERBOSITY": "error", "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
             "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    for name, value in quiet.items():
        os.environ.setdefault(name, value)

    import torch
    from machine import describe_machine
    from reproduction.report import write_report
    from reproduction.runner import is_finished, prepare, run_cells
    from reproduction.suite import Scale, Suite

    scale = Scale.read(args.scale, args.output_dir, {"books": str(args.books.resolve()) if args.books else None})
    suites = [Suite.read(name, scale.values) for name in (SUITES if "all" in args.suite else args.suite)]
    if not args.dry_run and not args.report_only:
        for dataset in scale.datasets:
            prepare(scale, dataset, args.num_threads)
    cells = {suite.name: suite.cells(scale, is_smoke=args.smoke) for suite in suites}
    if args.dry_run:
        return list_cells(scale, cells, is_finished)

    failed = []
    if not args.report_only:
        machine = describe_machine(torch.device("cpu"))
        threads = {"num_threads": 1 if args.num_workers > 1 else args.num_threads or torch.get_num_threads()}
        facts = {"machine": {**machine, **threads, "num_workers": args.num_workers}}
        options = {"num_workers": args.num_workers, "num_threads": args.num_threads}
        every = [cell for own in cells.values() for cell in own]
        failed = run_cells(every, facts, **options, keep_adapters=args.keep_adapters)
    books = " --books FOLDER" if args.books else ""
    for suite in suites:
        # The same whether the page is made with the cells or later, and without paths of this machine.
        command = f"python benchmark/reproduce.py --suite {suite.name} --scale {args.scale}{books}"
        print(f"wrote {write_report(suite, scale, cells[suite.name], args.report_dir, command)}")
    if failed:
        names = "; ".join(f"{cell.name} ({log})" for cell, log in failed)
        raise ValueError(f"{len(failed)} cells failed: {names}; start again to try these only")


def list_cells(scale, cells: dict, is_finished) -> None:
    """Print what a run would do; commands of cells that are not finished."""
    for dataset in scale.datasets:
        print(f"# data set {dataset.name}; its trainings share {dataset.train_args_file}:")
        print(*(f"#   {key}: {value}" for key, value in scale.train_settings(dataset).items()), sep="\n")
        print(*(f"python {shlex.join(words)}" for words in dataset.missing.values()), sep="\n")
    seen = set()
    for name, own in cells.items():
        print(f"\n## {name}: {len(own)} cells")
        for cell in own:
            state = "as above" if cell.key in seen else "finished" if is_finished(cell) else None
            seen.add(cell.key)
            print(f"# {cell.name}{f': {state}' if state else ''}")
            if not state:
                print(*(f"python {shlex.join(words)}" for words in cell.commands()), sep="\n")
    print(f"\n{len(seen)} cells in all")


if __name__ == "__main__":
    run_main(main)
