r"""Needle in a haystack: does the model find a sentence hidden in your own long text?

    python script/evaluate/needle.py --model_name_or_path MODEL --haystack essays/ book.txt \
        --lengths 4096 8192 16384 --num_depths 10 --output_file needle.json --plot needle.png
    python script/evaluate/needle.py --model_name_or_path MODEL --haystack minutes.txt --lengths 8192 \
        --needle "The caterer for the spring fair is Ines Vogel." --question "Who is the caterer?" --answer "Ines Vogel"
    torchrun --nproc_per_node 2 script/evaluate/needle.py ...          # the same results from two processes

The needle is put at the sentence border nearest to each depth, and prompts have exactly the lengths asked for, in
tokens of the model's tokenizer; a shorter haystack is repeated, which is said. No judge: the score is the share of
the expected answer's words that the answer has (retrieval/needle.py). Answers are greedy. With --output_file a
killed run goes on where it stopped when it is started again.
"""

import argparse
from functools import partial

from longqlora.cli import run_main
from longqlora.evaluation.frame import evaluate, from_flags
from longqlora.evaluation.retrieval.grid import add_grid_arguments
from longqlora.evaluation.retrieval.needle import ANSWER, MAX_NEW_TOKENS, NEEDLE, QUESTION, Needle
from longqlora.inference.arguments import add_template_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_grid_arguments(parser)
    add_template_argument(parser)
    group = parser.add_argument_group("needle")
    group.add_argument("--haystack", nargs="+", required=True, metavar="PATH", help="UTF-8 text files, or folders of "
                       ".txt files")  # fmt: skip
    group.add_argument("--needle", default=NEEDLE, metavar="TEXT", help="the sentence to hide (default: %(default)s)")
    group.add_argument("--question", default=QUESTION, metavar="TEXT", help="what to ask (default: %(default)s)")
    group.add_argument("--answer", metavar="TEXT", help="the expected answer, words of the needle (default: "
                       f"{ANSWER}; the whole --needle where that is given)")  # fmt: skip
    group.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer in tokens (default: "
                       "%(default)s)")  # fmt: skip


def main() -> None:
    evaluate(__doc__, add_arguments, partial(from_flags, Needle), plot="the recall by length and depth")


if __name__ == "__main__":
    run_main(main)
