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
from pathlib import Path

from longqlora.cli import go_offline_unless_reachable, require_extra, require_folder, run_main
from longqlora.evaluation.frame import Task, check_at_least, evaluate, from_flags
from longqlora.evaluation.ruler.tasks import TASKS, describe_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tasks")
    group.add_argument("--tasks", nargs="+", metavar="NAME", help=f"RULER's: {', '.join(TASKS)}; any other name is a "
                       "task, group or tag of lm-eval (default: RULER's; some need --haystack)")  # fmt: skip
    group.add_argument("--list_tasks", action="version", version=describe_tasks(), help="describe RULER's tasks and "
                       "exit")  # fmt: skip
    group.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="lengths of RULER's samples, the "
                       "answer's room included (default: the model's context)")  # fmt: skip
    group.add_argument("--num_samples", type=int, default=100, help="samples per RULER task and length; the paper "
                       "takes 500 (default: %(default)s)")  # fmt: skip
    group.add_argument("--haystack", nargs="+", default=[], metavar="PATH", help="UTF-8 text files, or folders of .txt "
                       "files, to hide needles in, where RULER takes essays (default: noise sentences, and no "
                       "niah_single_2 and 3)")  # fmt: skip
    group.add_argument("--max_new_tokens", type=int, help="room for an answer in tokens (default: the task's own)")
    group.add_argument("--include_path", type=Path, metavar="FOLDER", help="folder of your own lm-eval task files "
                       "(default: none)")  # fmt: skip
    group.add_argument("--num_fewshot", type=int, help="examples before each question of lm-eval's tasks (default: "
                       "the task's own number)")  # fmt: skip
    group.add_argument("--limit", type=int, help="samples per task of lm-eval (default: all)")
    group.add_argument("--seed", type=int, default=42, help="decides the samples (default: %(default)s)")
    group.add_argument("--batch_size", type=int, default=1, help="prompts at once (default: %(default)s)")


def make_task(args: argparse.Namespace) -> Task:
    check_at_least(args, lengths=1, num_samples=1, max_new_tokens=1, num_fewshot=0, limit=1, seed=0, batch_size=1)
    default_tasks = [name for name, task in TASKS.items() if args.haystack or not task.needs_text]
    args.tasks = list(dict.fromkeys(args.tasks or default_tasks))
    is_ruler = [name in TASKS for name in args.tasks]
    if args.include_path:
        require_folder(args.include_path, "--include_path")
    if args.plot and not any(is_ruler):
        raise ValueError("--plot draws RULER's scores by length; name one of its tasks (--list_tasks)")
    check_uses(args, ("limit", "num_fewshot", "include_path"), "lm-eval's tasks", is_used=not all(is_ruler))
    check_uses(args, ("lengths", "haystack"), "RULER's tasks", is_used=any(is_ruler))
    require_extra("lm_eval", "lm-eval", extra="eval")
    # Read at import: hides the harness' unnamed bars; those that say what they count are shown all the same.
    os.environ.setdefault("TQDM_DISABLE", "1")
    if not all(is_ruler):
        go_offline_unless_reachable()

    from longqlora.evaluation.ruler.task import Ruler

    return from_flags(Ruler, args)


def check_uses(args: argparse.Namespace, names: tuple[str, ...], tasks: str, *, is_used: bool) -> None:
    """Refuse an argument that the tasks to run do not read."""
    for name in names:
        if not is_used and getattr(args, name) not in (None, []):
            raise ValueError(
                f"--{name} is for {tasks}, and --tasks names none; leave it out (see --num_samples, --tasks)"
            )


def main() -> None:
    evaluate(__doc__, add_arguments, make_task, plot="RULER's scores by length")


if __name__ == "__main__":
    run_main(main)
