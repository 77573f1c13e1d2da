"""What a training run will take, policy by policy, and the longest text that fits, before anything is loaded.

    python script/plan_memory.py --train_args_file train_args/llama2-7b-pretrain.yaml --gpu_memory 32GiB
    python script/plan_memory.py --train_args_file F --seq 8192 32768 131072 --output_file plan.json [--key value ...]

Reads the YAML and the model's config.json alone: no weights, no data. `--key value` overrides a setting as in
train.py; gpu_memory is by default that of this machine's GPU, or 32GiB without one. Every line is the peak of GPU
memory in GiB at each length, the longest length that fits and the host memory that it needs, and the time of a step
against one that keeps everything; below it stand the settings that ask for the fastest set that fits each length. With
S2-Attn, also the time of its sparse and dense steps and what dense_finish costs (0.1 where it is 0), from their FLOPs
at --tflops.
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
    parser.add_argument("--tflops", type=float, default=100, help="TFLOP/s that a GPU reaches in training, for the "
                        "seconds of a step (default: %(default)g)")  # fmt: skip
    parser.add_argument("--output_file", type=Path, help="JSON file for the table (default: none)")
    args, overrides = parser.parse_known_args()
    if min(args.seq or [2]) < 2:
        raise ValueError(f"--seq: must be at least 2 tokens, got {min(args.seq)}")
    if args.num_gpus < 1:
        raise ValueError(f"--num_gpus: must be at least 1, got {args.num_gpus}")
    if not 0 < args.tflops < float("inf"):
        raise ValueError(f"--tflops: must be a positive number, got {args.tflops}")
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
    settings = replace(settings, memory=memory)
    lengths = sorted(set(lengths))
    table = MemoryPlan.of(settings, config).table(lengths)
    if settings.attention.attention == "s2":
        table["dense_finish"] = dense_finish_costs(settings, config, lengths, args.tflops)
    print(f"{model.model_name_or_path}, {settings.adapter.finetuning_type}, {settings.attention.attention} attention; "
          f"predicted GiB of {table['capacity_gib']:.1f}")  # fmt: skip
    print(format_table(table))
    if args.output_file:
        write_json(args.output_file, table)


def dense_finish_costs(settings, config, lengths: list[int], tflops: float) -> dict:
    """For each length seconds of a sparse and of a dense step, and how much longer all steps take, as a share.

    With the fastest policy that fits.
    """
    from longqlora.memory.plan import MemoryPlan

    part, costs = settings.attention.dense_finish or 0.1, {}
    kinds = [replace(settings, attention=replace(settings.attention, dense_finish=share)) for share in (0.0, 1.0)]
    plan, *plans = (MemoryPlan.of(kind, config) for kind in (settings, *kinds))
    for length in lengths:
        policy = replace(plan, run=plan.run.at_length(length)).fastest(plan.candidates)
        sparse, dense = (own.predict(policy, length).flops / (tflops * 1e12) for own in plans)
        costs[str(length)] = {"sparse_seconds": sparse, "dense_seconds": dense, "cost": part * (dense / sparse - 1)}
    return {"part": part, "tflops": tflops, "lengths": costs}


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
    lines += [f"{length} tokens: {asked}" for length, asked in fastest.items()]
    if finish := table.get("dense_finish"):
        lines += [
            f"{length} tokens at {finish['tflops']:g} TFLOP/s: S2 step {x['sparse_seconds']:.3g} s, dense step "
            f"{x['dense_seconds']:.3g} s; dense_finish: {finish['part']:g} costs {x['cost']:.1%} of the time"
            for length, x in finish["lengths"].items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
