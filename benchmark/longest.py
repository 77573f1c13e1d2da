"""The longest row that trains two steps under a memory cap, for each activation policy; random NF4 weights.

    python benchmark/longest.py --shape tiny --memory_cap 64MiB --sets checkpointing balanced max_length
    python benchmark/longest.py --shape llama2-7b --memory_cap 32GiB --sets checkpointing balanced max_length \\
        --output_file output/longest-7b.json --plot output/longest-7b.png

The first length tried is the one that the memory model predicts; bisection closes in from there. Every trial is a
train_step.py in a process of its own: one step that makes the optimizer's state, one more. On a GPU the cap is the
allocator's and a trial fits if it ends; on a CPU the bytes of all weights and tensors are compared with it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from longqlora.cli import DTYPES, dtype_of, run_main
from longqlora.device import parse_size
from longqlora.outputs import check_results

SETS = ("checkpointing", "fast", "balanced", "max_length")
OUT_OF_MEMORY = "out of memory"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory_cap", required=True, help="memory to stay within, such as 32GiB")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="memory policies, or checkpointing "
                        "for the layers of transformers (default: all)")  # fmt: skip
    parser.add_argument("--shape", default="llama-4l", help="as for train_step.py (default: %(default)s)")
    parser.add_argument("--attention", choices=["s2", "full"], default="s2", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="default: what the device computes fast")
    parser.add_argument("--lora_rank", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--optim", choices=["adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"],
                        help="default: paged_adamw_32bit on a GPU, adamw_torch on a CPU")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--v100", action="store_true", help="fp16, and no attention kernel that a V100 lacks")
    parser.add_argument("--resolution", type=float, default=0.02, help="how near the limit to come, as a part of the "
                        "length (default: %(default)s)")  # fmt: skip
    parser.add_argument("--longest", type=int, default=2**20, help="no longer row is tried (default: %(default)s)")
    parser.add_argument("--output_file", type=Path, help="JSON file for the results")
    parser.add_argument("--plot", type=Path, help="PNG of the results")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> int:
    """Refuse what cannot be measured; returns the cap in bytes."""
    for name, least in (("longest", 2), ("lora_rank", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}: must be at least {least}, got {getattr(args, name)}")
    if not 0 < args.resolution < 1:
        raise ValueError(f"--resolution: must lie in (0, 1), got {args.resolution}")
    return parse_size(args.memory_cap, "--memory_cap")


def predicted_length(args: argparse.Namespace, name: str, cap: int) -> int:
    """Most tokens that fit `cap` bytes by the memory model; 0 where none do."""
    import torch
    from random_nf4_model import shape_config

    from longqlora.memory.estimate import ModelShape, RunShape, optimizer_bytes, predict
    from longqlora.memory.policy import CHECKPOINTED, POLICIES
    from longqlora.settings.config import AttentionConfig

    policy = CHECKPOINTED if name == "checkpointing" else POLICIES[name]
    shape = ModelShape.of(shape_config(args.shape))
    is_gpu = args.device == "cuda" or (args.device is None and torch.cuda.is_available())
    activation_bytes = dtype_of(args.dtype or ("bf16" if is_gpu else "fp32")).itemsize
    optim = args.optim or ("paged_adamw_32bit" if is_gpu else "adamw_torch")

    def fits(length: int) -> bool:
        attended = AttentionConfig().group_size(length) if args.attention == "s2" else length
        run = RunShape(
            length, activation_bytes=activation_bytes, lora_rank=args.lora_rank, attended=attended,
            optimizer_bytes=optimizer_bytes(optim), is_gpu=is_gpu,
        )  # fmt: skip
        return predict(shape, run, policy).peak <= cap

    low, high = 0, args.longest + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def trains(args: argparse.Namespace, name: str, length: int, cap: int) -> bool:
    """Whether two steps on a row of `length` tokens stay within `cap` bytes."""
    from longqlora.files import read_json

    words = ["--shape", args.shape, "--seq_len", str(length), "--steps", "1", "--attention", args.attention]
    words += ["--lora_rank", str(args.lora_rank), *(["--v100"] if args.v100 else [])]
    for key in ("dtype", "optim", "device"):
        words += [f"--{key}", getattr(args, key)] if getattr(args, key) else []
    words += [] if name == "checkpointing" else ["--memory", name]
    is_gpu = args.device != "cpu" and has_gpu()
    words += ["--memory_cap", args.memory_cap] if is_gpu else []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "step.json"
        command = [sys.executable, str(Path(__file__).with_name("train_step.py")), *words, "--output_file", str(output)]
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
        outcome = subprocess.run(command, capture_output=True, text=True, env=environment)
        if outcome.returncode == 0:
            result = read_json(output, "result")
            return is_gpu or result["weight_bytes"] + result["extra_bytes"] <= cap
    error = (outcome.stderr.strip().splitlines() or ["no message"])[-1]
    # A process that the system ends for want of memory leaves no message.
    if OUT_OF_MEMORY in error or outcome.returncode in (-9, 137):
        return False
    raise ValueError(f"{name} at {length} tokens: {error.removeprefix('error: ')}")


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def longest_length(args: argparse.Namespace, name: str, cap: int) -> int:
    """Longest row that trains, at least to args.resolution; 0 where none does."""
    # One token is no row to train on.
    low, high = 1, args.longest + 1
    guess = min(max(2, predicted_length(args, name, cap)), args.longest)
    step = max(1, guess // 20)
    # Outwards from the prediction until the limit lies between, then halves.
    while high - low > max(1, args.resolution * low):
        if trains(args, name, guess, cap):
            low = guess
            guess = min(guess + step, args.longest) if high > args.longest else (low + high) // 2
        else:
            high = guess
            guess = max(guess - step, 2) if low == 1 else (low + high) // 2
        step *= 2
        if low == args.longest:
            break
    return low if low > 1 else 0


def plot_lengths(results: dict[str, dict], cap: str, path: Path) -> None:
    from longqlora.plot import new_figure

    with new_figure(path) as (axes,):
        axes.barh(list(results), [row["length"] for row in results.values()])
        axes.invert_yaxis()
        axes.set_xlabel(f"longest row within {cap}, tokens")


def main() -> None:
    args = parse_args()
    cap = check_args(args)
    check_results(args, {"--shape": args.shape})
    from longqlora.files import write_json

    results = {}
    print(f"{'set':<16}{'predicted':>12}{'trains':>12}")
    for name in args.sets:
        results[name] = {
            "predicted": predicted_length(args, name, cap), "length": longest_length(args, name, cap)
        }  # fmt: skip
        print(f"{name:<16}{results[name]['predicted']:>12}{results[name]['length']:>12}", flush=True)
        if args.output_file:
            settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
            write_json(args.output_file, {"settings": settings, "results": results})
    if args.plot:
        plot_lengths(results, args.memory_cap, args.plot)


if __name__ == "__main__":
    run_main(main)
