"""Compare context methods on one base model: every method at every length, by perplexity or passkey accuracy.

    settings = read_comparison("script/evaluate/compare.yaml", {})
    result = compare(settings, output_file=Path("compare.json"))

A method is a few settings: how RoPE is scaled, which attention reads, or which adapter was trained. The
unit of work is a batch of windows or a passkey prompt, so a comparison that was killed goes on within a
cell, and torchrun splits it. The base model is loaded once; RoPE and attention are changed in place.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longqlora.cli import require_folder
from longqlora.evaluation.perplexity import PROTOCOLS, WindowPlan, batches, plan_windows
from longqlora.evaluation.retrieval.grid import even_depths
from longqlora.evaluation.retrieval.passkey import make_trials
from longqlora.inference.arguments import DTYPES
from longqlora.model.context_request import ATTENTIONS, ContextRequest
from longqlora.model.rope_scaling import ROPE_METHODS
from longqlora.settings.reader import input_path, read_yaml
from longqlora.settings.values import coerce

MEASURES = ("perplexity", "passkey")


@dataclass(frozen=True)
class Method:
    """One row of the comparison: None and "auto" leave a thing to the model's config.

    context_size: tokens that RoPE is scaled to; None scales it anew to each length that is measured, as
    ChunkLlama's table does, and leaves an adapter's own scaling alone.
    """

    peft_model: str | None = None
    rope_type: str | None = None
    rope_theta: float | None = None
    attention: str = "auto"
    context_size: int | None = None
    pretraining_length: int | None = None
    dca_chunk_size: int | None = None
    dca_local_window: int | None = None
    dca_mscale: bool = False

    def request(self, length: int) -> ContextRequest:
        """What reading `length` tokens asks of the model."""
        values = {name: getattr(self, name) for name in ContextRequest.__dataclass_fields__}
        if self.context_size is None and (self.rope_type is not None or self.attention == "dca"):
            values["context_size"] = length
        return ContextRequest(**values)


@dataclass
class Comparison:
    """The settings of a comparison, as its YAML has them; lengths, strides and windows in tokens."""

    base_model: str
    lengths: list
    methods: dict[str, Method]
    measure: str = "perplexity"
    data_path: str | None = None
    sliding_window: int = 256
    protocol: str = "longlora"
    max_windows: int | None = None
    batch_size: int = 1
    prefill_chunk_size: int | None = None
    num_depths: int = 5
    num_trials: int = 5
    num_digits: int = 5
    seed: int = 0
    dtype: str = field(default="auto", metadata={"choices": list(DTYPES)})
    load_in_4bit: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"measure: {self.measure!r} is not one of {', '.join(MEASURES)}")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol: {self.protocol!r} is not one of {', '.join(PROTOCOLS)}")
        if not self.lengths or any(type(length) is not int or length < 2 for length in self.lengths):
            raise ValueError(f"lengths: give one or more whole numbers of at least 2 tokens, got {self.lengths}")
        if self.measure == "perplexity" and not self.data_path:
            raise ValueError("data_path: perplexity needs a file of token ids (.bin), as tokenize_corpus.py writes it")
        if self.prefill_chunk_size is not None and self.prefill_chunk_size < 1:
            raise ValueError(f"prefill_chunk_size: must be at least 1 token, got {self.prefill_chunk_size}")
        for length in self.lengths:
            for name, method in self.methods.items():
                try:
                    method.request(length)
                except ValueError as error:
                    raise ValueError(f"methods: {name}: {error}") from None


def read_comparison(path: str, overrides: Mapping[str, str]) -> Comparison:
    """Settings of the YAML at `path`, with `overrides` (key -> text) in place of some. ValueError names a bad key."""
    values = {**read_yaml(Path(path)), **overrides}
    fields = {item.name: item for item in dataclasses.fields(Comparison)}
    check_keys(values, fields, "")
    for name in ("base_model", "lengths", "methods"):
        if values.get(name) is None:
            raise ValueError(f"{name}: missing; the comparison needs it")
    methods = values.pop("methods")
    if not isinstance(methods, dict) or not methods:
        raise ValueError("methods: give a mapping of names to settings, as in  PI: {rope_type: linear}")
    given = {key: coerce(key, value, fields[key].type, fields[key].metadata.get("choices"))
             for key, value in values.items()}  # fmt: skip
    given["base_model"] = input_path("model_name_or_path", given["base_model"])
    if given.get("data_path"):
        given["data_path"] = input_path("data_path", given["data_path"])
    return Comparison(**given, methods={str(name): read_method(str(name), of) for name, of in methods.items()})


def read_method(name: str, values: object) -> Method:
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"methods: {name}: give a mapping of settings, or {{}} for the model as it is")
    fields = {item.name: item for item in dataclasses.fields(Method)}
    check_keys(values or {}, fields, f"methods: {name}: ")
    choices = {"rope_type": list(ROPE_METHODS), "attention": ATTENTIONS}
    given = {key: coerce(f"methods: {name}: {key}", value, fields[key].type, choices.get(key))
             for key, value in (values or {}).items()}  # fmt: skip
    if given.get("peft_model"):
        folder = input_path("model_name_or_path", given["peft_model"])
        given["peft_model"] = str(require_folder(folder, f"methods: {name}: peft_model"))
    return Method(**given)


def check_keys(values: Mapping, known: Mapping, where: str) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"{where}{key}: unknown setting; the settings are {', '.join(known)}")


def plans_of(settings: Comparison, num_tokens: int) -> dict[int, WindowPlan]:
    """The windows of each length, the same for all methods."""
    options = {
        "stride": settings.sliding_window,
        "protocol": settings.protocol,
        "max_windows": settings.max_windows,
    }
    return {length: plan_windows(num_tokens, seq_len=length, **options) for length in sorted(set(settings.lengths))}


def perplexity_trials(settings: Comparison, plans: Mapping[int, WindowPlan]) -> list[dict]:
    """A trial for each method, length and batch of windows (their numbers in the plan)."""
    return [
        {"method": name, "length": length, "windows": batch}
        for name in settings.methods
        for length, plan in plans.items()
        for batch in batches(plan.windows, settings.batch_size)
    ]


def passkey_trials(settings: Comparison) -> list[dict]:
    """A trial for each method, length, depth and key; every method is asked the same keys."""
    depths = even_depths(settings.num_depths)
    lengths = sorted(set(settings.lengths))
    trials = make_trials(lengths, depths, settings.num_trials, settings.seed, num_digits=settings.num_digits)
    return [{"method": name, **trial} for name in settings.methods for trial in trials]


def table(rows: Mapping[str, Mapping[int, float | None]], lengths: Sequence[int], digits: int) -> str:
    """Text table: a row for each method, a column for each length; a dash where there is no finite number."""
    cells = [["method", *map(str, lengths)]]
    for name, by_length in rows.items():
        shown = [by_length.get(length) for length in lengths]
        cells.append([name, *("-" if value is None else f"{value:.{digits}f}" for value in shown)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ([row[0].ljust(widths[0])] + [text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True)]
             for row in cells)  # fmt: skip
    return "\n".join("  ".join(line) for line in lines)
