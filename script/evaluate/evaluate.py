r"""Measure the perplexity and next-token accuracy of a base, merged or adapter model on a file of token ids.

    python script/evaluate/evaluate.py --base_model MODEL --peft_model ADAPTER --seq_len 2048 8192 \
        --sliding_window 2048 --data_path pg19-validation.bin --output_file perplexity.json --plot perplexity.png
    torchrun --nproc_per_node 2 script/evaluate/evaluate.py ...        # the same numbers from two processes

Attention is dense here, whatever the model was trained with, or dual chunk attention (--attention dca).
The default protocol is LongLoRA's; evaluation/perplexity.py defines both. A document of 100k tokens and more is
one window read in blocks: --seq_len 100000 --max_windows 1 --prefill_chunk_size 2048. With --output_file a
killed run goes on where it stopped when it is started again with the same arguments. Token files are made
by script/data/tokenize_corpus.py.
"""

import argparse
import importlib.util
from functools import partial
from pathlib import Path

from longqlora.cli import run_main
from longqlora.data.token_file import DTYPES, TokenFile, open_token_file, sidecar_path
from longqlora.evaluation.perplexity import PROTOCOLS, WindowPlan, batches, json_safe, plan_windows, summarize
from longqlora.files import write_json
from longqlora.inference.arguments import model_sources
from longqlora.model.context_request import (
    add_context_arguments,
    check_context_arguments,
    context_request,
)
from longqlora.outputs import check_results
from longqlora.plot import plot_evaluation

DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    boolean = argparse.BooleanOptionalAction
    parser.add_argument("--base_model", "--model_name_or_path", help="folder or hub name of a base or merged model "
                        "(default: the base that the adapter names)")  # fmt: skip
    parser.add_argument("--peft_model", "--adapter_name_or_path", help="folder of a trained adapter")
    parser.add_argument("--data_path", required=True, help="file of token ids (.bin)")
    parser.add_argument("--data_dtype", choices=list(DTYPES), help="id type of --data_path (default: what its "
                        "sidecar says, or uint16)")  # fmt: skip
    parser.add_argument("--seq_len", type=int, nargs="+", help="window lengths in tokens, one or more (default: the "
                        "model's context)")  # fmt: skip
    parser.add_argument("--sliding_window", type=int, default=256, help="stride between window starts in tokens "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=1, help="windows per forward pass (default: %(default)s)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="longlora", help="which tokens are scored and how "
                        "they are averaged (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max_windows", type=int, help="measure only this many windows, evenly spread (default: all)")
    parser.add_argument("--load_in_4bit", action=boolean, default=False, help="quantise the base to NF4, as in "
                        "training (default: no)")  # fmt: skip
    parser.add_argument("--dtype", choices=["auto", *DTYPE_NAMES], default="auto", help="dtype of the weights "
                        "(default: auto: bf16 or fp16 on a GPU, fp32 on a CPU)")  # fmt: skip
    parser.add_argument("--flash_attn", action=boolean, default=False, help="use the flash_attn package, if installed, "
                        "for the dense attention (default: PyTorch's own)")  # fmt: skip
    parser.add_argument("--prefill_chunk_size", type=int, help="read windows in blocks of so many tokens against a KV "
                        "cache: beside it, memory does not grow with --seq_len (default: whole windows)")  # fmt: skip
    parser.add_argument("--output_file", type=Path, help="JSON file for the results; also makes the run resumable")
    parser.add_argument("--plot", help="image (.png, .pdf or .svg) of perplexity by length and loss by position")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add_context_arguments(parser)
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    if not args.base_model and not args.peft_model:
        raise ValueError("--base_model: give a model, or --peft_model with an adapter that names one")
    if args.context_size == -1:
        args.context_size = None
    check_context_arguments(args)
    if args.prefill_chunk_size is not None and args.prefill_chunk_size < 1:
        raise ValueError(f"--prefill_chunk_size: must be at least 1 token, got {args.prefill_chunk_size}")
    if args.flash_attn and importlib.util.find_spec("flash_attn") is None:
        raise ValueError("--flash_attn: the flash_attn package is not installed; install it, or leave the flag out: "
                         "PyTorch's own attention gives the same numbers")  # fmt: skip
    batches((), args.batch_size)
    sources = model_sources(args.base_model, args.peft_model)
    check_results(args, {"--data_path": [args.data_path, sidecar_path(args.data_path)], **sources})


def make_plans(args: argparse.Namespace, num_tokens: int, seq_lens: list[int]) -> list[WindowPlan]:
    options = {"stride": args.sliding_window, "protocol": args.protocol, "max_windows": args.max_windows}
    return [plan_windows(num_tokens, seq_len=seq_len, **options) for seq_len in dict.fromkeys(seq_lens)]


def load(args: argparse.Namespace, dtype):
    """The model on this process's device, with the dense attention that was asked for."""
    from longqlora.attention.binding import DENSE_DESCRIPTION, bind_inference_attention
    from longqlora.distributed import local_device
    from longqlora.inference.load import load_for_inference

    device = local_device()
    if args.flash_attn and (device.type != "cuda" or dtype.itemsize != 2):
        raise ValueError("--flash_attn works on a GPU with --dtype fp16 or bf16 only; leave the flag out")
    loaded = load_for_inference(
        args.base_model,
        adapter_name_or_path=args.peft_model,
        context=context_request(args),
        load_in_4bit=args.load_in_4bit,
        dtype=dtype,
        device=device,
        trust_remote_code=args.trust_remote_code,
    )
    if args.flash_attn:
        if loaded.attention != DENSE_DESCRIPTION:
            raise ValueError("--flash_attn is for dense attention only; leave it out with --attention dca")
        loaded.model.set_attn_implementation("flash_attention_2")
        loaded.attention = "dense causal (flash-attn)"
    elif args.prefill_chunk_size:
        bind_inference_attention(loaded.model, is_chunked=True)
    return loaded


def describe_run(args: argparse.Namespace, loaded, data: TokenFile) -> dict:
    """What every result of this run says about itself."""
    from longqlora.inference.load import model_facts

    return {
        "sliding_window": args.sliding_window,
        "batch_size": args.batch_size,
        "prefill_chunk_size": args.prefill_chunk_size,
        "data_file": data.path.name,
        "data_sha256": data.sha256,
        **model_facts(loaded),
    }


def start_ledger(args: argparse.Namespace, loaded, facts: dict):
    """The record of finished windows, valid for runs that agree in everything that decides the number."""
    from longqlora.distributed import print_main
    from longqlora.evaluation.scoring import WindowLedger
    from longqlora.inference.load import model_fingerprint

    decisive = {
        **{name: value for name, value in facts.items() if name not in ("versions", "data_file")},
        **model_fingerprint(loaded),
        "protocol": args.protocol,
        "max_windows": args.max_windows,
    }
    ledger = WindowLedger(args.output_file, decisive)
    ledger.start()
    if ledger.num_foreign:
        print_main("partial results of other arguments found; starting anew")
    if ledger.done:
        print_main(f"resuming: {len(ledger.done)} windows already measured")
    return ledger


def measure_length(plan: WindowPlan, facts: dict, losses_of, longest_input: float) -> dict:
    """Measure one window length with `losses_of` and report it; the result is the same on every rank."""
    import torch

    from longqlora.distributed import print_main

    if plan.seq_len > longest_input:
        print_main(f"warning: seq_len {plan.seq_len} is beyond the model's context of {facts['context_size']} tokens")
    weights = f"4-bit NF4 base, {facts['dtype']} products" if facts["load_in_4bit"] else f"{facts['dtype']} weights"
    protocol = f"{plan.describe()}; {weights}, losses in float32; attention {facts['attention']}"
    print_main(f"protocol: {protocol}")
    num_left_out = plan.num_windows_dropped + plan.num_windows_skipped
    print_main(f"left out: {num_left_out} windows; {plan.num_uncovered_tokens} tokens of the file are in no window")
    try:
        losses = losses_of(plan)
    except torch.OutOfMemoryError:
        failure = ValueError(
            f"out of GPU memory at seq_len {plan.seq_len}, batch_size {facts['batch_size']}; lower --batch_size or "
            "--seq_len, or pass --load_in_4bit"
        )
        failure.from_one_rank = True
        raise failure from None
    result = {"seq_len": plan.seq_len, "protocol": protocol, **summarize(plan, losses), **facts}
    print_main(
        f"seq_len {plan.seq_len}: perplexity {result['perplexity']:.4f}, loss {result['loss']:.6f}, "
        f"accuracy {result['accuracy']:.6f} ({result['num_windows']} windows, {result['num_tokens']} tokens scored)"
    )
    if result["num_windows_nonfinite"]:
        print_main(f"warning: the loss of {result['num_windows_nonfinite']} windows is inf or nan")
    return result


def evaluate(args: argparse.Namespace, data: TokenFile) -> None:
    """Load the model, measure every window length and write the results."""
    import torch

    from longqlora.distributed import init_process_group, local_device
    from longqlora.evaluation.scoring import TokenScorer, measure
    from longqlora.model.base import default_dtype
    from longqlora.model.context import context_length, resolve_config

    try:
        _, config = resolve_config(
            args.base_model, args.peft_model, context_request(args), trust_remote_code=args.trust_remote_code
        )
    except OSError as error:
        # The hub's own message need not say which name it could not find.
        raise ValueError(f"cannot load {args.base_model or args.peft_model!r}: {error}") from None
    data.check_ids(config.get_text_config().vocab_size)
    plans = make_plans(args, data.num_tokens, args.seq_len or [context_length(config)])
    init_process_group()
    dtype = default_dtype() if args.dtype == "auto" else getattr(torch, DTYPE_NAMES[args.dtype])
    loaded = load(args, dtype)
    facts = describe_run(args, loaded, data)
    ledger = start_ledger(args, loaded, facts)
    losses_of = partial(
        measure,
        TokenScorer(loaded.model, prefill_chunk_size=args.prefill_chunk_size),
        data.tokens,
        batch_size=args.batch_size,
        device=local_device(),
        ledger=ledger,
    )
    finish(args, [measure_length(plan, facts, losses_of, loaded.longest_input) for plan in plans], ledger)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def finish(args: argparse.Namespace, results: list[dict], ledger) -> None:
    """Write the results on rank 0, then drop the record of single windows."""
    from longqlora.distributed import is_main_process, print_main

    if is_main_process():
        if args.output_file:
            single = results[0] if len(results) == 1 else {}
            write_json(args.output_file, json_safe({**single, "results": results}))
            print_main(f"wrote {args.output_file}")
        if args.plot:
            plot_evaluation(results, Path(args.peft_model or args.base_model).name, args.plot)
            print_main(f"wrote {args.plot}")
    ledger.remove()


def main() -> None:
    args = parse_args()
    check_args(args)
    data = open_token_file(args.data_path, dtype=args.data_dtype)
    make_plans(args, data.num_tokens, args.seq_len or [])
    evaluate(args, data)


if __name__ == "__main__":
    run_main(main)
