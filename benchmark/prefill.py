"""Reading a long prompt in blocks: tokens per second and memory of a 4-bit model of any Llama shape, random weights.

    python benchmark/prefill.py --shape tiny --num_tokens 1000 --prefill_chunk_size 100
    python benchmark/prefill.py --shape llama2-7b --num_tokens 100000 --device cuda --output_file prefill.json

The prompt goes through the decoder block by block against a KV cache of fixed size, and the last token's
logits are made, as the first token of an answer needs it. The methods, one after another on one model:
  dca             dual chunk attention over --pretraining_length
  sdpa_with_past  dense causal attention without a mask (component/attention/merged.py)
  sdpa            dense causal attention as stock transformers does it, with a mask for each block
Two blocks warm up. Extra memory is what is held at once beside the weights, the KV cache included. --v100 makes a
newer GPU take the way of a V100: fp16, memory-efficient kernels only.
"""

import argparse
import time
from pathlib import Path

from train_step import MIB, choose_device, limit_memory, use_v100_kernels

from longqlora.cli import DTYPES, dtype_of, run_main
from longqlora.device import parse_size
from longqlora.outputs import check_results

METHODS = ("dca", "sdpa_with_past", "sdpa")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", help="llama2-7b, llama2-13b, tiny, or the path of a config.json "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--num_tokens", type=int, default=1000, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--prefill_chunk_size", type=int, default=2048, help="tokens of a block (default: %(default)s)")
    parser.add_argument("--pretraining_length", type=int, help="tokens; for dca (default: what the shape reads)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the products (default: what the "
                        "device computes fast; fp16 with --v100)")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--memory_cap", help="most memory to use, such as 32GiB; a method that needs more says so "
                        "(default: none)")  # fmt: skip
    parser.add_argument("--v100", action="store_true", help="fp16, and no attention kernel that a V100 lacks")
    parser.add_argument("--output_file", type=Path, help="JSON file for the results")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> int | None:
    """Refuse what cannot be measured, before torch is imported; returns the memory cap in bytes."""
    for name in ("num_tokens", "prefill_chunk_size", "pretraining_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: must be at least 1 token, got {value}")
    if args.v100 and args.dtype not in (None, "fp16"):
        raise ValueError(f"--v100 computes in fp16; leave out --dtype {args.dtype}")
    return parse_size(args.memory_cap, "--memory_cap") if args.memory_cap is not None else None


def bind(model, method: str, args: argparse.Namespace) -> str:
    """Give `model` the attention of `method`, the way that evaluation and generation do; returns its description."""
    from longqlora.attention.binding import bind_inference_attention
    from longqlora.model.context import ContextRequest, apply_context

    if method == "dca":
        lengths = {"context_size": args.num_tokens, "pretraining_length": args.pretraining_length}
        apply_context(model.config, ContextRequest(attention="dca", **lengths))
    else:
        apply_context(model.config, ContextRequest(attention="full"))
    return bind_inference_attention(model, is_chunked=method == "sdpa_with_past")


def read_prompt(model, input_ids, block_size: int) -> list[float]:
    """Read `input_ids` int [1, S] and make the last token's logits; returns the seconds of each block."""
    import torch

    from longqlora.attention.chunked_prefill import states_in_blocks

    seconds, start = [], time.perf_counter()
    blocks = states_in_blocks(model.get_decoder(), input_ids, config=model.config, block_size=block_size)
    with torch.no_grad():
        for _, states in blocks:
            logits = model.get_output_embeddings()(states[:, -1:])
            # Reading a value waits for the device.
            float(logits[0, 0, 0])
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return seconds


def measure(model, input_ids, args: argparse.Namespace, device) -> dict:
    import torch
    from live_memory import PeakMemory

    read_prompt(model, input_ids[:, : 2 * args.prefill_chunk_size], args.prefill_chunk_size)
    if device.type == "cuda":
        # What the method before left in the allocator's pool is no memory of this one.
        torch.cuda.empty_cache()
    with PeakMemory(device) as memory:
        seconds = read_prompt(model, input_ids, args.prefill_chunk_size)
    result = {"extra_bytes": memory.peak_bytes}
    if device.type == "cuda":
        result["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    else:
        # Counting tensors took time.
        seconds = read_prompt(model, input_ids, args.prefill_chunk_size)
    total = sum(seconds)
    return {"tokens_per_second": args.num_tokens / total, "seconds": total, **result, "seconds_by_block": seconds}


def table(results: dict[str, dict]) -> str:
    lines = [f"{'method':<16}{'tokens/s':>12}{'seconds':>10}{'last block s':>14}{'extra MiB':>12}"]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"{name:<16}{result['error']:>24}")
            continue
        line = f"{name:<16}{result['tokens_per_second']:>12.1f}{result['seconds']:>10.2f}"
        lines.append(f"{line}{result['seconds_by_block'][-1]:>14.3f}{result['extra_bytes'] / MIB:>12,.1f}")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    cap = check_args(args)
    check_results(args, {"--shape": args.shape})

    import torch
    from machine import describe_machine, machine_lines
    from random_nf4_model import random_nf4_model, shape_config

    from longqlora.device import is_out_of_memory
    from longqlora.files import write_json

    device = choose_device(args)
    machine, config = describe_machine(device), shape_config(args.shape)
    print(machine_lines(machine), flush=True)
    if args.v100:
        use_v100_kernels()
    if cap:
        limit_memory(cap, device)
    torch.manual_seed(0)
    model = random_nf4_model(config, dtype=dtype_of(args.dtype), device=device).eval()
    input_ids = torch.randint(config.vocab_size, (1, args.num_tokens), device=device)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    results = {}
    for method in args.methods:
        print(f"{method}: {bind(model, method, args)}", flush=True)
        try:
            results[method] = measure(model, input_ids, args, device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            results[method] = {"error": "out of memory"}
        if args.output_file:
            write_json(args.output_file, {"settings": settings, "machine": machine, "results": results})
    print(f"\n{args.num_tokens} tokens in blocks of {args.prefill_chunk_size}, {args.dtype}\n{table(results)}")


if __name__ == "__main__":
    run_main(main)
