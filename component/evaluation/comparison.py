"""Compare context methods on one base model: every method at every length, by perplexity or passkey accuracy.

A method is a few settings: how RoPE is scaled, which attention reads, or which adapter was trained. The base model is
loaded once; RoPE and attention are changed in place. A trial is a batch of windows or a passkey prompt of one method,
so a comparison that was killed goes on within a cell, and torchrun splits it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from longqlora.attention.binding import describe_inference_attention
from longqlora.cli import DTYPES, dtype_of, require_folder
from longqlora.data.token_file import open_token_file, sidecar_path
from longqlora.evaluation.frame import Task, from_flags
from longqlora.evaluation.perplexity import PROTOCOLS
from longqlora.evaluation.perplexity_task import TokenScorer, Windows
from longqlora.evaluation.retrieval.grid import plot_heatmap
from longqlora.evaluation.retrieval.passkey import Passkey, accuracy_cells
from longqlora.inference.load import LoadedModel, folder_state, load_for_inference, set_context
from longqlora.model.context import context_length, resolve_config, rope_of
from longqlora.model.context_request import ATTENTIONS, ContextRequest
from longqlora.plot import draw_loss_by_position, draw_perplexity, new_figure
from longqlora.settings.reader import coerce, input_path, read_yaml
from longqlora.table import grouped, text_table

CHOICES = {
    "measure": ("perplexity", "passkey"), "protocol": PROTOCOLS, "dtype": ("auto", *DTYPES), "attention": ATTENTIONS,
}  # fmt: skip


@dataclass(frozen=True)
class Method(ContextRequest):
    """One row of the comparison: a context for the base model, and the folder of an adapter.

    context_size: tokens that RoPE is scaled to; None scales it anew to each length that is measured, as
    ChunkLlama's table does, and leaves an adapter's own scaling alone.
    """

    peft_model: str | None = None

    def at(self, length: int) -> "Method":
        """The method where `length` tokens are read."""
        is_scaled = self.context_size is None and (self.rope_type is not None or self.attention == "dca")
        return replace(self, context_size=length) if is_scaled else self


@dataclass
class Comparison(Task):
    """Every method at every length; the fields are the keys of the YAML; lengths, strides and windows in tokens."""

    base_model: str
    lengths: list
    methods: dict
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
    dtype: str = "auto"
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    name = "compare"
    windows = current = None

    def __post_init__(self) -> None:
        if not self.lengths or any(type(length) is not int or length < 2 for length in self.lengths):
            raise ValueError(f"lengths: give one or more whole numbers of at least 2 tokens, got {self.lengths}")
        self.lengths = sorted(set(self.lengths))
        self.base_model = input_path("model_name_or_path", self.base_model)
        if not self.methods:
            raise ValueError("methods: give a mapping of names to settings, as in  PI: {rope_type: linear}")
        self.methods = {str(name): read_method(str(name), values) for name, values in self.methods.items()}
        adapters = [method.peft_model for method in self.methods.values()]
        self.inputs = {"base_model": self.base_model, "peft_model": adapters}
        if self.data_path:
            self.data_path = input_path("data_path", self.data_path)
            self.inputs["data_path"] = [self.data_path, sidecar_path(self.data_path)]
        elif self.measure == "perplexity":
            raise ValueError("data_path: perplexity needs a file of token ids (.bin), as tokenize_corpus.py writes it")

    def describe(self, name: str, length: int) -> dict:
        """What the configs alone say of the method `name`; ValueError where the base model cannot be given it."""
        method = self.methods[name]
        try:
            _, config = resolve_config(self.base_model, method.peft_model, method.at(length),
                                       trust_remote_code=self.trust_remote_code)  # fmt: skip
        except (ValueError, OSError) as error:
            raise ValueError(f"methods: {name}: {error}") from None
        return {
            "peft_model": method.peft_model,
            "context_size": context_length(config),
            "original_length": rope_of(config).original_length,
            "rope_parameters": getattr(config, "rope_parameters", None),
            "attention": describe_inference_attention(config),
            "vocab_size": config.get_text_config().vocab_size,
        }

    def make_trials(self, source: None = None) -> list[list[dict]]:
        """The same windows or keys for every method, with all that the method decides."""
        if self.measure == "perplexity":
            self.windows = from_flags(Windows, self, data=open_token_file(self.data_path, flag="data_path"))
            trials = [trial for length in self.lengths for trial in self.windows.trials(length)]
        else:
            self.passkey = from_flags(Passkey, self, depths=None)
            trials = self.passkey.trials()
        self.models = {name: {length: self.describe(name, length) for length in self.lengths} for name in self.methods}
        common = {name: str(value) for name, value in asdict(self).items() if name not in ("lengths", "methods")}
        self.settings = {"settings": common, "base_model": folder_state(self.base_model), "torch": torch.__version__}
        if self.windows:
            self.windows.data.check_ids(next(iter(self.models.values()))[self.lengths[0]]["vocab_size"])
            self.settings["data"] = self.windows.data.sha256
        methods = {name: {**vars(of), "adapter": folder_state(of.peft_model)} for name, of in self.methods.items()}
        return [[{"method": name, **trial, "settings": of} for name, of in methods.items() for trial in trials]]

    def ask(self, trial: Mapping) -> dict:
        trial = {name: value for name, value in trial.items() if name != "settings"}
        loaded = self.model(trial["method"], trial["length"])
        if self.windows:
            return self.windows.ask(self.scorer, trial)
        self.passkey.use(loaded)
        return self.passkey.ask(trial)

    def model(self, name: str, length: int) -> LoadedModel:
        """The model of the method `name`, set up for `length` tokens; loads weights only for another adapter."""
        method = self.methods[name]
        if self.current == (name, length):
            return self.loaded
        if self.loaded is None or self.loaded.adapter_name_or_path != method.peft_model:
            self.loaded = self.scorer = None  # two models at once may not fit
            self.loaded = load_for_inference(
                self.base_model,
                adapter_name_or_path=method.peft_model,
                load_in_4bit=self.load_in_4bit,
                dtype=dtype_of(self.dtype),
                trust_remote_code=self.trust_remote_code,
            )
            self.scorer = TokenScorer(self.loaded.model, prefill_chunk_size=self.prefill_chunk_size)
        set_context(self.loaded, method.at(length), is_chunked=self.prefill_chunk_size is not None)
        self.current = (name, length)
        return self.loaded

    def score(self, results: Sequence[dict]) -> dict:
        groups = grouped(results, "method").items()
        cells = {name: self.perplexity_cells(own) if self.windows else accuracy_cells(own) for (name,), own in groups}
        return {"settings": asdict(self), "models": self.models, "results": cells}

    def perplexity_cells(self, results: Sequence[dict]) -> dict[int, dict]:
        return {length: {"protocol": self.windows.plan(length).describe(), **self.windows.summarize(own)}
                for (length,), own in grouped(results, "length").items()}  # fmt: skip

    def table(self, record: Mapping) -> str:
        title = f"passkey accuracy in percent, {self.num_trials} keys at each of {self.num_depths} depths"
        if self.windows:
            title = f"perplexity, {self.protocol} protocol, stride {self.sliding_window}, dtype {self.dtype}"
        rows = [[name, *map(self.curve(cells).get, self.lengths)] for name, cells in record["results"].items()]
        return f"{title}\n{text_table(['method', *self.lengths], rows, digits=2 if self.windows else 1)}"

    def curve(self, cells: Mapping | Sequence) -> dict[int, float]:
        """Length -> perplexity, or accuracy in percent over all depths, from one method's cells."""
        if self.windows:
            return {length: cell["perplexity"] for length, cell in cells.items()}
        by_length = grouped(cells, "length").items()
        return {length: 100 * fmean(cell["accuracy"] for cell in group) for (length,), group in by_length}

    def plot(self, record: Mapping, name: str, path: str) -> None:
        if self.windows:
            results, longest = record["results"].items(), self.lengths[-1]
            trained = [name for name, method in self.methods.items() if method.peft_model]
            known = next(iter(record["models"].values()))[longest]["original_length"]
            style = {"original_length": known, "thin": {*self.methods}.difference(trained) if trained else ()}
            with new_figure(path, 2) as (left, right):
                draw_perplexity(left, {name: self.curve(cells).items() for name, cells in results}, **style)
                by_position = {name: cells[longest]["loss_by_position"] for name, cells in results}
                draw_loss_by_position(right, by_position, **style)
        else:
            plot_heatmap(record["results"], path, label="passkey accuracy")


def read_comparison(path: str, overrides: Mapping[str, str]) -> Comparison:
    """The comparison in the YAML at `path`, with `overrides` (key -> text) in place of some. ValueError names a key."""
    values = {**read_yaml(Path(path)), **overrides}
    for name in ("base_model", "lengths", "methods"):
        if values.get(name) is None:
            raise ValueError(f"{name}: missing; the comparison needs it")
    return read_fields(Comparison, values)


def read_method(name: str, values: object) -> Method:
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"methods: {name}: give a mapping of settings, or {{}} for the model as it is")
    try:
        method = read_fields(Method, values or {})
        if not method.peft_model:
            return method
        folder = require_folder(input_path("model_name_or_path", method.peft_model), "peft_model")
    except ValueError as error:
        raise ValueError(f"methods: {name}: {error}") from None
    return replace(method, peft_model=str(folder))


def read_fields(kind: type, values: Mapping) -> Any:
    """The dataclass `kind` from `values`, each as the type of its field."""
    types = {item.name: item.type for item in fields(kind)}
    for key in values:
        if key not in types:
            raise ValueError(f"{key}: unknown setting; the settings are {', '.join(types)}")
    return kind(**{key: coerce(key, value, types[key], CHOICES.get(key)) for key, value in values.items()})
