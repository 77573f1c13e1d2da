"""What the benchmarks of one attention layer share: its flags, their checks, the device and the clock."""

import argparse
import time

from longqlora.cli import DTYPES


def add_layer_arguments(parser: argparse.ArgumentParser, *, lengths: list[int], repeats: int) -> None:
    """Flags of the layer and the machine; `lengths` and `repeats` are defaults."""
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths,
                        help=f"tokens (default: {' '.join(map(str, lengths))})")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="rows (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv_heads", type=int, help="key/value heads (default: as many as query heads)")
    parser.add_argument("--head_dim", type=int, default=64, help="numbers per head (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--repeats", type=int, default=repeats, help="measured turns of each method "
                        "(default: %(default)s)")  # fmt: skip


def check_layer(args: argparse.Namespace, *more: str) -> None:
    """Refuse flags of a layer that cannot be, before torch is imported; `more`: others that count at least 1."""
    args.kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    for name in ("batch", "heads", "kv_heads", "head_dim", "repeats", "threads", *more):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: must be at least 1, got {value}")
    if args.heads % args.kv_heads:
        raise ValueError(f"--kv_heads: {args.kv_heads} does not divide --heads {args.heads}")
    if args.device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device: must be cpu or cuda, got {args.device!r}")


def open_device(args: argparse.Namespace):
    """The device of --device, ready for --dtype and with --threads."""
    import torch
    from machine import check_dtype

    device = torch.device(args.device)
    check_dtype(args.dtype, device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: torch sees no CUDA device; use cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    return device


def now(device) -> float:
    """Seconds, when the work on `device` is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
