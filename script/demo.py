"""The main job on a small model, start to end, with the scripts a user would run: `make demo`.

    python script/demo.py [--train_args_file train_args/tiny-llama-yarn.yaml] [--output_dir output/demo]

Stretches data/tiny-llama from 256 to 1024 tokens with `deepspeed train.py`, on Python source of this machine's standard
library. Meanwhile measures the base and every method without training on unseen source, then the adapter and two merged
models, and generates once. Ends with a table, two plots and report.json; fails if a claim fails.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryFile

from tabulate import tabulate

from longqlora.cli import run_main
from longqlora.distributed import free_port
from longqlora.files import read_json, write_json
from longqlora.outputs import OutputFolder, check_outputs
from longqlora.plot import draw_loss_by_position, draw_perplexity, new_figure

REPO = Path(__file__).resolve().parents[1]
BASE = REPO / "data" / "tiny-llama"
COMPARISON = REPO / "script" / "evaluate" / "compare-demo.yaml"
LENGTHS = ORIGINAL, _, LONGEST = 256, 512, 1024
# The beginning of every file, so that a short run sees many: 9 MB to tokenise in place of 30.
MAX_CHARS = 10_000
# 64 windows that advance by half their length: their first and second half read the same text, so that the loss by
# position compares like with like. Long documents, all cut alike: no file outweighs the others.
STRIDE, MIN_TOKENS, TOTAL_TOKENS, BATCH_SIZE = 512, 8192, 33_800, 4
PROMPT = "def read_lines(path):\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_args_file", type=Path, default=REPO / "train_args" / "tiny-llama-yarn.yaml",
                        help="YAML of the training run (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, default=REPO / "output" / "demo",
                        help="folder for all that it writes (default: %(default)s)")  # fmt: skip
    return parser.parse_args()


class Steps:
    """Runs the commands of the demo, showing each and the seconds it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.running: set[subprocess.Popen] = set()
        self.num_lanes = 1

    def run(self, name: str, *command: object, has_bar: bool = True) -> str:
        """What the command printed, which is shown as it comes; has_bar: stderr too, else only where it fails."""
        words = [str(word) for word in command]
        print(f"\n== {name}\n$ {' '.join(words)}", flush=True)
        started = time.monotonic()
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.num_lanes))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1"}
        environment["TRANSFORMERS_VERBOSITY"] = "error"
        with TemporaryFile("w+") as held_back:
            options = {"env": environment, "cwd": REPO, "text": True, "stderr": None if has_bar else held_back}
            process = subprocess.Popen(words, stdout=subprocess.PIPE, **options)
            self.running.add(process)
            lines = []
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
            self.running.remove(process)
            if process.wait() != 0:
                held_back.seek(0)
                print(held_back.read(), end="", file=sys.stderr)
                raise ValueError(f"the step {name!r} failed with exit code {process.returncode}; its output is above")
        self.seconds[name] = round(time.monotonic() - started, 1)
        return "".join(lines)

    def script(self, name: str, script: str, *arguments: object, **options: bool) -> str:
        return self.run(name, sys.executable, REPO / "script" / script, *arguments, **options)

    def side_by_side(self, *lanes: Callable[[], object]) -> list:
        """Run sequences of commands at once, each on its share of the cores; the first that fails ends all."""
        self.num_lanes = len(lanes)
        with ThreadPoolExecutor(len(lanes)) as pool:
            futures = [pool.submit(lane) for lane in lanes]
            for future in as_completed(futures):
                if error := future.exception():
                    for process in list(self.running):
                        process.terminate()
                    raise error
        self.num_lanes = 1
        return [future.result() for future in futures]


def mean_loss(result: dict, start: int, end: int) -> float:
    """Mean loss over the positions from `start` to before `end`."""
    blocks = [block for block in result["loss_by_position"] if start <= block["start"] < end]
    return sum(block["loss"] * block["num_tokens"] for block in blocks) / sum(block["num_tokens"] for block in blocks)


def check(report: dict) -> list[str]:
    """The claims of the demo; returns those that do not hold."""
    perplexity, quarters, beyond = report["perplexity"], report["loss_by_quarter"], report["loss_beyond_256"]
    adapter, base, first = perplexity["adapter"], perplexity["base"], quarters["adapter"]
    untrained = {name: row for name, row in perplexity.items() if name.startswith("base")}
    claims = {
        f"adapter at {length}: perplexity below that of the base and of every method without training":
            all(adapter[str(length)] < row[str(length)] for row in untrained.values())
        for length in LENGTHS[1:]
    } | {
        "adapter at 256: perplexity at most 3% above the base's": adapter["256"] <= 1.03 * base["256"],
        "adapter: loss falls with position, each quarter below the one of the same text two quarters earlier":
            first[2] < first[0] and first[3] < first[1],
        "adapter past position 256: at least 0.5 nat below the base": beyond["adapter"] <= beyond["base"] - 0.5,
        "merged into NF4 weights: loss equals the adapter's to 1e-3": report["merge_difference_nf4"] <= 1e-3,
    }  # fmt: skip
    print("\n".join(f"{'ok    ' if holds else 'FAILED'} {claim}" for claim, holds in claims.items()))
    return [claim for claim, holds in claims.items() if not holds]


def main() -> None:
    args = parse_args()
    started, steps, out = time.monotonic(), Steps(), args.output_dir.resolve()
    corpus, ids, adapter = out / "corpus", out / "validation.bin", out / "adapter"
    final, merged, merged_nf4, untrained = adapter / "final", out / "merged", out / "merged-nf4", out / "untrained.json"
    check_outputs(
        {"--output_dir": OutputFolder(args.output_dir, corpus.name)},
        {"--train_args_file": args.train_args_file, "the base": BASE},
    )
    results = {}

    def evaluate(name: str, *arguments: object, has_bar: bool = True) -> None:
        """Every model is measured on the windows that the comparison takes too."""
        output = out / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        steps.script(
            f"evaluate {name}", "evaluate/evaluate.py", *arguments, "--data_path", ids, "--seq_len", *LENGTHS,
            "--sliding_window", STRIDE, "--batch_size", BATCH_SIZE, "--dtype", "fp32", "--output_file", output,
            has_bar=has_bar,
        )  # fmt: skip
        results[name] = {result["seq_len"]: result for result in read_json(output)["results"]}

    def compare() -> None:
        steps.script(
            "evaluate without training", "evaluate/compare.py", "--compare_args_file", COMPARISON, "--data_path", ids,
            "--output_file", untrained, has_bar=False,
        )  # fmt: skip
        for name, cells in read_json(untrained)["results"].items():
            results[name] = {int(length): cell for length, cell in cells.items()}

    def train() -> None:
        steps.run(
            "train", Path(sys.executable).parent / "deepspeed", "--num_gpus", 1, "--master_port", free_port(),
            REPO / "train.py", "--train_args_file", args.train_args_file, "--train_file", corpus / "train.jsonl",
            "--output_dir", adapter, "--overwrite_output_dir", "true",
        )  # fmt: skip

    nf4 = ("--load_in_4bit",)
    merge = ("merge_lora.py", "--adapter_name_or_path", final, "--model_name_or_path", BASE, "--overwrite")

    def measure_in_4bit() -> None:
        evaluate("adapter", "--base_model", BASE, "--peft_model", final, *nf4)
        # fp32, since rounding the merged weights to 16 bit alone moves this model's loss by a thousandth.
        steps.script("merge into NF4 weights", *merge, "--save_path", merged_nf4, "--dtype", "fp32", *nf4)
        evaluate("merged, NF4 weights", "--base_model", merged_nf4)

    def measure_in_16bit() -> str:
        steps.script("merge into 16-bit weights", *merge, "--save_path", merged, has_bar=False)
        evaluate("merged, 16-bit weights", "--base_model", merged, has_bar=False)
        return steps.script(
            "generate", "inference/inference.py", "--model_name_or_path", merged, "--prompt", PROMPT,
            "--max_new_tokens", 48, "--temperature", 0, has_bar=False,
        )  # fmt: skip

    steps.script("corpus", "data/python_corpus.py", "--output_dir", corpus, "--max_chars", MAX_CHARS)
    steps.script(
        "tokenise", "data/tokenize_corpus.py", "--input", corpus / "validation.jsonl", "--tokenizer", BASE,
        "--output_file", ids, "--min_tokens", MIN_TOKENS, "--total_tokens", TOTAL_TOKENS,
    )  # fmt: skip
    steps.side_by_side(train, compare)
    _, text = steps.side_by_side(measure_in_4bit, measure_in_16bit)

    def difference(name: str) -> float:
        """Largest one in loss between a model and the adapter, over the window lengths."""
        return max(abs(results[name][length]["loss"] - results["adapter"][length]["loss"]) for length in LENGTHS)

    order = sorted(results, key=lambda name: (not name.startswith("base"), name.startswith("merged")))
    longest = {name: results[name][LONGEST] for name in order}
    report = {
        "perplexity": {
            name: {str(length): results[name][length]["perplexity"] for length in LENGTHS} for name in order
        },
        "loss_beyond_256": {name: mean_loss(result, ORIGINAL, LONGEST) for name, result in longest.items()},
        "loss_by_quarter": {
            name: [mean_loss(result, start, start + LONGEST // 4) for start in range(0, LONGEST, LONGEST // 4)]
            for name, result in longest.items()
        },
        "merge_difference_nf4": difference("merged, NF4 weights"),
        "merge_difference_16bit": difference("merged, 16-bit weights"),
        "protocol": {name: result["protocol"] for name, result in longest.items()},
        "generated": text,
        "training": {key: v for key, v in read_json(adapter / "train_results.json").items() if key != "log_history"},
        "run_record": read_json(final / "run_record.json"),
        "seconds": steps.seconds,
        "total_seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / "report.json", report)
    perplexity = report["perplexity"].items()
    drawn = [name for name in order if not name.startswith("merged")]
    style = {"original_length": ORIGINAL, "thin": drawn[1:-1]}
    with new_figure(out / "perplexity.png") as (axis,):
        points = {name: list(zip(LENGTHS, row.values(), strict=True)) for name, row in perplexity if name in drawn}
        draw_perplexity(axis, points, **style)
    with new_figure(out / "position.png") as (axis,):
        draw_loss_by_position(axis, {name: longest[name]["loss_by_position"] for name in drawn}, **style)

    rows = [[name, *row.values(), report["loss_beyond_256"][name]] for name, row in perplexity]
    formats = ("", *[".2f"] * len(LENGTHS), ".3f")
    table = tabulate(rows, ["perplexity", *LENGTHS, "loss past 256"], tablefmt="plain", floatfmt=formats)
    print(f"\n{table}\n\n{longest['adapter']['protocol']}\n")
    print(f"merging changed the loss by {report['merge_difference_nf4']:.1e} (NF4 weights) and "
               f"{report['merge_difference_16bit']:.1e} (16-bit weights: the adapter never saw these)")  # fmt: skip
    print(f"seconds: {json.dumps(steps.seconds)}, {report['total_seconds']} in all")
    print(f"wrote {out / 'report.json'}, perplexity.png and position.png")
    if failed := check(report):
        raise ValueError(f"the demo did not reach: {'; '.join(failed)}")


if __name__ == "__main__":
    run_main(main)
