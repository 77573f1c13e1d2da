"""Compare context methods on one base model: every method at every length, by perplexity or passkey accuracy.

    comparison = Comparison(read_comparison("script/evaluate/compare.yaml", {}))
    run_task(comparison, comparison.make_trials(), args, name="", fingerprint={}, facts={})

A method is a few settings: how RoPE is scaled, which attention reads, or which adapter was trained. The base model is
loaded once; RoPE and attention are changed in place. A trial is a batch of windows or a passkey prompt of one method,
so a comparison that was killed goes on within a cell, and torchrun splits it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from longqlora.attention.binding import describe_inference_attention
from longqlora.cli import DTYPES, dtype_of, require_folder
from longqlora.data.token_file import open_token_file, sidecar_path
from longqlora.evaluation.frame import Task
from longqlora.evaluation.perplexity import PROTOCOLS
from longqlora.evaluation.perplexity_task import Windows
from longqlora.evaluation.retrieval.grid import even_depths, grid_cells, plot_heatmap
from longqlora.evaluation.retrieval.passkey import accuracy_cells, answer_trial, make_trials
from longqlora.evaluation.scoring import TokenScorer
from longqlora.inference.load import LoadedModel, folder_state, load_for_inference, set_context
from longqlora.model.context import context_length, resolve_config
from longqlora.model.context_request import ATTENTIONS, ContextRequest
from longqlora.model.rope_scaling import ROPE_METHODS
from longqlora.plot import draw_perplexity, new_figure
from longqlora.settings.reader import input_path, read_yaml
from longqlora.settings.values import coerce
from longqlora.table import grouped, text_table


def one_of(choices: Sequence[str], default: str | None) -> Any:
    return field(default=default, metadata={"choices": list(choices)})


@dataclass(frozen=True)
class Method:
    """One row of the comparison: None and "auto" leave a thing to the model's config.

    context_size: tokens that RoPE is scaled to; None scales it anew to each length that is measured, as
    ChunkLlama's table does, and leaves an adapter's own scaling alone.
    """

    peft_model: str | None = None
    rope_type: str | None = one_of(ROPE_METHODS, None)
    rope_theta: float | None = None
    attention: str = one_of(ATTENTIONS, "auto")
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
class ComparisonSettings:
    """The settings of a comparison, as its YAML has them; lengths, strides and windows in tokens."""

    base_model: str
    lengths: list
    methods: dict
    measure: str = one_of(("perplexity", "passkey"), "perplexity")
    data_path: str | None = None
    sliding_window: int = 256
    protocol: str = one_of(PROTOCOLS, "longlora")
    max_windows: int | None = None
    batch_size: int = 1
    prefill_chunk_size: int | None = None
    num_depths: int = 5
    num_trials: int = 5
    num_digits: int = 5
    seed: int = 0
    dtype: str = one_of(("auto", *DTYPES), "auto")
    load_in_4bit: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.lengths or any(type(length) is not int or length < 2 for length in self.lengths):
            raise ValueError(f"lengths: give one or more whole numbers of at least 2 tokens, got {self.lengths}")
        if self.measure == "perplexity" and not self.data_path:
            raise ValueError("data_path: perplexity needs a file of token ids (.bin), as tokenize_corpus.py writes it")
        if self.prefill_chunk_size is not None and self.prefill_chunk_size < 1:
            raise ValueError(f"prefill_chunk_size: must be at least 1 token, got {self.prefill_chunk_size}")
        self.lengths = sorted(set(self.lengths))
        self.base_model = input_path("model_name_or_path", self.base_model)
        if self.data_path:
            self.data_path = input_path("data_path", self.data_path)
        if not self.methods:
            raise ValueError("methods: give a mapping of names to settings, as in  PI: {rope_type: linear}")
        self.methods = {str(name): read_method(str(name), values) for name, values in self.methods.items()}


def read_comparison(path: str, overrides: Mapping[str, str]) -> ComparisonSettings:
    """Settings of the YAML at `path`, with `overrides` (key -> text) in place of some. ValueError names a bad key."""
    values = {**read_yaml(Path(path)), **overrides}
    for name in ("base_model", "lengths", "methods"):
        if values.get(name) is None:
            raise ValueError(f"{name}: missing; the comparison needs it")
    return read_fields(ComparisonSettings, values, "")


def read_method(name: str, values: object) -> Method:
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"methods: {name}: give a mapping of settings, or {{}} for the model as it is")
    method = read_fields(Method, values or {}, f"methods: {name}: ")
    if not method.peft_model:
        return method
    folder = input_path("model_name_or_path", method.peft_model)
    return dataclasses.replace(method, peft_model=str(require_folder(folder, f"methods: {name}: peft_model")))


def read_fields(kind: type, values: Mapping, where: str) -> Any:
    """The dataclass `kind` from `values`, each as the type of its field; `where` stands before a key in errors."""
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise ValueError(f"{where}{key}: unknown setting; the settings are {', '.join(fields)}")
    return kind(**{key: coerce(f"{where}{key}", value, fields[key].type, fields[key].metadata.get("choices"))
                   for key, value in values.items()})  # fmt: skip


class Comparison(Task):
    """Every method at every length. One model is in memory at a time; its context is changed in place."""

    name = "compare"

    def __init__(self, settings: ComparisonSettings):
        self.asked = settings
        self.is_perplexity = settings.measure == "perplexity"
        self.inputs = {"base_model": settings.base_model,
                       "peft_model": [method.peft_model for method in settings.methods.values()]}  # fmt: skip
        if settings.data_path:
            self.inputs["data_path"] = [settings.data_path, sidecar_path(settings.data_path)]
        self.scorer: TokenScorer | None = None
        self.current: tuple[str, int] | None = None

    @cached_property
    def windows(self) -> Windows:
        asked = self.asked
        data = open_token_file(asked.data_path)
        return Windows(data, asked.sliding_window, asked.protocol, asked.max_windows, asked.batch_size)

    @cached_property
    def models(self) -> dict[str, dict[int, dict]]:
        """{method: {length: context, RoPE and attention}}, from the configs alone.

        Raises ValueError, with the method's name, for one that the base model cannot be given.
        """
        names, lengths = self.asked.methods, self.asked.lengths
        return {name: {length: self.describe(name, length) for length in lengths} for name in names}

    def describe(self, name: str, length: int) -> dict:
        method, asked = self.asked.methods[name], self.asked
        try:
            _, config = resolve_config(asked.base_model, method.peft_model, method.request(length),
                                       trust_remote_code=asked.trust_remote_code)  # fmt: skip
        except (ValueError, OSError) as error:
            raise ValueError(f"methods: {name}: {error}") from None
        return {
            "peft_model": method.peft_model,
            "context_size": context_length(config),
            "rope_parameters": getattr(config, "rope_parameters", None),
            "attention": describe_inference_attention(config),
            "vocab_size": config.get_text_config().vocab_size,
        }

    def make_trials(self, source: None = None) -> list[list[dict]]:
        """The same windows or keys for every method, with all that the method decides."""
        asked = self.asked
        if self.is_perplexity:
            trials = [trial for length in asked.lengths for trial in self.windows.trials(length)]
        else:
            options = {"num_trials": asked.num_trials, "num_digits": asked.num_digits, "seed": asked.seed}
            trials = make_trials(grid_cells(asked.lengths, even_depths(asked.num_depths)), **options)
        models = self.models
        common = {name: str(value) for name, value in vars(asked).items() if name not in ("lengths", "methods")}
        base = {"base_model": folder_state(asked.base_model), "torch": torch.__version__}
        self.settings = {"settings": common, **base}
        if self.is_perplexity:
            self.windows.data.check_ids(next(iter(models.values()))[asked.lengths[0]]["vocab_size"])
            self.settings["data"] = self.windows.data.sha256
        methods = {name: {**vars(of), "adapter": folder_state(of.peft_model)} for name, of in asked.methods.items()}
        return [[{"method": name, **trial, "settings": of} for name, of in methods.items() for trial in trials]]

    def ask(self, trial: Mapping) -> dict:
        trial = {name: value for name, value in trial.items() if name != "settings"}
        loaded = self.model(trial["method"], trial["length"])
        return self.windows.ask(self.scorer, trial) if self.is_perplexity else answer_trial(loaded, trial)

    def model(self, name: str, length: int) -> LoadedModel:
        """The model of the method `name`, set up for `length` tokens; loads weights only for another adapter."""
        method, asked = self.asked.methods[name], self.asked
        if self.current == (name, length):
            return self.loaded
        if self.loaded is None or self.loaded.adapter_name_or_path != method.peft_model:
            self.loaded = self.scorer = None  # two models at once may not fit
            self.loaded = load_for_inference(
                asked.base_model,
                adapter_name_or_path=method.peft_model,
                load_in_4bit=asked.load_in_4bit,
                dtype=dtype_of(asked.dtype),
                trust_remote_code=asked.trust_remote_code,
            )
            self.scorer = TokenScorer(self.loaded.model, prefill_chunk_size=asked.prefill_chunk_size)
        set_context(self.loaded, method.request(length), is_chunked=asked.prefill_chunk_size is not None)
        self.current = (name, length)
        return self.loaded

    def score(self, results: Sequence[dict]) -> dict:
        cells = {
            name: {length: self.cell(length, own) for length in self.asked.lengths} if self.is_perplexity
            else accuracy_cells(own)
            for (name,), own in grouped(results, "method").items()
        }  # fmt: skip
        settings = dataclasses.asdict(self.asked)
        return {"settings": settings, "models": self.models, "results": cells}

    def cell(self, length: int, results: Sequence[dict]) -> dict:
        summary = self.windows.summarize([result for result in results if result["length"] == length])
        return {"protocol": self.windows.plan(length).describe(), **summary}

    def table(self, record: Mapping) -> str:
        asked = self.asked
        title = f"passkey accuracy in percent, {asked.num_trials} keys at each of {asked.num_depths} depths"
        if self.is_perplexity:
            title = f"perplexity, {asked.protocol} protocol, stride {asked.sliding_window}, dtype {asked.dtype}"
        rows = [[name, *map(curve.get, asked.lengths)] for name, curve in self.curves(record).items()]
        return f"{title}\n{text_table(['method', *asked.lengths], rows, digits=2 if self.is_perplexity else 1)}"

    def curves(self, record: Mapping) -> dict[str, dict[int, float]]:
        """{method: {length: perplexity, or accuracy in percent over all depths}}."""
        if self.is_perplexity:
            return {name: {length: cell["perplexity"] for length, cell in cells.items()}
                    for name, cells in record["results"].items()}  # fmt: skip
        return {
            name: {length: 100 * fmean(cell["accuracy"] for cell in group)
                   for (length,), group in grouped(cells, "length").items()}
            for name, cells in record["results"].items()
        }  # fmt: skip

    def plot(self, record: Mapping, name: str, path: str) -> None:
        if self.is_perplexity:
            with new_figure(path) as (axis,):
                draw_perplexity(axis, {name: sorted(curve.items()) for name, curve in self.curves(record).items()})
        else:
            plot_heatmap(record["results"], path, label="passkey accuracy")
