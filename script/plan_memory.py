"""What a training run will take, policy by policy, and the longest text that fits, before anything is loaded.

    python script/plan_memory.py --train_args_file train_args/llama2-7b-pretrain.yaml --gpu_memory 32GiB
    python script/plan_memory.py --train_args_file F --seq 8192 32768 131072 --output_file plan.json [--key value ...]

Reads the YAML and the model's config.json alone: no weights, no data. `--key value` overrides a setting as in
train.py; gpu_memory is by default that of this machine's GPU, or 32GiB without one. Every line is the peak of GPU
memory in GiB at each length, the longest length that fits and the host memory that it needs, and the time of a step
against one that keeps everything; below it stand the settings that ask for the fastest set that fits each length.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from longqlora.cli import run_main


def parse_command_line() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--train_args_file", required=True, help="YAML with the settings of the run")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs of the run, for sequence_parallel_size and ZeRO "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--seq", type=int, nargs="+", help="lengths in tokens (default: max_seq_length, x2, x4, x8)")
    parser.add_argument("--output_file", type=Path, help="JSON file for the table (default: none)")
    args, overrides = parser.parse_known_args()
    if min(args.seq or [2]) < 2:
        raise ValueError(f"--seq: must be at least 2 tokens, got {min(args.seq)}")
    if args.num_gpus < 1:
        raise ValueError(f"--num_gpus: must be at least 1, got {args.num_gpus}")
    return args, overrides


def main() -> None:
    args, overrides = parse_command_line()
    os.environ["WORLD_SIZE"] = str(args.num_gpus)

    import torch

    from longqlora.files import write_json
    from longqlora.memory.plan import MemoryPlan
    from longqlora.model.base import load_config
    from longqlora.outputs import check_results
    from longqlora.settings.reader import resolve_settings

    settings, _ = resolve_settings(args.train_args_file, overrides, for_this_machine=False)
    model, data = settings.model, settings.data
    inputs = {"model_name_or_path": model.model_name_or_path, "--train_args_file": args.train_args_file}
    check_results(args, inputs | data.files)
    default = str(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else "32GiB"
    memory = replace(settings.memory, gpu_memory=settings.memory.gpu_memory or default)
    config = load_config(model.model_name_or_path, trust_remote_code=model.trust_remote_code)
    lengths = args.seq or [data.max_seq_length * factor for factor in (1, 2, 4, 8)]
    table = MemoryPlan.of(replace(settings, memory=memory), config).table(sorted(set(lengths)))
    print(f"{model.model_name_or_path}, {settings.adapter.finetuning_type}, {settings.attention.attention} attention; "
          f"predicted GiB of {table['capacity_gib']:.1f}")  # fmt: skip
    print(format_table(table))
    if args.output_file:
        write_json(args.output_file, table)


def format_table(table: dict) -> str:
    """At most 120 columns with four lengths: long settings are wrapped."""
    from tabulate import tabulate

    head = ["settings", *table["fastest"], "longest", "host GiB", "time"]
    formats = ["", *[".1f"] * len(table["fastest"]), "", ".1f", ".2f"]
    rows = [
        ["; ".join(row["settings"]), *row["peak_gib"].values(), row["longest"], row["host_gib"], row["relative_time"]]
        for row in table["sets"]
    ]
    lines = [tabulate(rows, head, floatfmt=formats, numalign="right", maxcolwidths=[48, *[None] * len(formats[1:])])]
    if table["reason"]:
        lines.append(f"the layer function is not available, since {table['reason']}")
    fastest = {length: "; ".join(asked or ["nothing fits"]) for length, asked in table["fastest"].items()}
    return "\n".join([*lines, *(f"{length} tokens: {asked}" for length, asked in fastest.items())])


if __name__ == "__main__":
    run_main(main)
