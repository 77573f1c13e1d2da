"""The frame of every evaluation: flags, a model, resumable trials, then a table, a JSON file and a plot.

A new evaluation is one file with a `Task`, and a script that makes it from flags:

    def main() -> None:
        evaluate(__doc__, add_arguments, make_task, plot="the score by length")

torch is imported after the flags are checked, which keeps --help and bad input fast.
"""

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from longqlora.files import write_json
from longqlora.inference.arguments import load_from_arguments, model_sources, parse, source_from_arguments
from longqlora.inference.source import ModelSource
from longqlora.outputs import check_results


class Task(ABC):
    """One evaluation: what a model is asked, and how its answers become numbers.

    name: label of the progress bar. inputs: paths that it reads, by the flag that gave them. settings: JSON-ready facts
    that decide a result, beside trial and model; complete after `make_trials`.
    """

    name: str
    inputs: Mapping[str, object] = {}
    settings: Mapping[str, object] = {}
    loaded: Any = None

    @abstractmethod
    def make_trials(self, source: ModelSource) -> list[list[Mapping]]:
        """The trials in parts, each reported when it is done. Raises ValueError for what the model cannot be asked."""

    def use(self, loaded) -> None:
        """Take the model (longqlora.inference.load.LoadedModel) that the trials are asked of."""
        self.loaded = loaded

    @abstractmethod
    def ask(self, trial: Mapping) -> dict:
        """The JSON-ready result of one trial."""

    @abstractmethod
    def score(self, results: Sequence[dict]) -> dict:
        """The results of one part or of all, in trial order, as the record of the result file."""

    @abstractmethod
    def table(self, record: Mapping) -> str:
        """The record as text."""

    @abstractmethod
    def plot(self, record: Mapping, name: str, path: str) -> None:
        """Draw the record of the model `name` into an image file."""


def add_result_arguments(parser: argparse.ArgumentParser, plot: str) -> None:
    """--output_file and --plot; `plot` says what is drawn."""
    group = parser.add_argument_group("results")
    group.add_argument("--output_file", type=Path, help="JSON file for the results; also makes the run resumable")
    group.add_argument("--plot", help=f"image (.png, .pdf or .svg) of {plot}")


def check_at_least(given: object, **least: int) -> None:
    """Raise ValueError for an attribute of `given`, named as its flag, that is or holds less than its least value."""
    for name, minimum in least.items():
        value = getattr(given, name)
        for number in value if isinstance(value, Sequence) else [value]:
            if number is not None and number < minimum:
                raise ValueError(f"--{name}: must be at least {minimum}, got {number}")


def from_flags(kind: type, args: argparse.Namespace, **others: object) -> Any:
    """The dataclass `kind` of the flags with the names of its fields, and of `others`."""
    names = [field.name for field in fields(kind) if field.name not in others]
    return kind(**{name: getattr(args, name) for name in names}, **others)


def evaluate(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    make_task: Callable[[argparse.Namespace], Task],
    *,
    plot: str,
) -> None:
    """The main of a script that evaluates one model; make_task may raise ValueError, `plot` says what --plot draws."""
    args = parse(description, add_arguments, partial(add_result_arguments, plot=plot))
    task = make_task(args)
    check_results(args, {**task.inputs, **model_sources(args)})

    from longqlora.distributed import init_process_group
    from longqlora.inference.load import model_facts, model_fingerprint

    source = source_from_arguments(args)
    parts = task.make_trials(source)
    init_process_group()
    loaded = load_from_arguments(args, source)
    task.use(loaded)
    name = Path(args.adapter_name_or_path or args.model_name_or_path).resolve().name
    run_task(task, parts, args, name=name, fingerprint=model_fingerprint(loaded), facts=model_facts(loaded))


def run_task(
    task: Task, parts: list[list[Mapping]], args: argparse.Namespace, *, name: str, fingerprint: Mapping, facts: Mapping
) -> None:
    """Ask all trials, print each part's table, and write --output_file and --plot on rank 0.

    name: of the model, for the plot. fingerprint, facts: what decides a result, and what the result file says, of the
    model.
    """
    import torch.distributed

    from longqlora.distributed import is_main_process, print_main
    from longqlora.evaluation.trials import finish_trials, run_trials

    results: list[dict] = []
    for part in parts:
        decisive = {"model": fingerprint, "settings": task.settings}
        done = run_trials(part, task.ask, output_file=args.output_file, fingerprint=decisive, desc=task.name)
        print_main(task.table(task.score(done)))
        results += done
    if is_main_process():
        record = task.score(results)
        if args.output_file:
            write_json(args.output_file, json_safe({**record, **facts}))
            print_main(f"wrote {args.output_file}")
        if args.plot:
            task.plot(record, name, args.plot)
            print_main(f"wrote {args.plot}")
    finish_trials(args.output_file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def json_safe(value: Any) -> Any:
    """`value` as JSON gives it back, with None for the numbers that it cannot hold (inf, nan)."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)
