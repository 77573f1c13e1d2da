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
from pathlib import Path

from longqlora.cli import run_main
from longqlora.evaluation.retrieval.grid import (
    add_grid_arguments,
    context_warnings,
    grid_depths,
    grid_lengths,
    grid_table,
)
from longqlora.evaluation.retrieval.passkey import make_trials
from longqlora.inference.arguments import (
    add_model_arguments,
    check_model_arguments,
    load_from_arguments,
    model_sources,
)
from longqlora.outputs import check_results


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_grid_arguments(parser)
    parser.add_argument("--num_trials", type=int, default=5, help="keys for each length and depth (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--num_digits", type=int, default=5, help="digits of a key (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides the keys (default: %(default)s)")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> list[float]:
    """Refuse what cannot work before anything heavy is imported; returns the depths."""
    check_model_arguments(args)
    depths = grid_depths(args)
    make_trials(args.lengths or [1], depths, args.num_trials, args.seed, num_digits=args.num_digits)
    check_results(args, model_sources(args.model_name_or_path, args.adapter_name_or_path))
    return depths


def evaluate(args: argparse.Namespace, depths: list[float]) -> None:
    """Load the model, ask it and write the results."""
    import torch

    from longqlora.distributed import init_process_group, is_main_process, print_main
    from longqlora.evaluation.retrieval.passkey import evaluate_passkey
    from longqlora.evaluation.trials import finish_trials
    from longqlora.files import write_json
    from longqlora.inference.load import model_facts, model_fingerprint

    init_process_group()
    loaded = load_from_arguments(args)
    lengths = grid_lengths(args, loaded.context_size)
    for warning in context_warnings(lengths, loaded.longest_input):
        print_main(warning)
    result = evaluate_passkey(
        loaded,
        lengths=lengths,
        depths=depths,
        num_trials=args.num_trials,
        num_digits=args.num_digits,
        seed=args.seed,
        output_file=args.output_file,
        fingerprint=model_fingerprint(loaded),
    )
    print_main(f"accuracy in percent of {args.num_trials} trials, by depth and prompt length\n"
               f"{grid_table(result['cells'], 'accuracy')}")  # fmt: skip
    if is_main_process():
        if args.output_file:
            write_json(args.output_file, {**result, **model_facts(loaded)})
            print_main(f"wrote {args.output_file}")
        if args.plot:
            from longqlora.evaluation.retrieval.heatmap import plot_heatmap

            name = Path(args.adapter_name_or_path or args.model_name_or_path).resolve().name
            plot_heatmap({name: result["cells"]}, args.plot, label="passkey accuracy")
            print_main(f"wrote {args.plot}")
    finish_trials(args.output_file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    args = parse_args()
    depths = check_args(args)
    evaluate(args, depths)


if __name__ == "__main__":
    run_main(main)
