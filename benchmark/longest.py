"""The longest row that trains two steps under a memory cap, for each set of mechanisms; random weights.

    python benchmark/longest.py --shape tiny --memory_cap 64MiB --sets checkpointing balanced max_length
    python benchmark/longest.py --shape llama2-7b --memory_cap 32GiB --output_file longest.json --plot longest.png \\
        --sets checkpointing balanced max_length,keep_activations=input

A set is a policy (fast, balanced, max_length), checkpointing or stock (layers as in transformers), followed by
mechanisms of its own, as in train.py. Each trial is two steps of a new model in a process of its own. The first
length is the one that the memory model predicts, the next ones close in on the limit. On a GPU the cap is that of
torch's allocator; on a CPU the bytes of all tensors are compared with it. Trials that --output_file already holds
are not taken again, so that a search may go on in a second call (--max_minutes).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.train_step import DTYPE_NAMES, choose_device, limit_memory, use_v100_kernels  # noqa: E402
from component.cli import run_main  # noqa: E402
from component.device_memory import GIB, is_out_of_memory, parse_size  # noqa: E402

STOCK_SETS = ("stock", "checkpointing")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory_cap", required=True, help="memory to stay within, such as 32GiB")
    parser.add_argument("--sets", nargs="+", default=["checkpointing", "fast", "balanced", "max_length"],
                        help="sets of mechanisms, such as balanced or max_length,num_head_chunks=8 (default: "
                        "checkpointing fast balanced max_length)")  # fmt: skip
    parser.add_argument("--shape", default="llama-4l", help="llama2-7b, llama2-13b, llama2-70b, llama-4l, tiny, or the "
                        "path of a config.json (default: %(default)s)")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=1, help="rows of a step (default: %(default)s)")
    parser.add_argument("--attention", choices=["s2", "full"], default="s2", help="default: %(default)s")
    parser.add_argument("--group_size_ratio", type=float, default=0.25, help="S2-Attn group size as a part of the "
                        "length (default: %(default)s)")  # fmt: skip
    parser.add_argument("--dtype", choices=list(DTYPE_NAMES), help="precision of the products (default: what the "
                        "device computes fast; fp16 with --v100)")  # fmt: skip
    parser.add_argument("--lora_rank", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--optim", choices=["adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"],
                        help="default: paged_adamw_32bit on a GPU, adamw_torch on a CPU")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--v100", action="store_true", help="fp16, and no attention kernel that a V100 lacks")
    parser.add_argument("--multiple_of", type=int, default=256, help="lengths tried are multiples of it (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--resolution", type=float, default=0.02, help="how near the limit to come, as a part of the "
                        "length (default: %(default)s)")  # fmt: skip
    parser.add_argument("--most", type=int, default=2**20, help="longest length tried (default: %(default)s)")
    parser.add_argument("--max_minutes", type=float, help="no trial begins that would end later (default: no limit)")
    parser.add_argument("--output_file", type=Path, help="JSON file for the results")
    parser.add_argument("--plot", type=Path, help="PNG of the results")
    parser.add_argument("--trial_length", type=int, help="take one trial of this length, of the first set, and end")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> int:
    """Refuse what cannot be measured, before torch is imported; returns the cap in bytes."""
    for name, least in (("batch_size", 1), ("lora_rank", 1), ("multiple_of", 2), ("most", 2), ("trial_length", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name}: must be at least {least}, got {value}")
    if not 0 < args.resolution < 1:
        raise ValueError(f"--resolution: must lie between 0 and 1, got {args.resolution}")
    if not 0 < args.group_size_ratio <= 1:
        raise ValueError(f"--group_size_ratio: must lie in (0, 1], got {args.group_size_ratio}")
    if args.max_minutes is not None and not args.max_minutes > 0:
        raise ValueError(f"--max_minutes: must be above 0, got {args.max_minutes}")
    if args.v100 and args.dtype not in (None, "fp16"):
        raise ValueError(f"--v100 computes in fp16; leave out --dtype {args.dtype}")
    return parse_size(args.memory_cap, "--memory_cap")


def memory_of(name: str):
    """Settings of a set such as "max_length,num_head_chunks=8", and whether it checkpoints."""
    from component.memory import POLICIES, MemoryConfig

    policy, *own = name.split(",")
    if policy not in (*STOCK_SETS, *POLICIES):
        raise ValueError(f"--sets: {policy!r} is not one of {', '.join((*STOCK_SETS, *POLICIES))}")
    settings: dict = {}
    for word in own:
        key, _, text = word.partition("=")
        kinds = {"keep_activations": str, "tile_size": int, "num_head_chunks": int, "offload_activations": bool}
        if policy in STOCK_SETS or key not in kinds:
            raise ValueError(f"--sets: {name!r}: {policy} takes no {word!r}; write such as balanced,tile_size=512")
        if kinds[key] is not str and not (text.isdecimal() if kinds[key] is int else text in ("true", "false")):
            raise ValueError(f"--sets: {name!r}: {key} is no {'number' if kinds[key] is int else 'true or false'}")
        settings[key] = text == "true" if kinds[key] is bool else kinds[key](text)
    return MemoryConfig(memory=None if policy in STOCK_SETS else policy, **settings), policy == "checkpointing"


def step_args(args: argparse.Namespace, name: str, length: int) -> argparse.Namespace:
    """What training_step.py asks of a step, for one set and length."""
    memory, checkpoints = memory_of(name)
    given = {**vars(args), **vars(memory), "gradient_checkpointing": checkpoints, "seq_len": length}
    return argparse.Namespace(**given, contestant="ours", train_embedding=False, train_norm=False)


def take_trial(args: argparse.Namespace, cap: int) -> dict:
    """Two steps at args.trial_length: whether they fit, the peak in bytes, the seconds of the second step."""
    import torch

    from benchmark.live_memory import PeakMemory
    from benchmark.training_step import build, held_bytes, make_step

    device = choose_device(args)
    if args.v100:
        use_v100_kernels()
    # On a CPU tensors are counted; the limit keeps a hopeless trial from taking the machine with it.
    limit_memory(cap if device.type == "cuda" else 2 * cap + 4 * GIB, device)
    torch.manual_seed(0)
    dtype = getattr(torch, DTYPE_NAMES[args.dtype])
    told = step_args(args, args.sets[0], args.trial_length)
    try:
        model, optimizer = build(told, dtype, device)
        weights, step = held_bytes(model), make_step(told, model, optimizer, dtype, device)
        # The second step has the optimizer's state beside it, the first has not.
        with PeakMemory(device) as memory:
            step()
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"fits": False, "error": "out of memory"}
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else weights + memory.peak_bytes
    return {"fits": peak <= cap, "peak_bytes": peak, "step_seconds": seconds}


def run_trial(args: argparse.Namespace, name: str, length: int) -> dict:
    """`take_trial` in a process of its own."""
    given = {key: value for key, value in vars(args).items() if value is not None and key not in (
        "sets", "output_file", "plot", "max_minutes", "trial_length", "v100")}  # fmt: skip
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "trial.json"
        command = [sys.executable, __file__, *words, *(["--v100"] if args.v100 else []), "--sets", name]
        command += ["--trial_length", str(length), "--output_file", str(output)]
        start = time.perf_counter()
        outcome = subprocess.run(command, capture_output=True, text=True)
        if outcome.returncode == 0:
            from component.files import read_json

            trial = read_json(output, "trial")
        elif outcome.returncode == -9:
            trial = {"fits": False, "error": "killed by the system"}
        else:
            last = (outcome.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"the trial of {name} at {length} tokens failed: {last.removeprefix('error: ')}")
    return {"length": length, **trial, "wall_seconds": time.perf_counter() - start}


def main() -> None:
    args = parse_args()
    cap = check_args(args)

    from component.files import write_json

    for name in args.sets:
        memory_of(name)
    if args.trial_length is not None:
        return write_json(args.output_file, take_trial(args, cap)) if args.output_file else print(take_trial(args, cap))
    if args.plot:
        from component.plot import require_matplotlib

        require_matplotlib(args.plot)
    from benchmark.longest_report import format_longest, known_trials, plot_longest

    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    known = known_trials(args.output_file, settings)
    from benchmark.longest_report import predicted_longest
    from benchmark.length_search import longest_fitting


if __name__ == "__main__":
    run_main(main)
