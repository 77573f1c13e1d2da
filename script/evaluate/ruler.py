r"""Measure a model on RULER's synthetic long-context tasks, and on any task of lm-evaluation-harness.

    python script/evaluate/ruler.py --model_name_or_path output/merged --lengths 4096 8192 16384 \
        --output_file ruler.json --plot ruler.png
    python script/evaluate/ruler.py --adapter_name_or_path output/run/final --tasks niah_single_2 vt --haystack book.txt
    python script/evaluate/ruler.py --model_name_or_path MODEL --tasks my_task --include_path my_tasks/
    torchrun --nproc_per_node 2 script/evaluate/ruler.py ...     # tasks and lengths shared out

RULER's tasks (--list_tasks; arXiv 2404.06654) are made here, without a network: samples of an exact length in
the model's tokens, the answer's room included, the same for every model with that tokenizer and seed. Any other
name is a task, group or tag of lm-evaluation-harness; its data comes from the hub, this machine's cache or the
files that your own task file names. Scores are percent of the expected strings that were found.

With --output_file every finished task and length is kept, and a killed run goes on with the next one.
"""

import argparse
import os
from importlib import metadata
from pathlib import Path

from longqlora.cli import go_offline_unless_reachable, require_extra, require_folder, run_main
from longqlora.evaluation.perplexity import json_safe
from longqlora.evaluation.ruler.task import (
    PROTOCOL,
    fit_task,
    make_samples,
    mean_by_length,
    metric_table,
    plot_scores,
    read_haystack,
    ruler_result,
    score_table,
)
from longqlora.evaluation.ruler.tasks import TASKS, check_tasks, default_tasks, describe_tasks
from longqlora.files import write_json
from longqlora.inference.arguments import (
    add_model_arguments,
    check_model_arguments,
    load_from_arguments,
    model_sources,
)
from longqlora.model.context_arguments import context_request
from longqlora.outputs import check_results


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    group = parser.add_argument_group("tasks")
    group.add_argument("--tasks", nargs="+", metavar="NAME", help=f"RULER's: {', '.join(TASKS)}; any other name is a "
                       "task, group or tag of lm-eval (default: RULER's; some need --haystack)")  # fmt: skip
    group.add_argument("--list_tasks", action="store_true", help="describe RULER's tasks and exit")
    group.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="lengths of RULER's samples, the "
                       "answer's room included (default: the model's context)")  # fmt: skip
    group.add_argument("--num_samples", type=int, default=100, help="samples per RULER task and length; the paper "
                       "takes 500 (default: %(default)s)")  # fmt: skip
    group.add_argument("--haystack", nargs="+", default=[], metavar="PATH", help="UTF-8 text files to hide needles in, "
                       "where RULER takes essays (default: noise sentences, and no niah_single_2 and 3)")  # fmt: skip
    group.add_argument("--max_new_tokens", type=int, help="room for an answer in tokens (default: the task's own)")
    group.add_argument("--include_path", type=Path, metavar="FOLDER", help="folder of your own lm-eval task files "
                       "(default: none)")  # fmt: skip
    group.add_argument("--num_fewshot", type=int, help="examples before each question of lm-eval's tasks (default: "
                       "the task's own number)")  # fmt: skip
    group.add_argument("--limit", type=int, help="samples per task of lm-eval (default: all)")
    group.add_argument("--seed", type=int, default=42, help="decides the samples (default: %(default)s)")
    group.add_argument("--batch_size", type=int, default=1, help="prompts at once (default: %(default)s)")
    group.add_argument("--output_file", type=Path, help="JSON file for the results; also makes the run resumable")
    group.add_argument("--plot", help="image (.png, .pdf or .svg) of RULER's scores by length")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    check_model_arguments(args)
    least = {"num_samples": 1, "max_new_tokens": 1, "num_fewshot": 0, "limit": 1, "seed": 0, "batch_size": 1}
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{name}: must be at least {minimum}, got {value}")
    if args.lengths and min(args.lengths) < 1:
        raise ValueError(f"--lengths: must be at least 1 token, got {min(args.lengths)}")
    args.tasks = list(dict.fromkeys(args.tasks or default_tasks(has_text=bool(args.haystack))))
    check_tasks(args.tasks, has_text=bool(args.haystack))
    is_ruler = [name in TASKS for name in args.tasks]
    if args.include_path:
        require_folder(args.include_path, "--include_path")
    if args.plot and not any(is_ruler):
        raise ValueError("--plot draws RULER's scores by length; name one of its tasks (--list_tasks)")
    check_uses(args, ("limit", "num_fewshot", "include_path"), "lm-eval's tasks", is_used=not all(is_ruler))
    check_uses(args, ("lengths", "haystack"), "RULER's tasks", is_used=any(is_ruler))
    sources = model_sources(args.model_name_or_path, args.adapter_name_or_path)
    check_results(args, {"--haystack": args.haystack, "--include_path": args.include_path, **sources})
    require_extra("lm_eval", "lm-eval")


def check_uses(args: argparse.Namespace, names: tuple[str, ...], tasks: str, *, is_used: bool) -> None:
    """Refuse an argument that the tasks to run do not read."""
    for name in names:
        if not is_used and getattr(args, name) not in (None, []):
            raise ValueError(
                f"--{name} is for {tasks}, and --tasks names none; leave it out (see --num_samples, --tasks)"
            )


def read_tokenizer(args: argparse.Namespace):
    """Tokenizer and context in tokens of the model that the arguments name, without its weights."""
    from longqlora.model.base import load_tokenizer
    from longqlora.model.context import context_length, resolve_config, tokenizer_source

    adapter = args.adapter_name_or_path
    try:
        base, config = resolve_config(
            args.model_name_or_path, adapter, context_request(args), trust_remote_code=args.trust_remote_code
        )
        # Samples may be longer than the context, about which the tokenizer would warn.
        tokenizer = load_tokenizer(
            tokenizer_source(base, adapter), model_max_length=10**12, trust_remote_code=args.trust_remote_code
        )
    except OSError as error:
        raise ValueError(f"cannot load {args.model_name_or_path or adapter!r}: {error}") from None
    return tokenizer, context_length(config)


def fit_tasks(args: argparse.Namespace, text, count_tokens, context_size: int) -> dict:
    """(task, length) -> RULER's task fitted to that length."""
    from longqlora.distributed import print_main

    names, lengths = [name for name in args.tasks if name in TASKS], sorted(set(args.lengths or [context_size]))
    if names and lengths[-1] > context_size:
        print_main(f"warning: length {lengths[-1]} is beyond the model's context of {context_size} tokens")
    options = {"num_samples": args.num_samples, "max_new_tokens": args.max_new_tokens, "seed": args.seed, "text": text}
    return {(name, length): fit_task(name, length, count_tokens, **options) for name in names for length in lengths}


def read_other_tasks(args: argparse.Namespace, context_size: int) -> dict:
    """Name -> loaded tasks of lm-eval."""
    from longqlora.evaluation.harness import check_fit, load_tasks, set_answer_tokens

    # For those tasks of lm-eval that make their data themselves.
    given = {"tokenizer": args.model_name_or_path or args.adapter_name_or_path}
    if args.lengths:
        given["max_seq_lengths"] = sorted(set(args.lengths))
    names = [name for name in args.tasks if name not in TASKS]
    others = load_tasks(names, include_path=args.include_path, metadata=given)
    for name, tasks in others.items():
        if args.max_new_tokens is not None:
            set_answer_tokens(tasks, args.max_new_tokens)
        check_fit(name, tasks, context_size=context_size)
    return others


def measure(args: argparse.Namespace, text, text_facts: dict | None) -> None:
    """Fit the samples, read the other tasks, then load the model and run what is not done yet."""
    from longqlora.distributed import gather_objects, init_process_group
    from longqlora.evaluation.harness import data_state, evaluate_tasks, generate_answers, wrap_model
    from longqlora.evaluation.trials import run_trials
    from longqlora.inference.load import model_fingerprint

    tokenizer, context_size = read_tokenizer(args)

    def count_tokens(prompt: str) -> int:
        return len(tokenizer(prompt).input_ids)

    fitted = fit_tasks(args, text, count_tokens, context_size)
    others = read_other_tasks(args, context_size)
    init_process_group()
    loaded = load_from_arguments(args)
    longest = max([context_size, *(length for _, length in fitted)])
    model = wrap_model(loaded, batch_size=args.batch_size, max_length=longest)

    def run_one(trial) -> dict:
        name, length = trial["task"], trial["length"]
        if length is None:
            options = {"num_fewshot": args.num_fewshot, "limit": args.limit, "seed": args.seed}
            return {"task": name, **evaluate_tasks(model, name, others[name], **options)}
        samples = make_samples(fitted[name, length], count_tokens)
        prompts = [sample.prompt for sample, _ in samples]
        room = fitted[name, length].max_new_tokens
        answers = generate_answers(model, f"{name}_{length}", prompts, max_new_tokens=room)
        return ruler_result(fitted[name, length], samples, answers)

    settings = run_settings(args, text_facts)
    fingerprint = {
        "model": model_fingerprint(loaded),
        # Which tasks and lengths a run asks for does not change the result of one.
        "settings": {name: value for name, value in settings.items() if name not in ("tasks", "lengths")},
        "data": {name: data_state(tasks) for name, tasks in others.items()},
    }
    trials = [{"task": name, "length": length} for name, length in [*fitted, *((name, None) for name in others)]]
    # Some data sets have a fingerprint that differs between processes.
    decisive = gather_objects(fingerprint)[0]
    results = run_trials(trials, run_one, output_file=args.output_file, fingerprint=decisive, desc="tasks and lengths")
    finish(args, loaded, settings, results)


def run_settings(args: argparse.Namespace, text_facts: dict | None) -> dict:
    """What the user chose, as the result file tells it."""
    names = ("tasks", "lengths", "num_samples", "max_new_tokens", "num_fewshot", "limit", "seed", "batch_size")
    return {
        **{name: getattr(args, name) for name in names},
        "haystack": text_facts,
        "include_path": str(args.include_path) if args.include_path else None,
        "lm_eval": metadata.version("lm_eval"),
    }


def finish(args: argparse.Namespace, loaded, settings: dict, results: list[dict]) -> None:
    """Print and write the results on rank 0, then drop what was kept for resuming."""
    import torch

    from longqlora.distributed import is_main_process, print_main
    from longqlora.evaluation.trials import finish_trials
    from longqlora.inference.load import model_facts

    of_ruler = [result for result in results if "length" in result]
    of_lm_eval = [result for result in results if "length" not in result]
    if of_ruler:
        print_main(score_table(of_ruler))
    if of_lm_eval:
        print_main(metric_table(of_lm_eval))
    if is_main_process() and args.output_file:
        means = {"mean": mean_by_length(of_ruler)} if of_ruler else {}
        record = {"protocol": PROTOCOL, "settings": settings, **means, "results": results, **model_facts(loaded)}
        write_json(args.output_file, json_safe(record))
        print_main(f"wrote {args.output_file}")
    if is_main_process() and args.plot:
        plot_scores(of_ruler, args.plot)
        print_main(f"wrote {args.plot}")
    finish_trials(args.output_file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    args = parse_args()
    if args.list_tasks:
        print(describe_tasks())
        return
    check_args(args)
    haystack = read_haystack(args.haystack)
    # Read at import: hides the harness' unnamed bars; those that say what they count are shown all the same.
    os.environ.setdefault("TQDM_DISABLE", "1")
    if any(name not in TASKS for name in args.tasks):
        go_offline_unless_reachable()
    measure(args, *haystack)


if __name__ == "__main__":
    run_main(main)
