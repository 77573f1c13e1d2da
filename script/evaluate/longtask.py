r"""Score a model's answers to questions about long texts: F1, ROUGE, exact match, multiple choice.

    python script/evaluate/longtask.py --model_name_or_path output/merged --data_path qasper.jsonl gov_report.jsonl \
        --output_file longtask.json --plot longtask.png
    torchrun --nproc_per_node 2 script/evaluate/longtask.py ...        # the same numbers from two processes

Rows are {"context", "question", "references"}, or with "options" and "answer" a multiple choice; rows of LongBench and
L-Eval are read as they are (data/README.md). Answers are greedy. A text that is longer than the context
loses its middle, which the result says for each row. Scores are between 0 and 1. With --output_file a killed run goes
on where it stopped when it is started again with the same arguments.
"""

import argparse
from functools import partial

from longqlora.cli import run_main
from longqlora.evaluation.frame import evaluate, from_flags
from longqlora.evaluation.longtask.scores import METRICS
from longqlora.evaluation.longtask.task import LongTask
from longqlora.inference.arguments import add_template_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_path", nargs="+", required=True, metavar="PATH", help="jsonl files of questions")
    parser.add_argument("--metric", choices=("auto", *METRICS), default="auto",
                        help="auto: what the row names, else accuracy for options, rougeL for long references and f1 "
                        "for short ones (default: auto)")  # fmt: skip
    parser.add_argument("--max_rows", type=int, metavar="N", help="the first N rows of each file (default: all)")
    parser.add_argument("--max_new_tokens", type=int, default=128,
                        help="longest answer in tokens; prompts leave room for it (default: %(default)s)")  # fmt: skip
    parser.add_argument("--num_shots", type=int, default=0, metavar="N",
                        help="examples with answers before each question (default: %(default)s)")  # fmt: skip
    parser.add_argument("--shots_file", metavar="PATH", help="jsonl file of the examples; the context may be missing")
    add_template_argument(parser)


def main() -> None:
    evaluate(__doc__, add_arguments, partial(from_flags, LongTask), plot="scores by task and by length")


if __name__ == "__main__":
    run_main(main)
