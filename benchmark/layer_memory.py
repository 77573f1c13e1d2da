"""Live memory of one decoder layer in training, per token, for each activation policy, at a model's exact ratios.

    python benchmark/layer_memory.py
    python benchmark/layer_memory.py --shapes 7b 70b --seq_len 16384 --output_file layer.json --plot layer.png
    python benchmark/layer_memory.py --shapes 7b --model_types llama glm4 olmo2

A unit is one 16-bit vector of the hidden size per token (8 KiB at 7B). The layer is scaled down to --hidden_size,
with the model's own ratios of MLP width, key/value heads and LoRA rank; NF4 base, dropout on, S2-Attn, bf16. Its input
and the gradient that comes in are counted, as a training step holds them. Unpacked weights do not grow with the
tokens: "per token" is the slope between half the length and the whole, "in all" the count at --seq_len. For several
types that is checkpointing and the three policies that have a name.
"""

import argparse
from pathlib import Path

from tabulate import tabulate

from longqlora.cli import run_main
from longqlora.outputs import check_results

# (MLP width over hidden size, heads, key/value heads, hidden size): Llama-2.
RATIOS = {"7b": (43 / 16, 32, 32, 4096), "13b": (2.7, 40, 40, 5120), "70b": (3.5, 64, 8, 8192)}
GOAL = 11.5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(RATIOS), default=list(RATIOS), help="default: all")
    parser.add_argument("--model_types", nargs="+", default=["llama"], metavar="TYPE", help="types of the layer, of "
                        "those that the layer function knows (default: llama)")  # fmt: skip
    parser.add_argument("--seq_len", type=int, default=8192, help="tokens (default: %(default)s)")
    parser.add_argument("--hidden_size", type=int, default=640, help="hidden size of the scaled layer, a multiple of "
                        "320 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tile_size", type=int, default=512, help="tokens at a time (default: %(default)s)")
    parser.add_argument("--output_file", type=Path, help="JSON file for the result")
    parser.add_argument("--plot", type=Path, help="PNG of the result")
    return parser.parse_args()


def layer_config(model_type: str, shape: str, hidden_size: int):
    """Config of one layer with the ratios of `shape`, and the LoRA rank that is its 64."""
    from transformers import AutoConfig

    ratio, heads, kv_heads, full_size = RATIOS[shape]
    config = AutoConfig.for_model(
        model_type, sliding_window=None, layer_types=["full_attention"], attention_dropout=0.0, residual_dropout=0.0,
        pad_token_id=0, vocab_size=64, hidden_size=hidden_size, intermediate_size=round(hidden_size * ratio),
        num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=max(8, hidden_size // heads),
    )  # fmt: skip
    return config, max(1, round(64 * hidden_size / full_size))


def measure(model_type: str, shape: str, args: argparse.Namespace, policy) -> dict[str, float]:
    """Units held at the peak of a forward and backward pass: in all at --seq_len, and for each further token."""
    config, rank = layer_config(model_type, shape, args.hidden_size)
    half, whole = (live_bytes(config, rank, length, policy) for length in (args.seq_len // 2, args.seq_len))
    unit = 2 * args.hidden_size
    return {
        "units_in_all": whole / (unit * args.seq_len),
        "units_per_token": (whole - half) / (unit * (args.seq_len - args.seq_len // 2)),
    }


def live_bytes(config, rank: int, length: int, policy) -> int:
    import torch
    from live_memory import PeakMemory
    from random_nf4_model import random_nf4_model

    from longqlora.attention.binding import bind_attention
    from longqlora.memory.layer_binding import apply_policy, decoder_layers
    from longqlora.model.adapter import attach_adapter
    from longqlora.settings.config import AdapterConfig, AttentionConfig

    device, dtype = torch.device("cpu"), torch.bfloat16
    model = random_nf4_model(config, dtype=dtype, device=device)
    bind_attention(model, AttentionConfig(), length)
    model = attach_adapter(model, AdapterConfig(lora_rank=rank, lora_dropout=0.05)).train()
    apply_policy(model, policy, device)
    (layer,) = decoder_layers(model)
    if policy.gradient_checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    states = torch.randn(1, length, config.hidden_size).to(dtype).requires_grad_()
    rope = model.get_base_model().model.rotary_emb(states, torch.arange(length)[None])
    gradient = torch.randn(1, length, config.hidden_size).to(dtype)
    with PeakMemory(device) as memory:
        with torch.autocast("cpu", dtype):
            output = layer(states, position_embeddings=rope)
        output.backward(gradient)
    # The output is the next layer's to hold, not this one's.
    return memory.peak_bytes - output.nbytes + states.nbytes + gradient.nbytes


def table(results: dict) -> str:
    """A row for each policy, or where there are more models than policies for each model."""
    rows = {name: [f"{x['units_per_token']:.2f} ({x['units_in_all']:>6.2f})" for x in sets.values()]
            for name, sets in results.items()}  # fmt: skip
    headers = [name.rpartition("tokens, ")[2] for name in next(iter(results.values()))]
    if len(rows) <= len(headers):
        rows, headers = dict(zip(headers, zip(*rows.values(), strict=True), strict=True)), list(rows)
    rows = [[name, *cells] for name, cells in rows.items()]
    options = {"tablefmt": "plain", "colalign": ("left", *["right"] * len(headers))}
    return tabulate(rows, ["units per token (in all)", *headers], **options)


def plot(results: dict, path: Path) -> None:
    from longqlora.plot import new_figure

    with new_figure(path) as (axes,):
        for position, (shape, sets) in enumerate(results.items()):
            heights = [index + 0.25 * position for index in range(len(sets))]
            axes.barh(heights, [cell["units_per_token"] for cell in sets.values()], height=0.25, label=shape)
        axes.set_yticks(range(len(sets)), [name.removeprefix("layer function, ") for name in sets], fontsize=6)
        axes.axvline(GOAL, color="black", linewidth=0.8)
        axes.set_xlabel(f"units per token (line: {GOAL})")
        axes.invert_yaxis()
        axes.legend()


def main() -> None:
    args = parse_args()
    if args.seq_len < 64 or args.hidden_size < 320 or args.hidden_size % 320 or args.tile_size < 1:
        raise ValueError("--seq_len: at least 64; --hidden_size: a multiple of 320; --tile_size: at least 1")
    check_results(args, {})

    from dataclasses import replace
    from itertools import product

    from tqdm import tqdm

    from longqlora.files import write_json
    from longqlora.memory.decoder_layer import MODEL_TYPES
    from longqlora.memory.policy import CANDIDATES, CHECKPOINTED, POLICIES, STOCK

    if unknown := set(args.model_types) - set(MODEL_TYPES):
        raise ValueError(f"--model_types: {', '.join(sorted(unknown))} not known; choose from {', '.join(MODEL_TYPES)}")
    on_cpu = {"tile_size": args.tile_size, "offload_activations": False, "optim": None}
    several = (CHECKPOINTED, *POLICIES.values())
    candidates = several if len(args.model_types) > 1 else (STOCK, CHECKPOINTED, *CANDIDATES)
    sets = list(dict.fromkeys(replace(candidate, **on_cpu) for candidate in candidates))
    columns = {" ".join(c if len(args.model_types) > 1 else c[1:]): c for c in product(args.model_types, args.shapes)}
    results: dict = {name: {} for name in columns}
    for name, policy in tqdm(list(product(columns, sets)), desc="sets", leave=False):
        results[name][policy.describe()] = measure(*columns[name], args, policy)
    print(table(results))
    if args.output_file:
        settings = {"seq_len": args.seq_len, "hidden_size": args.hidden_size, "tile_size": args.tile_size}
        write_json(args.output_file, {"settings": settings, "results": results})
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    run_main(main)
