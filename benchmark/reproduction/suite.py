"""What a suite measures: the rows of benchmark/suites/NAME.yaml, at a scale, as cells with the commands that make them.

A row is a mapping of train.py's settings, and of these:

    untrained: true          the base itself, with the row's rope_type and attention
    pattern: NAME            an attention pattern of train_pattern.py
    part_of_steps: 0.25      that part of the scale's steps
    equal_flops: {...}       as many steps as cost what the row with these settings costs
    merge: 16-bit | nf4      read after merging into the 16-bit or the dequantised NF4 weights
    quantisation: NAME       of the base, by with_quantisation.py, when trained and when measured

A cell is one row on one data set with one seed. Its key is a hash of all that decides its numbers, so suites share it.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from string import Template

from longqlora.files import file_sha256
from longqlora.settings.config import CHANGES_NO_LOSS
from longqlora.settings.reader import read_yaml
from reproduction.cost import training_flops

REPO = Path(__file__).resolve().parents[2]
SUITES = REPO / "benchmark" / "suites"
SCALES = SUITES / "scales.yaml"
OWN_KEYS = {"untrained", "pattern", "part_of_steps", "equal_flops", "merge", "quantisation"}
# What the command lines that measure take of a row that is not trained.
CONTEXT_KEYS = ("rope_type", "rope_theta", "attention")
PATHS = {"model_name_or_path", "train_file", "eval_file"}
FINGERPRINTED = ("*.safetensors", "*.bin", "config.json", "tokenizer.json")
MEASURES = {"perplexity": "script/evaluate/evaluate.py", "passkey": "script/evaluate/passkey.py"}
# Part of the steps that a pattern trains with full attention, for their cost.
DENSE_PARTS = {"every_fourth_dense": 0.25}


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def shown(path: Path) -> str:
    """`path` from the root of the repository, where the commands run."""
    return str(path.relative_to(REPO)) if path.is_relative_to(REPO) else str(path)


def flags(values: Mapping[str, object]) -> list[str]:
    """`--key value ...` of each value; of a list, all its items; true is the key alone."""
    words = []
    for name, value in values.items():
        items = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, items)]
    return words


def filled(value: object, places: Mapping[str, object]) -> object:
    """`value` of a YAML with places["name"] for "$name"; a text that is nothing else takes over its type."""
    if isinstance(value, dict):
        return {filled(name, places): filled(item, places) for name, item in value.items()}
    if isinstance(value, list):
        return [filled(item, places) for item in value]
    if not isinstance(value, str):
        return value
    return places[value[1:]] if value[:1] == "$" and value[1:] in places else Template(value).safe_substitute(places)


@dataclass(frozen=True)
class Dataset:
    """A base model, texts to train it on and unseen tokens, with the commands that make them: output -> words."""

    name: str
    folder: Path
    base: str
    train_file: str
    data_path: str
    prepare: Mapping[str, list[str]]

    @property
    def missing(self) -> dict[Path, list[str]]:
        """Commands whose output is not there."""
        return {REPO / path: words for path, words in self.prepare.items() if not (REPO / path).exists()}

    @property
    def train_args_file(self) -> Path:
        """All settings that the trainings share."""
        return self.folder / "train.yaml"

    def fingerprint(self) -> dict:
        """Hashes of the files that decide a number; a hub name as it is, None for what is not there."""
        base = Path(REPO, self.base)
        files = sorted({path for pattern in FINGERPRINTED for path in base.glob(pattern)})
        data = {name: Path(REPO, getattr(self, name)) for name in ("train_file", "data_path")}
        hashes = {name: file_sha256(path) if path.is_file() else None for name, path in data.items()}
        return {"base": {path.name: file_sha256(path) for path in files} or self.base, **hashes}


@dataclass(frozen=True)
class Scale:
    """A block of scales.yaml: data sets, settings that all trainings share, and how they are measured."""

    name: str
    output_dir: Path
    about: str
    context: int
    target: int
    seeds: list[int]
    train: Mapping[str, object]
    perplexity: Mapping[str, object]
    passkey: Mapping[str, object]
    datasets: list[Dataset]
    reading: Mapping[str, object] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, output_dir: Path, given: Mapping[str, str | None]) -> "Scale":
        """The scale `name`; given: folders that the user names, without which a data set that needs one is left out."""
        values = read_yaml(SCALES)[name]
        own_file, datasets = values.pop("train_args_file", None), []
        for key, block in values.pop("datasets").items():
            folder = output_dir / "data" / key
            need = block.pop("needs", None)
            if need is None or given.get(need):
                block = filled(block, {"here": shown(folder), **given})
                prepare = {path: shlex.split(command) for path, command in block.pop("prepare", {}).items()}
                datasets.append(Dataset(key, folder, prepare=prepare, **block))
        train = {**(read_yaml(REPO / own_file) if own_file else {}), **values.pop("train")}
        return cls(name, output_dir, datasets=datasets, train=train, **values)

    def train_settings(self, dataset: Dataset) -> dict:
        """What stands in the data set's train.yaml."""
        paths = {"model_name_or_path": dataset.base, "train_file": dataset.train_file}
        return {**self.train, **paths, "data_cache_dir": shown(self.output_dir / "cache")}


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table; panel: of the plots, the first axis where there are several."""

    name: str
    panel: str
    settings: Mapping[str, object]
    own: Mapping[str, object]


@dataclass(frozen=True)
class Cell:
    """A row on a data set with a seed (None: nothing is trained).

    overrides: settings beside the data set's train.yaml. flops: of the training, None where the base is not there yet.
    key, train_key: of the cell, and of its training alone.
    """

    name: str
    row: str
    dataset: Dataset
    scale: Scale
    seed: int | None
    overrides: Mapping[str, object]
    own: Mapping[str, object]
    flops: float | None
    key: str
    train_key: str

    @property
    def path(self) -> Path:
        return self.scale.output_dir / "cells" / f"{self.dataset.name}-{self.key}.json"

    @property
    def work(self) -> Path:
        """Folder of the training, while it is needed."""
        return self.scale.output_dir / "trainings" / self.train_key

    @property
    def settings(self) -> dict:
        return {**self.scale.train, **self.overrides}

    def train_words(self) -> list[str]:
        pattern = self.own.get("pattern")
        script = ["benchmark/train_pattern.py", "--pattern", pattern] if pattern else self.quantised("train.py")
        others = {"train_args_file": shown(self.dataset.train_args_file), **self.overrides}
        return [*script, *flags(others | {"output_dir": shown(self.work), "overwrite_output_dir": "true"})]

    def merge_words(self) -> list[str]:
        merged = {"adapter_name_or_path": f"{shown(self.work)}/final", "save_path": f"{shown(self.work)}/merged"}
        # fp32, in which training loaded the base on a CPU.
        nf4 = {"load_in_4bit": True, **self.scale.reading} if self.own["merge"] == "nf4" else {}
        base = {"model_name_or_path": self.dataset.base, "overwrite": True}
        return ["script/merge_lora.py", *flags({**merged, **base, **nf4})]

    def model_words(self) -> list[str]:
        """The flags of an evaluation that load what is measured."""
        kind, final = self.settings.get("finetuning_type", "qlora"), f"{shown(self.work)}/final"
        model = {"model_name_or_path": self.dataset.base}
        if self.own.get("merge"):
            model, kind = {"model_name_or_path": f"{shown(self.work)}/merged"}, "merged"
        elif self.seed is None:
            context = {name: self.overrides[name] for name in CONTEXT_KEYS if name in self.overrides}
            model |= {"context_size": self.scale.target, **context} if context else {}
        elif kind == "full":
            model = {"model_name_or_path": final}
        else:
            model["adapter_name_or_path"] = final
        return flags(model | ({"load_in_4bit": True} if kind == "qlora" else {}) | self.scale.reading)

    def output_file(self, what: str) -> Path:
        return self.work / f"{what}-{self.key}.json"

    def measure_words(self, what: str) -> list[str]:
        values = {**getattr(self.scale, what), "output_file": shown(self.output_file(what))}
        values |= {"data_path": self.dataset.data_path} if what == "perplexity" else {}
        return [*self.quantised(MEASURES[what]), *self.model_words(), *flags(values)]

    def quantised(self, script: str) -> list[str]:
        """Words that run `script` with the row's quantisation of the base."""
        kind = self.own.get("quantisation")
        return ["benchmark/with_quantisation.py", kind, script] if kind else [script]

    def commands(self) -> list[list[str]]:
        """All commands of the cell in their order."""
        words = [self.train_words()] if self.seed is not None else []
        words += [self.merge_words()] if self.own.get("merge") else []
        return words + [self.measure_words(what) for what in MEASURES]


@dataclass(frozen=True)
class Suite:
    """benchmark/suites/NAME.yaml.

    smoke: the row of --smoke. columns, plots: names in report.py. reference: the row that "excess" compares with.
    passkey_rows: those with a heat map; default: all.
    paper: tables {source, columns, rows: {row: values}} to stand beside ours. reading: what a person says of it.
    """

    name: str
    title: str
    question: str
    rows: Sequence[Row]
    smoke: str
    columns: Sequence[str]
    plots: Sequence[str]
    reading: str = ""
    recommended: str | None = None
    reference: str | None = None
    passkey_rows: Sequence[str] = ()
    paper: Sequence[Mapping] = ()
    num_seeds: int | None = None

    @classmethod
    def read(cls, name: str, values: Mapping[str, object]) -> "Suite":
        """The suite `name`; values: of the scale, for "$name"."""
        block = filled(read_yaml(SUITES / f"{name}.yaml"), values)
        axes = block.pop("axes", {})
        found = {}
        for parts in product(*(axis.items() for axis in axes.values())) if axes else ():
            names, settings = zip(*parts, strict=True)
            found[", ".join(names)] = {key: value for own in settings for key, value in own.items()}
        first = next(iter(axes.values()), {})
        rows = []
        for row, settings in {**found, **block.pop("rows", {})}.items():
            own = {key: value for key, value in settings.items() if key in OWN_KEYS}
            panel = next((label for label in first if row.startswith(f"{label},")), "")
            rows.append(Row(row, panel, {k: v for k, v in settings.items() if k not in OWN_KEYS}, own))
        return cls(name, rows=rows, **block)

    def cells(self, scale: Scale, *, is_smoke: bool = False) -> list[Cell]:
        """Every cell; is_smoke: one row with one seed."""
        rows = [row for row in self.rows if not is_smoke or row.name == self.smoke]
        seeds = scale.seeds[: self.num_seeds]
        # Every row once before any is repeated, so that a run cut short has something to show.
        return [
            make_cell(self.name, row, dataset, scale, None if row.own.get("untrained") else seed)
            for dataset in scale.datasets
            for seed in seeds[: 1 if is_smoke else None]
            for row in rows
            if seed == seeds[0] or not row.own.get("untrained")
        ]


def make_cell(suite: str, row: Row, dataset: Dataset, scale: Scale, seed: int | None) -> Cell:
    own, overrides, flops = dict(row.own), dict(row.settings), 0.0
    if seed is None:
        # What only training takes decides nothing, and a base is read dense unless with dual chunk attention.
        is_dense = overrides.get("attention") != "dca"
        read = {*CONTEXT_KEYS, "finetuning_type"} - ({"attention"} if is_dense else set())
        overrides = {name: value for name, value in overrides.items() if name in read}
    if seed is not None:
        like, part = own.pop("equal_flops", None), own.pop("part_of_steps", 1)
        overrides["max_steps"] = num_steps = max(1, round(part * scale.train["max_steps"]))
        flops = cost(dataset, overrides, own)
        if like and flops is None:
            overrides["max_steps"] = "AT_EQUAL_FLOPS"
        elif like:
            wanted = cost(dataset, {**overrides, **like}, {})
            overrides["max_steps"] = round(num_steps * wanted / flops)
            flops *= overrides["max_steps"] / num_steps
        overrides["seed"] = seed
    pattern, merge, quantisation = (own.get(name) for name in ("pattern", "merge", "quantisation"))
    settings = {**scale.train, **overrides} if seed is not None else overrides
    settings = {key: value for key, value in settings.items() if key not in CHANGES_NO_LOSS | PATHS}
    files = dataset.fingerprint()
    measured = [dict(scale.perplexity), dict(scale.passkey), dict(scale.reading), files.pop("data_path"), merge]
    trained = [settings, pattern, quantisation, files]
    kind = {**scale.train, **overrides}.get("finetuning_type")
    key = digest([trained, measured, None if seed is not None else [kind, scale.target]])
    name = f"{suite}: {row.name} ({dataset.name}{'' if seed is None else f', seed {seed}'})"
    return Cell(name, row.name, dataset, scale, seed, overrides, own, flops, key, digest(trained))


def cost(dataset: Dataset, overrides: Mapping, own: Mapping) -> float | None:
    """FLOPs of a training; None while its base or data are not there."""
    if not dataset.train_args_file.is_file() or dataset.missing:
        return None
    dense = {"dense_finish": DENSE_PARTS[own["pattern"]]} if own.get("pattern") in DENSE_PARTS else {}
    output = {"output_dir": shown(dataset.folder)}
    return training_flops(dataset.train_args_file, flags({**overrides, **dense, **output}))
