"""Time and memory of dual chunk attention (DCA), forward only, against full causal attention.

    python benchmark/dual_chunk_attention.py
    python benchmark/dual_chunk_attention.py --lengths 8192 65536 --dtype bf16 --output_file dca.json --plot dca.png

One attention layer reads a prompt of each length, without gradients. The methods run in turns within one
process, so that a change in the machine's load meets both; the time of the process on the CPU, all threads
together, hardly feels it.
  dca        component/attention/dual_chunk.py
  full_sdpa  full causal attention, torch's SDPA
Extra memory is what is held at once beside query, key and value, the output included; the table also gives it
in units of query, key and value together.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

from attention_layer import add_layer_arguments, check_layer, now, open_device

from longqlora.cli import dtype_of, run_main
from longqlora.outputs import check_results

METHODS = ("dca", "full_sdpa")
MIB = 2**20
LABELS = {
    "min_seconds": "forward time (s)",
    "min_cpu_seconds": "forward time on the CPU (s)",
    "extra_per_qkv": "extra memory (times q + k + v)",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_layer_arguments(parser, lengths=[8192, 16384], repeats=3)
    parser.add_argument("--pretraining_length", type=int, default=4096, help="tokens (default: %(default)s)")
    parser.add_argument("--chunk_size", type=int, help="tokens (default: 3/4 of --pretraining_length)")
    parser.add_argument("--local_window", type=int, help="tokens (default: 1/8 of --pretraining_length)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: both")
    parser.add_argument("--output_file", type=Path, help="JSON file for the results")
    parser.add_argument("--plot", help="image (.png, .pdf or .svg) of time and memory by length")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before torch is imported."""
    check_layer(args)
    if min(args.lengths) < 1:
        raise ValueError(f"--lengths: must be at least 1, got {min(args.lengths)}")
    if args.head_dim % 2:
        raise ValueError(f"--head_dim: RoPE rotates pairs, so it must be even, got {args.head_dim}")


def make_methods(args: argparse.Namespace, sizes, device) -> dict:
    import torch

    from longqlora.attention.dual_chunk import dual_chunk_attention
    from longqlora.attention.sdpa import causal_attention

    inv_freq = 10000.0 ** -(torch.arange(0, args.head_dim, 2, device=device) / args.head_dim)
    methods = {"dca": partial(dual_chunk_attention, inv_freq=inv_freq, sizes=sizes), "full_sdpa": causal_attention}
    return {name: methods[name] for name in METHODS if name in args.methods}


def make_inputs(args: argparse.Namespace, length: int, device) -> list:
    """Query, key and value as in a model: projections [B, S, H * D], seen as [B, H, S, D]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    options = {"dtype": dtype_of(args.dtype), "device": device}
    shapes = [(args.batch, length, heads, args.head_dim) for heads in (args.heads, args.kv_heads, args.kv_heads)]
    return [torch.randn(shape, generator=generator).to(**options).transpose(1, 2) for shape in shapes]


def measure(args: argparse.Namespace, length: int, sizes, device) -> dict:
    """Facts of one length and the figures of each method; a method that runs out of memory says so."""
    from live_memory import PeakMemory
    from tqdm import tqdm

    from longqlora.device import is_out_of_memory

    tensors = make_inputs(args, length, device)
    qkv_bytes = sum(x.nbytes for x in tensors)
    num_chunks = -(-length // sizes.stride)
    methods, figures = make_methods(args, sizes, device), {}
    with PeakMemory(device):
        for method in methods.values():
            # Three chunks, as short as can be, warm up: libraries load, those of the memory count too.
            method(*make_inputs(args, 2 * sizes.stride + 1, device))
    for _ in tqdm(range(args.repeats), desc=f"{length} tokens", unit="turn", leave=False):
        for name in list(methods):
            start, cpu_start = now(device), time.process_time()
            try:
                with PeakMemory(device) as memory:
                    methods[name](*tensors)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                figures[name] = {"error": "out of memory"}
                del methods[name]
                continue
            turn = figures.setdefault(name, {"extra_bytes": 0, "seconds": [], "cpu_seconds": []})
            turn["extra_bytes"] = max(turn["extra_bytes"], memory.peak_bytes)
            turn["seconds"].append(now(device) - start)
            turn["cpu_seconds"].append(time.process_time() - cpu_start)
    for name in methods:
        seconds, cpu_seconds = figures[name]["seconds"], figures[name]["cpu_seconds"]
        figures[name] |= {"min_seconds": min(seconds), "median_seconds": statistics.median(seconds)}
        figures[name] |= {
            "min_cpu_seconds": min(cpu_seconds),
            "extra_per_qkv": figures[name]["extra_bytes"] / qkv_bytes,
        }
    facts = {"qkv_bytes": qkv_bytes, "num_chunks": num_chunks, "num_chunk_pairs": num_chunks * (num_chunks + 1) // 2}
    return {**facts, "methods": figures}


def table(length: int, result: dict, *, key: str) -> str:
    """Figures of each method; ratios are of the time on the CPU, or of wall time on a GPU."""
    own = result["methods"].get("dca", {})
    lines = [
        f"{length} tokens, {result['num_chunks']} chunks, {result['num_chunk_pairs']} pairs of chunks, "
        f"q + k + v {result['qkv_bytes'] / MIB:.1f} MiB",
        f"  {'method':<12}{'min ms':>11}{'median ms':>12}{'CPU ms':>11}{'times dca':>11}{'extra MiB':>12}"
        f"{'of q+k+v':>10}",
    ]
    for name, figures in result["methods"].items():
        if "error" in figures:
            lines.append(f"  {name:<12}{figures['error']:>23}")
            continue
        line = f"  {name:<12}{1e3 * figures['min_seconds']:>11.1f}{1e3 * figures['median_seconds']:>12.1f}"
        line += f"{1e3 * figures['min_cpu_seconds']:>11.1f}"
        line += f"{figures[key] / max(own[key], 1e-12):>11.2f}" if key in own else f"{'':>11}"
        line += f"{figures['extra_bytes'] / MIB:>12.1f}{figures['extra_per_qkv']:>10.2f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    check_args(args)
    check_results(args, {})

    import torch
    from length_plot import plot_by_length
    from machine import describe_machine, machine_lines

    from longqlora.attention.dual_chunk import DualChunkSizes
    from longqlora.files import write_json

    sizes = DualChunkSizes(args.pretraining_length, args.chunk_size, args.local_window)
    device = open_device(args)
    machine = describe_machine(device)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {"chunk_size": sizes.chunk_size, "local_window": sizes.local_window}
    print(machine_lines(machine))
    print(f"batch {args.batch}, heads {args.heads}/{args.kv_heads}, head dim {args.head_dim}, {args.dtype}, "
          f"{args.device}, {args.repeats} turns; {sizes}\n")  # fmt: skip
    results, key = {}, "min_seconds" if device.type == "cuda" else "min_cpu_seconds"
    with torch.no_grad():
        for length in args.lengths:
            results[str(length)] = measure(args, length, sizes, device)
            print(table(length, results[str(length)], key=key), flush=True)
            if args.output_file:
                write_json(args.output_file, {"settings": settings, "machine": machine, "results": results})
    if args.plot:
        panels = {name: (LABELS[name], 1.0) for name in (key, "extra_per_qkv")}
        plot_by_length({n: result["methods"] for n, result in results.items()}, args.plot, panels, log={key})


if __name__ == "__main__":
    run_main(main)
