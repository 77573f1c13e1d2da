"""The frame of every evaluation: flags, a model, resumable trials, then a table, a JSON file and a plot.

A new evaluation is one file with a `Task`, and a script that makes it from flags:

    def main() -> None:
        evaluate(__doc__, add_arguments, make_task, plot="the score by length")

torch is imported after the flags are checked, which keeps --help and bad input fast.
"""

import argparse
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from longqlora.files import write_json
from longqlora.inference.arguments import add_model_arguments, check_model_arguments, load_from_arguments, model_sources
from longqlora.inference.generation import template_for
from longqlora.model.context_request import context_request
from longqlora.outputs import check_results


@dataclass(frozen=True)
class ModelSource:
    """A model before its weights are loaded: what it takes to make trials and to refuse bad ones. Lengths in tokens."""

    tokenizer: Any
    config: Any
    base_model_name_or_path: str
    adapter_name_or_path: str | None
    context_size: int
    longest_input: float

    def template(self, requested: str) -> str:
        """The prompt template that --prompt_template means; raw text where auto finds none."""
        return template_for(requested, self)

    def warn_beyond_context(self, lengths: Sequence[int]) -> None:
        from longqlora.distributed import print_main

        for length in lengths:
            if length > self.longest_input:
                print_main(f"warning: length {length} is beyond the model's context of {self.context_size} tokens")


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
    """Raise ValueError for an attribute of `given`, named as its flag, that is below its least value and not None."""
    for name, minimum in least.items():
        value = getattr(given, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{name}: must be at least {minimum}, got {value}")


def check_lengths(lengths: Sequence[int]) -> None:
    if lengths and min(lengths) < 1:
        raise ValueError(f"--lengths: must be at least 1 token, got {min(lengths)}")


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
    """The main of a script that evaluates one model.

    add_arguments: declares the task's own flags. make_task: makes it from what was parsed; raises ValueError. plot:
    what --plot draws.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_arguments(parser)
    add_result_arguments(parser, plot)
    args = parser.parse_args()
    if args.context_size == -1:
        # So upstream's commands write the model's own context.
        args.context_size = None
    check_model_arguments(args)
    task = make_task(args)
    check_results(args, {**task.inputs, **model_sources(args)})

    from longqlora.distributed import init_process_group
    from longqlora.inference.load import model_facts, model_fingerprint

    parts = task.make_trials(read_source(args))
    init_process_group()
    loaded = load_from_arguments(args)
    task.use(loaded)
    name = Path(args.adapter_name_or_path or args.model_name_or_path).resolve().name
    run_task(task, parts, args, name=name, fingerprint=model_fingerprint(loaded), facts=model_facts(loaded))


def read_source(args: argparse.Namespace) -> ModelSource:
    """Tokenizer, config and lengths of the model that the arguments name."""
    from longqlora.attention.dual_chunk_binding import dual_chunk_sizes
    from longqlora.model.base import load_tokenizer
    from longqlora.model.context import context_length, resolve_config, tokenizer_source

    name, adapter = args.model_name_or_path, args.adapter_name_or_path
    try:
        base, config = resolve_config(name, adapter, context_request(args), trust_remote_code=args.trust_remote_code)
        # Prompts may be longer than the context, about which the tokenizer would warn.
        tokenizer = load_tokenizer(
            tokenizer_source(base, adapter), model_max_length=10**12, trust_remote_code=args.trust_remote_code
        )
    except OSError as error:
        # The hub's own message need not say which name it could not find.
        raise ValueError(f"cannot load {name or adapter!r}: {error}") from None
    length = context_length(config)
    longest = length if dual_chunk_sizes(config) is None else math.inf
    return ModelSource(tokenizer, config, base, adapter, length, longest)


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
