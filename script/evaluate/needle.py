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
from pathlib import Path

from longqlora.cli import run_main
from longqlora.evaluation.retrieval.grid import (
    add_grid_arguments,
    context_warnings,
    grid_depths,
    grid_lengths,
    grid_table,
)
from longqlora.evaluation.retrieval.haystack import read_haystack
from longqlora.evaluation.retrieval.needle import ANSWER, MAX_NEW_TOKENS, NEEDLE, QUESTION, NeedleTask, contains
from longqlora.inference.arguments import (
    TEMPLATE_NAMES,
    add_model_arguments,
    check_model_arguments,
    load_from_arguments,
    model_sources,
    text_template,
)
from longqlora.inference.generation import NO_TEMPLATE
from longqlora.outputs import check_results


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_grid_arguments(parser)
    group = parser.add_argument_group("needle")
    group.add_argument("--haystack", nargs="+", required=True, metavar="PATH", help="UTF-8 text files, or folders of "
                       ".txt files")  # fmt: skip
    group.add_argument("--needle", default=NEEDLE, metavar="TEXT", help="the sentence to hide (default: %(default)s)")
    group.add_argument("--question", default=QUESTION, metavar="TEXT", help="what to ask (default: %(default)s)")
    group.add_argument("--answer", metavar="TEXT", help="the expected answer, words of the needle (default: "
                       f"{ANSWER}; the whole --needle where that is given)")  # fmt: skip
    group.add_argument("--prompt_template", choices=TEMPLATE_NAMES, default="auto", help="none is raw text; auto is "
                       "the template the model was tuned with, as far as its run record or tokenizer tell, and else "
                       "none (default: auto)")  # fmt: skip
    group.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer in tokens (default: "
                       "%(default)s)")  # fmt: skip
    return parser.parse_args()


def needle_task(args: argparse.Namespace, template: str) -> NeedleTask:
    """The task that the arguments describe; raises ValueError for what cannot be asked or scored."""
    answer = args.answer if args.answer is not None else (ANSWER if args.needle == NEEDLE else args.needle)
    return NeedleTask(args.needle, args.question, answer, template, args.max_new_tokens)


def check_args(args: argparse.Namespace) -> list[float]:
    """Refuse what cannot work before anything heavy is imported; returns the depths."""
    check_model_arguments(args)
    needle_task(args, NO_TEMPLATE)
    if args.needle != NEEDLE and args.question == QUESTION:
        raise ValueError("--question: your own --needle needs a question of its own")
    depths = grid_depths(args)
    sources = model_sources(args.model_name_or_path, args.adapter_name_or_path)
    check_results(args, {"--haystack": args.haystack, **sources})
    return depths


def evaluate(args: argparse.Namespace, depths: list[float], text: str) -> None:
    """Load the model, ask it and write the results."""
    import torch

    from longqlora.distributed import init_process_group, is_main_process, print_main
    from longqlora.evaluation.retrieval.needle import evaluate_needle
    from longqlora.evaluation.trials import finish_trials
    from longqlora.files import write_json
    from longqlora.inference.load import model_facts, model_fingerprint

    init_process_group()
    loaded = load_from_arguments(args)
    template = text_template(args, loaded)
    task = needle_task(args, template)
    lengths = grid_lengths(args, loaded.context_size)
    for warning in context_warnings(lengths, loaded.longest_input):
        print_main(warning)
    if contains(task.answer, text):
        print_main("warning: the haystack itself contains the answer, so that finding it says little")
    result = evaluate_needle(
        loaded,
        task,
        text,
        lengths=lengths,
        depths=depths,
        output_file=args.output_file,
        fingerprint=model_fingerprint(loaded),
    )
    cells = result["cells"]
    for length in lengths:
        num_repeats = max(cell["num_repeats"] for cell in cells if cell["length"] == length)
        if num_repeats > 1:
            print_main(f"note: length {length}: the haystack is shorter and was used {num_repeats} times in a row")
    num_contained = sum(cell["is_contained"] for cell in cells)
    print_main(f"recall of the answer's words in percent, by depth and prompt length; the whole answer in "
               f"{num_contained} of {len(cells)}\n{grid_table(cells, 'score')}")  # fmt: skip
    if is_main_process():
        if args.output_file:
            write_json(args.output_file, {**result, "haystack_files": args.haystack, **model_facts(loaded)})
            print_main(f"wrote {args.output_file}")
        if args.plot:
            from longqlora.evaluation.retrieval.heatmap import plot_heatmap

            name = Path(args.adapter_name_or_path or args.model_name_or_path).resolve().name
            plot_heatmap({name: cells}, args.plot, value="score", label="recall of the answer's words")
            print_main(f"wrote {args.plot}")
    finish_trials(args.output_file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    args = parse_args()
    depths = check_args(args)
    evaluate(args, depths, read_haystack(args.haystack))


if __name__ == "__main__":
    run_main(main)
