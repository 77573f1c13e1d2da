r"""Measure passkey retrieval: does the model find a number hidden in a long prompt?

    python script/evaluate/passkey.py --model_name_or_path MODEL --lengths 1024 2048 4096 --num_depths 10 \
        --output_file passkey.json --plot passkey.png
    python script/evaluate/passkey.py --adapter_name_or_path ADAPTER --context_size 8192 --lengths 8192
    torchrun --nproc_per_node 2 script/evaluate/passkey.py ...         # the same results from two processes

Prompts have exactly the lengths and depths asked for, in tokens of the model's tokenizer; wording and scoring are
in retrieval/passkey.py. Raw text behind BOS, greedy answers. Prints the accuracy in percent by length and depth.
With --output_file a killed run goes on where it stopped when it is started again.
"""

import argparse
from functools import partial

from longqlora.cli import run_main
from longqlora.evaluation.frame import evaluate, from_flags
from longqlora.evaluation.retrieval.grid import add_grid_arguments
from longqlora.evaluation.retrieval.passkey import Passkey


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_grid_arguments(parser)
    parser.add_argument("--num_trials", type=int, default=5, help="keys for each length and depth (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--num_digits", type=int, default=5, help="digits of a key (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides the keys (default: %(default)s)")


def main() -> None:
    evaluate(__doc__, add_arguments, partial(from_flags, Passkey), plot="the accuracy by length and depth")


if __name__ == "__main__":
    run_main(main)
