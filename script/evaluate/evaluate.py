r"""Measure the perplexity and next-token accuracy of a base, merged or adapter model on a file of token ids.

    python script/evaluate/evaluate.py --base_model MODEL --peft_model ADAPTER --seq_len 2048 8192 \
        --sliding_window 2048 --data_path pg19-validation.bin --output_file perplexity.json --plot perplexity.png
    torchrun --nproc_per_node 2 script/evaluate/evaluate.py ...        # the same numbers from two processes

Attention is dense here, whatever the model was trained with, or dual chunk attention (--attention dca). The default
protocol is LongLoRA's; evaluation/perplexity.py defines both. A document of 100k tokens and more is one window read in
blocks: --seq_len 100000 --max_windows 1 --prefill_chunk_size 2048. With --output_file a killed run goes on where it
stopped when it is started again with the same arguments. Token files are made by script/data/tokenize_corpus.py.
"""

import argparse
import importlib.util

from longqlora.cli import run_main
from longqlora.data.token_file import ID_DTYPES, open_token_file
from longqlora.evaluation.frame import Task, evaluate, from_flags
from longqlora.evaluation.perplexity import PROTOCOLS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("perplexity")
    group.add_argument("--data_path", required=True, help="file of token ids (.bin)")
    group.add_argument("--data_dtype", choices=list(ID_DTYPES), help="id type of --data_path (default: what its "
                       "sidecar says, or uint16)")  # fmt: skip
    group.add_argument("--seq_len", type=int, nargs="+", help="window lengths in tokens, one or more (default: the "
                       "model's context)")  # fmt: skip
    group.add_argument("--sliding_window", type=int, default=256, help="stride between window starts in tokens "
                       "(default: %(default)s)")  # fmt: skip
    group.add_argument("--batch_size", type=int, default=1, help="windows per forward pass (default: %(default)s)")
    group.add_argument("--protocol", choices=PROTOCOLS, default="longlora", help="which tokens are scored and how "
                       "they are averaged (default: %(default)s)")  # fmt: skip
    group.add_argument("--max_windows", type=int, help="measure only this many windows, evenly spread (default: all)")
    group.add_argument("--flash_attn", action=argparse.BooleanOptionalAction, default=False, help="use the flash_attn "
                       "package, if installed, for the dense attention (default: PyTorch's own)")  # fmt: skip
    group.add_argument("--prefill_chunk_size", type=int, help="read windows in blocks of so many tokens against a KV "
                       "cache: beside it, memory does not grow with --seq_len (default: whole windows)")  # fmt: skip


def make_task(args: argparse.Namespace) -> Task:
    if args.flash_attn:
        check_flash_attn(args)
    data = open_token_file(args.data_path, dtype=args.data_dtype)

    from longqlora.evaluation.perplexity_task import Perplexity, Windows

    return Perplexity(from_flags(Windows, args, data=data), args.seq_len, flash_attn=args.flash_attn)


def check_flash_attn(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError("--flash_attn: the flash_attn package is not installed; install it, or leave the flag out: "
                         "PyTorch's own attention gives the same numbers")  # fmt: skip

    import torch

    if not torch.cuda.is_available() or args.dtype == "fp32":
        raise ValueError("--flash_attn works on a GPU with --dtype fp16 or bf16 only; leave the flag out")


def main() -> None:
    evaluate(__doc__, add_arguments, make_task, plot="perplexity by length and loss by position")


if __name__ == "__main__":
    run_main(main)
