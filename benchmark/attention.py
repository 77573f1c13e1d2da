"""Time and memory of S2-Attn, forward and backward, against the ways it is done elsewhere.

    python benchmark/attention.py
    python benchmark/attention.py --lengths 1024 4096 16384 --dtype bf16 --output_file out.json --plot out.png

The methods run in turns within one process, so that a change in the machine's load meets all of them.
  s2            component/attention/shift_short.py
  materialized  the rolled form of LongLoRA's code that holds all scores of a group
  rolled_sdpa   the rolled form with torch's SDPA on the copies
  full_sdpa     full causal attention, torch's SDPA
With --document_length, also on rows of several documents of that length:
  s2_packed     s2, document by document          s2_masked     s2, with a mask for each group, since every
                                                                second document continues the one before the last
  full_packed   full, document by document        full_masked   full, with a mask [S, S]
The two rolled forms wrap around (see rolled_attention.py), hence compute slightly more than causal
attention allows. Inputs and results are as in a model: projections [B, S, H*D], seen as [B, H, S, D].
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

from attention_layer import add_layer_arguments, check_layer, now, open_device

from longqlora.cli import dtype_of, run_main
from longqlora.outputs import check_results

PACKED_METHODS = ("s2_packed", "s2_masked", "full_packed", "full_masked")
METHODS = ("s2", "materialized", "rolled_sdpa", "full_sdpa", *PACKED_METHODS)
MIB = 2**20
PANELS = {
    "median_seconds": ("median time (ms), forward + backward", 1e3),
    "extra_bytes": ("extra memory (MiB), forward + backward", 1 / MIB),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_layer_arguments(parser, lengths=[4096], repeats=10)
    parser.add_argument("--group_size_ratio", type=float, default=0.25, help="group size as a part of the length "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--document_length", type=int, help="tokens of each document of a row (default: the whole row)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all; ratios are to s2")
    parser.add_argument("--output_file", type=Path, help="JSON file for the results")
    parser.add_argument("--plot", help="image (.png, .pdf or .svg) of time and memory by length")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before torch is imported."""
    check_layer(args, "document_length")
    if not 0 < args.group_size_ratio <= 1:
        raise ValueError(f"--group_size_ratio: must lie in (0, 1], got {args.group_size_ratio}")
    if args.methods is None:
        args.methods = [name for name in METHODS if args.document_length or name not in PACKED_METHODS]
    packed = [name for name in PACKED_METHODS if name in args.methods]
    if packed and not args.document_length:
        raise ValueError(f"--methods: {packed[0]} needs --document_length")
    rolled = {"materialized", "rolled_sdpa"} & set(args.methods)
    for length in args.lengths:
        group_size = int(max(length, 0) * args.group_size_ratio) // 2 * 2
        if group_size < 2:
            raise ValueError(f"--lengths: {length} is too short for groups of {args.group_size_ratio:g} of it")
        if rolled and length % group_size:
            raise ValueError(f"--lengths: {length} is no multiple of the group size {group_size}, which the rolled "
                             "methods need; choose another length, or --methods s2 full_sdpa")  # fmt: skip


def make_methods(args: argparse.Namespace, length: int, group_size: int, device) -> dict:
    import torch
    from rolled_attention import materialized_attention, rolled_shift_short_attention

    from longqlora.attention.sdpa import causal_attention
    from longqlora.attention.segments import segment_mask
    from longqlora.attention.shift_short import check_shift_short, grouped_attention, shift_short_attention

    check_shift_short(args.heads, group_size)
    segments = (torch.arange(length, device=device) // (args.document_length or length)).expand(args.batch, -1)
    rolled = partial(rolled_shift_short_attention, group_size=group_size)
    methods = {
        "s2": partial(shift_short_attention, group_size=group_size),
        "materialized": partial(rolled, kernel=materialized_attention),
        "rolled_sdpa": rolled,
        "full_sdpa": causal_attention,
        "s2_packed": partial(shift_short_attention, group_size=group_size, segment_ids=segments),
        "s2_masked": partial(shift_short_attention, group_size=group_size, segment_ids=segments % 2),
        "full_packed": lambda *x: grouped_attention(*x, [length], segment_ids=segments).transpose(1, 2),
        "full_masked": lambda *x: causal_attention(*x, mask=segment_mask(segments)),
    }
    return {name: methods[name] for name in METHODS if name in args.methods}


def make_inputs(args: argparse.Namespace, length: int, device) -> tuple[list, object]:
    """Leaves [B, S, H*D] and [B, S, K*D] as projections give them, and the gradient of the output [B, S, H*D]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    options = {"dtype": dtype_of(args.dtype), "device": device}
    widths = [args.heads, args.kv_heads, args.kv_heads, args.heads]
    tensors = [torch.randn(args.batch, length, w * args.head_dim, generator=generator).to(**options) for w in widths]
    return [x.requires_grad_() for x in tensors[:3]], tensors[3]


def step(method, leaves: list, gradient, head_dim: int) -> None:
    """One forward and backward pass; the gradients are dropped."""
    output = method(*(x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in leaves))
    output.transpose(1, 2).flatten(2).backward(gradient)
    for x in leaves:
        x.grad = None


def measure(args: argparse.Namespace, length: int, device) -> dict[str, dict]:
    """Seconds and extra bytes of each method at one length; a method that runs out of memory says so."""
    from live_memory import PeakMemory, check_free_memory
    from tqdm import tqdm

    from longqlora.device import is_out_of_memory

    group_size = int(length * args.group_size_ratio) // 2 * 2
    leaves, gradient = make_inputs(args, length, device)
    methods, results = make_methods(args, length, group_size, device), {}
    for name in list(methods):
        run = partial(step, methods[name], leaves, gradient, args.head_dim)
        try:
            if name == "materialized":
                # Scores, their softmax and a gradient of each. A CPU that runs out of memory kills the process.
                check_free_memory(4 * args.batch * args.heads * length * group_size * leaves[0].element_size(), device)
            run()
            with PeakMemory(device) as memory:
                run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            results[name] = {"error": "out of memory"}
            del methods[name]
            continue
        results[name] = {"extra_bytes": memory.peak_bytes, "seconds": []}
    for _ in tqdm(range(args.repeats), desc=f"{length} tokens", unit="turn", leave=False):
        for name, method in methods.items():
            start = now(device)
            step(method, leaves, gradient, args.head_dim)
            results[name]["seconds"].append(now(device) - start)
    for name in methods:
        seconds = results[name]["seconds"]
        results[name] |= {"min_seconds": min(seconds), "median_seconds": statistics.median(seconds)}
    return results


def table(length: int, group_size: int, results: dict[str, dict]) -> str:
    """Figures of each method, and how many times those of s2 they are."""
    own = results.get("s2", {})
    columns = f"{'min ms':>10}{'median ms':>11}{'extra MiB':>11}   times s2: min  median  memory"
    lines = [f"{length} tokens, groups of {group_size}: forward + backward", f"  {'method':<14}{columns}"]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"  {name:<14}{result['error']:>21}")
            continue
        line = f"  {name:<14}{1e3 * result['min_seconds']:>10.1f}{1e3 * result['median_seconds']:>11.1f}"
        line += f"{result['extra_bytes'] / MIB:>11.1f}"
        if "seconds" in own:
            ratios = [result[key] / max(own[key], 1e-12) for key in ("min_seconds", "median_seconds", "extra_bytes")]
            line += "{:>16.2f}{:>8.2f}{:>8.2f}".format(*ratios)
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    check_args(args)
    check_results(args, {})

    from length_plot import plot_by_length
    from machine import describe_machine, machine_lines

    from longqlora.files import write_json

    device = open_device(args)
    machine = describe_machine(device)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    print(machine_lines(machine))
    print(f"batch {args.batch}, heads {args.heads}/{args.kv_heads}, head dim {args.head_dim}, {args.dtype}, "
          f"{args.device}, {args.repeats} turns\n")  # fmt: skip
    results = {}
    for length in args.lengths:
        results[str(length)] = measure(args, length, device)
        print(table(length, int(length * args.group_size_ratio) // 2 * 2, results[str(length)]), flush=True)
        if args.output_file:
            write_json(args.output_file, {"settings": settings, "machine": machine, "results": results})
    if args.plot:
        plot_by_length(results, args.plot, PANELS, log=set(PANELS))


if __name__ == "__main__":
    run_main(main)
