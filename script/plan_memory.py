"""What a training run will take, mechanism by mechanism, and the longest text that fits, before anything is loaded.

    python script/plan_memory.py --train_args_file train_args/llama2-7b-pretrain.yaml --gpu_memory 32GiB
    python script/plan_memory.py --train_args_file F --seq 8192 32768 131072 --output_file plan.json [--key value ...]

Reads the YAML and the model's config.json alone: no weights, no data. `--key value` overrides a setting as in
train.py. Every line is the peak of GPU memory in GiB at each length, the longest length that fits and the host
memory that it needs, and the time of a step against one that keeps everything; below it stand the settings that
ask for the fastest set that fits each length.
"""

import argparse
import os
from pathlib import Path

from longqlora.cli import run_main

DEFAULT_MEMORY = "32GiB"


def parse_command_line() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--train_args_file", required=True, help="YAML with the settings of the run")
    parser.add_argument("--gpu_memory", help=f"memory of the GPU (default: of the GPU at hand, else {DEFAULT_MEMORY})")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs of the run, for sequence_parallel_size and ZeRO "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--seq", type=int, nargs="+", help="lengths in tokens (default: max_seq_length, x2, x4, x8)")
    parser.add_argument("--output_file", type=Path, help="JSON file for the table (default: none)")
    return parser.parse_known_args()


def main() -> None:
    args, overrides = parse_command_line()
    for length in args.seq or []:
        if length < 2:
            raise ValueError(f"--seq: must be at least 2 tokens, got {length}")

    if args.num_gpus < 1:
        raise ValueError(f"--num_gpus: must be at least 1, got {args.num_gpus}")
    os.environ["WORLD_SIZE"] = str(args.num_gpus)

    import torch

    from longqlora.device import GIB, parse_size
    from longqlora.files import write_json
    from longqlora.memory.plan_table import format_table, memory_table
    from longqlora.model.base import load_config
    from longqlora.outputs import check_outputs
    from longqlora.settings.deepspeed import complete_deepspeed
    from longqlora.settings.reader import read_settings

    settings, _ = read_settings(args.train_args_file, overrides, needs_data=False)
    data = settings.data
    named = {"model_name_or_path": settings.model.model_name_or_path, "train_file": data.train_file}
    named |= {"eval_file": data.eval_file, "--train_args_file": args.train_args_file}
    check_outputs({"--output_file": args.output_file}, named)
    complete_deepspeed(settings)
    size = args.gpu_memory or settings.memory.gpu_memory
    if size is None and torch.cuda.is_available():
        size = str(torch.cuda.get_device_properties(0).total_memory)
    settings.memory.gpu_memory = size or DEFAULT_MEMORY
    capacity = parse_size(settings.memory.gpu_memory, "--gpu_memory" if args.gpu_memory else "gpu_memory")
    config = load_config(settings.model.model_name_or_path, trust_remote_code=settings.model.trust_remote_code)
    lengths = args.seq or [settings.data.max_seq_length * factor for factor in (1, 2, 4, 8)]
    table = memory_table(settings, config, sorted(set(lengths)), capacity)
    print(f"{settings.model.model_name_or_path}, {settings.adapter.finetuning_type}, {settings.attention.attention} "
          f"attention; predicted GiB of {capacity / GIB:.1f}")  # fmt: skip
    print(format_table(table))
    if args.output_file:
        write_json(args.output_file, table)


if __name__ == "__main__":
    run_main(main)
