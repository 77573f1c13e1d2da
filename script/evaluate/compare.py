r"""Compare context methods on one base model: methods x lengths, one YAML, one table, one plot.

    python script/evaluate/compare.py --compare_args_file script/evaluate/compare.yaml \
        --output_file comparison.json --plot comparison.png
    torchrun --nproc_per_node 2 script/evaluate/compare.py ...        # the same numbers from two processes

The YAML names the base model, the lengths and, for each method, how RoPE is scaled (rope_type), which
attention reads (attention: dca) or which adapter was trained (peft_model); script/evaluate/compare.yaml
explains every key. measure: perplexity (default) or passkey. --base_model, --data_path and --max_windows
override the YAML. With --output_file a killed run goes on where it stopped.
"""

import argparse
from pathlib import Path

from longqlora.cli import require_file, run_main
from longqlora.files import write_json
from longqlora.outputs import check_results
from longqlora.plot import plot_perplexity

OVERRIDES = ("base_model", "data_path", "max_windows")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare_args_file", required=True, help="YAML with the settings of the comparison")
    parser.add_argument("--base_model", help="in place of the YAML's base_model (default: the YAML's)")
    parser.add_argument("--data_path", help="in place of the YAML's data_path (default: the YAML's)")
    parser.add_argument("--max_windows", help="in place of the YAML's max_windows (default: the YAML's)")
    parser.add_argument("--output_file", type=Path, help="JSON file for the results; also makes the run resumable")
    parser.add_argument("--plot", help="image (.png, .pdf or .svg): perplexity by length, or passkey heat maps")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_file(args.compare_args_file, "--compare_args_file")

    from longqlora.data.token_file import open_token_file, sidecar_path
    from longqlora.evaluation.comparison import passkey_trials, plans_of, read_comparison

    overrides = {key: getattr(args, key) for key in OVERRIDES if getattr(args, key) is not None}
    settings = read_comparison(args.compare_args_file, overrides)
    tokens = [settings.data_path, sidecar_path(settings.data_path)] if settings.data_path else None
    adapters = [method.peft_model for method in settings.methods.values()]
    sources = {"base_model": settings.base_model, "peft_model": adapters, "data_path": tokens}
    check_results(args, {"--compare_args_file": args.compare_args_file, **sources})
    data = open_token_file(settings.data_path) if settings.measure == "perplexity" else None
    plans_of(settings, data.num_tokens) if data else passkey_trials(settings)
    run(args, settings, data)


def run(args: argparse.Namespace, settings, data) -> None:
    """Measure every cell, print the table and write the results; `data` is None for passkey."""
    import torch

    from longqlora.distributed import init_process_group, is_main_process, print_main
    from longqlora.evaluation.comparison import table
    from longqlora.evaluation.method_models import MethodModels, compare_passkey, compare_perplexity, describe_models
    from longqlora.evaluation.trials import finish_trials

    described = describe_models(settings)
    if data:
        data.check_ids(next(iter(next(iter(described.values())).values()))["vocab_size"])
    init_process_group()
    models = MethodModels(settings)
    if data:
        cells = compare_perplexity(settings, data, models, args.output_file)
        rows = {name: {length: cell["perplexity"] for length, cell in of.items()} for name, of in cells.items()}
        print_main(
            f"perplexity, {settings.protocol} protocol, stride {settings.sliding_window}, dtype {settings.dtype}"
        )
    else:
        cells = compare_passkey(settings, models, args.output_file)
        rows = {name: mean_accuracy(of) for name, of in cells.items()}
        print_main(f"passkey accuracy in percent, {settings.num_trials} keys at each of {settings.num_depths} depths")
    print_main(table(rows, sorted(set(settings.lengths)), 2 if data else 1))
    if is_main_process():
        write_results(args, settings, described, cells, rows)
    finish_trials(args.output_file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def write_results(args: argparse.Namespace, settings, described: dict, cells: dict, rows: dict) -> None:
    import torch

    from longqlora.evaluation.perplexity import json_safe
    from longqlora.evaluation.retrieval.heatmap import plot_heatmap
    from longqlora.run_record import software_versions

    if args.output_file:
        values = {**vars(settings), "methods": {name: vars(method) for name, method in settings.methods.items()}}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        result = {"settings": values, "device": device, "versions": software_versions(), "models": described}
        write_json(args.output_file, json_safe({**result, "results": cells}))
        print(f"wrote {args.output_file}")
    if args.plot:
        if settings.measure == "perplexity":
            plot_perplexity({name: sorted(of.items()) for name, of in rows.items()}, args.plot)
        else:
            plot_heatmap(cells, args.plot, label="passkey accuracy")
        print(f"wrote {args.plot}")


def mean_accuracy(cells) -> dict[int, float]:
    """Accuracy in percent at each length, over all depths."""
    lengths = {cell["length"] for cell in cells}
    groups = {length: [cell["accuracy"] for cell in cells if cell["length"] == length] for length in lengths}
    return {length: 100 * sum(values) / len(values) for length, values in groups.items()}


if __name__ == "__main__":
    run_main(main)
