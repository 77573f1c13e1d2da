"""Time and memory of one QLoRA training step of any Llama shape, with random weights and no checkpoint.

    python benchmark/train_step.py --shape tiny --seq_len 512
    python benchmark/train_step.py --shape llama2-7b --seq_len 8192 --memory_cap 32GiB --v100 --output_file step.json

    python benchmark/train_step.py --shape llama-4l --seq_len 8192 --memory all --peers transformers trl --plot step.png

Forward, backward and optimizer step as train.py composes them: NF4 base with double quantisation, LoRA
on all linear layers, S2-Attn, a memory policy or gradient checkpointing, loss in chunks. One step warms up,
--steps are timed. With --peers, or several policies, all take the same step in the same run, each in a process of its
own: ours with each policy, S2-Attn and full attention, against "transformers" (plain transformers + PEFT) and, where
they are installed, "trl" (SFTTrainer), "liger" (its kernels) and "unsloth", which have full attention.
--v100 makes a newer GPU take
the way of a V100: fp16, memory-efficient SDPA only. Memory is what torch allocated and reserved on a GPU; on a CPU,
the bytes of all tensors and the process's peak.
"""

import argparse
import importlib.util
from pathlib import Path

from longqlora.cli import DTYPES, dtype_of, run_main
from longqlora.device import is_out_of_memory, parse_size
from longqlora.outputs import check_results
from longqlora.settings.config import MEMORY_POLICIES

# Peers, the package that each needs, and whether it runs on a GPU only.
PEERS = {
    "transformers": ("transformers", False), "trl": ("trl", False), "liger": ("liger_kernel", True),
    "unsloth": ("unsloth", True),
}  # fmt: skip
# memory/policy.py has them; it needs torch, and --help does not.
POLICIES = MEMORY_POLICIES[1:]
MIB = 2**20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    boolean = argparse.BooleanOptionalAction
    parser.add_argument("--shape", default="tiny", help="llama2-7b, llama2-13b, tiny, or the path of a config.json "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--seq_len", type=int, default=8192, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="rows of a step (default: %(default)s)")
    parser.add_argument("--attention", choices=["s2", "full"], default="s2", help="default: %(default)s")
    parser.add_argument("--group_size_ratio", type=float, default=0.25, help="S2-Attn group size as a part of seq_len "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the products (default: what the "
                        "device computes fast; fp16 with --v100)")  # fmt: skip
    parser.add_argument("--lora_rank", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--train_embedding", action=boolean, default=False, help="train the embeddings (default: no)")
    parser.add_argument("--train_norm", action=boolean, default=False, help="train the norms (default: no)")
    parser.add_argument("--memory", nargs="+", choices=[*POLICIES, "all"], help="memory policies, all to be compared "
                        "(default: none, --gradient_checkpointing decides)")  # fmt: skip
    parser.add_argument("--layer_function", action=boolean, help="as in train.py (default: by the policy)")
    parser.add_argument("--keep_activations", choices=["input", "attention", "projections", "all"],
                        help="as in train.py (default: by the policy)")  # fmt: skip
    parser.add_argument("--tile_size", type=int, help="as in train.py (default: by the policy)")
    parser.add_argument("--num_head_chunks", type=int, help="as in train.py (default: by the policy)")
    parser.add_argument("--offload_activations", action=boolean, help="as in train.py (default: by the policy)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="whom to compare with (default: nobody)")
    parser.add_argument("--contestant", choices=["ours", *PEERS], default="ours", help="whose step is measured "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--optim", choices=["adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"],
                        help="default: paged_adamw_32bit on a GPU, adamw_torch on a CPU")  # fmt: skip
    parser.add_argument("--gradient_checkpointing", action=boolean, default=True, help="default: yes")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default: %(default)s)")
    parser.add_argument("--profile", action=boolean, default=False, help="also list the operations of a step by "
                        "their time (default: no)")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--memory_cap", help="most memory to use, such as 32GiB; beyond it the run ends with exit "
                        "code 2 (default: none)")  # fmt: skip
    parser.add_argument("--v100", action=boolean, default=False, help="fp16, and no attention kernel that a V100 "
                        "lacks (default: no)")  # fmt: skip
    parser.add_argument("--output_file", type=Path, help="JSON file for the result")
    parser.add_argument("--plot", type=Path, help="PNG of the comparison with --peers")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> int | None:
    """Refuse what cannot be measured, before torch is imported; returns the memory cap in bytes."""
    for name, least in (("seq_len", 2), ("batch_size", 1), ("lora_rank", 1), ("steps", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}: must be at least {least}, got {getattr(args, name)}")
    if args.v100 and args.dtype not in (None, "fp16"):
        raise ValueError(f"--v100 computes in fp16; leave out --dtype {args.dtype}")
    if args.memory and "all" in args.memory:
        args.memory = [*POLICIES]
    if args.plot and not is_comparison(args):
        raise ValueError("--plot draws a comparison; name whom to compare with in --peers, or several in --memory")
    missing = [name for name in args.peers if importlib.util.find_spec(PEERS[name][0]) is None]
    if missing:
        raise ValueError(f"--peers: {', '.join(missing)} is not installed; pip install it, or leave it out")
    for name in args.peers:
        if args.device == "cpu" and PEERS[name][1]:
            raise ValueError(f"--peers: {name} needs a CUDA device; leave it out on a CPU")
    return parse_size(args.memory_cap, "--memory_cap") if args.memory_cap is not None else None


def is_comparison(args: argparse.Namespace) -> bool:
    return bool(args.peers) or len(args.memory or []) > 1


def choose_device(args: argparse.Namespace):
    """The device; settles --dtype where it was left to it."""
    import torch
    from machine import check_dtype

    from longqlora.model.base import default_dtype

    is_gpu = torch.cuda.is_available() if args.device is None else args.device == "cuda"
    if is_gpu and not torch.cuda.is_available():
        raise ValueError("--device: torch sees no CUDA device; use cpu")
    if args.v100 and not is_gpu:
        raise ValueError("--v100 needs a CUDA device; leave it out on a CPU")
    names = {dtype_of(name): name for name in DTYPES}
    args.dtype = args.dtype or ("fp16" if args.v100 else names[default_dtype()] if is_gpu else "fp32")
    device = torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")
    check_dtype(args.dtype, device)
    return device


def limit_memory(cap: int, device) -> None:
    """Let allocations beyond `cap` bytes fail: torch's on a GPU, the whole process's on a CPU."""
    import torch

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)
    else:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (cap, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def use_v100_kernels() -> None:
    """Leave SDPA only the memory-efficient kernel; the math one, which holds all scores, is no way out either."""
    import torch

    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(True)


def main() -> None:
    args = parse_args()
    cap = check_args(args)
    check_results(args, {"--shape": args.shape})
    if is_comparison(args):
        from step_comparison import compare_steps

        return compare_steps(args)
    args.memory = args.memory[0] if args.memory else None

    import torch
    from machine import describe_machine, machine_lines
    from training_step import measure

    from longqlora.files import write_json

    device = choose_device(args)
    args.optim = args.optim or ("paged_adamw_32bit" if device.type == "cuda" else "adamw_torch")
    if args.optim.startswith("paged") and device.type == "cpu":
        raise ValueError(f"--optim: {args.optim} pages GPU memory; use adamw_torch on a CPU")
    machine = describe_machine(device)
    print(machine_lines(machine), flush=True)
    if args.v100:
        use_v100_kernels()
    if cap:
        limit_memory(cap, device)
    torch.manual_seed(0)
    try:
        result = measure(args, dtype_of(args.dtype), device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        limit = f"within --memory_cap {args.memory_cap}" if cap else f"on this {device.type} device"
        raise ValueError(
            f"out of memory {limit}: {args.shape}, {args.batch_size} x {args.seq_len} tokens, {args.attention} "
            f"attention, {args.dtype}; lower --seq_len, --batch_size or --lora_rank"
        ) from None
    speed = f"{result['tokens_per_second']:.1f} tokens/s, {result['median_seconds']:.3f} s a step"
    print(f"\n{speed} (median of {args.steps})")
    for name, value in result.items():
        if name.endswith("_bytes"):
            print(f"{name.removesuffix('_bytes').replace('_', ' '):<22}{value / MIB:>12,.1f} MiB")
    if args.output_file:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        write_json(args.output_file, {"settings": settings, "machine": machine, **result})


if __name__ == "__main__":
    run_main(main)
