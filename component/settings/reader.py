"""The settings of a run: defaults < training YAML < `--key value` < what this machine forces, resolved once.

A key nobody owns, a value of a wrong type or a missing file is a ValueError that names the key, the value and the fix.
"""

import dataclasses
import difflib
import enum
import glob
import math
import os
import types
import typing
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from longqlora.device import cpu_has_bf16
from longqlora.reading import cause_of
from longqlora.settings.config import HUB_NAME, SECTIONS, Notice, Settings, warning
from longqlora.settings.deepspeed import complete_deepspeed, offloads

REPO = Path(__file__).resolve().parents[2]
PATH_KEYS, DATA_KEYS = ("model_name_or_path", "deepspeed"), ("train_file", "eval_file")
FOLDER_KEYS = ("output_dir", "logging_dir", "data_cache_dir", "resume_from_checkpoint")
REQUIRED_KEYS = ("model_name_or_path", "train_file", "output_dir")
TRAINING_DEFAULTS = {"per_device_train_batch_size": 1, "report_to": "tensorboard", "logging_steps": 10}
# Names that transformers dropped or is about to drop, and their successors.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "group_by_length": "train_sampling_strategy",
}
# Names without a successor: what they switched is now always so, or decided by the machine.
REMOVED = ("save_safetensors", "fp16_backend", "half_precision_backend", "fp16_opt_level", "use_mps_device", "use_ipex")
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
MAX_YAML_BYTES, MAX_YAML_VALUES = 2**20, 100_000
KIND_NAMES = {
    bool: "true or false", int: "a whole number", float: "a finite number", str: "text", dict: "a mapping",
    list: "a list",
}  # fmt: skip


def fields_of(cls: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


class UniqueKeyLoader(yaml.SafeLoader):
    """A key given twice is an error, where PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ValueError with the file and, where known, the line."""
    text = path.read_bytes()
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"{path}: larger than {MAX_YAML_BYTES:,} bytes; give `key: value` lines as in train_args/")
    try:
        loader = UniqueKeyLoader(text.decode("utf-8-sig"))
        node = loader.get_single_node()
        if (num_values := expanded_size(node, {})) > MAX_YAML_VALUES:
            raise ValueError(f"its aliases stand for {num_values:.3g} values, more than {MAX_YAML_VALUES:,}")
        values = loader.construct_document(node) if node else None
    # PyYAML lets errors of Python through, from dates and numbers that are none.
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path} line {mark.line + 1}" if mark else str(path)
        cause = getattr(error, "problem", None) or cause_of(error)
        raise ValueError(f"{place}: not valid YAML in UTF-8 ({cause}); correct it") from error
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {KIND_NAMES.get(type(values), 'a single value')}"
        raise ValueError(f"{path}: {found}; give `key: value` lines as in train_args/")
    odd = next((key for key in values if not isinstance(key, str)), None)
    if odd is not None:
        raise ValueError(f"{path}: key {odd!r} is no name; give `key: value` lines")
    return values


def expanded_size(node: yaml.Node | None, known: dict[yaml.Node, int]) -> int:
    """Values that `node` stands for, each alias counted with all that it names; `known`: those of nodes before."""
    if node not in known:
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
        children = node.value if isinstance(node, yaml.SequenceNode) else children
        known[node] = 1 + sum(expanded_size(child, known) for child in children)
    return known[node]


def read_overrides(words: list[str]) -> dict[str, str]:
    """`--key value` and `--key=value` pairs; a key alone is true."""
    overrides, position = {}, 0
    while position < len(words):
        key, equals, value = words[position].removeprefix("--").partition("=")
        if not words[position].startswith("--") or not key:
            raise ValueError(f"unexpected argument {words[position]!r}; settings are given as --key value")
        position += 1
        if not equals:
            value = "true"
            if position < len(words) and not words[position].startswith("--"):
                value, position = words[position], position + 1
        overrides[key.replace("-", "_")] = value
    return overrides


def rename(values: dict[str, Any]) -> tuple[dict[str, Any], list[Notice]]:
    """Values under the names that the installed transformers knows, and a notice for each that changed."""
    known = fields_of(TrainingArguments)
    successors = {**RENAMED, **{new: old for old, new in RENAMED.items() if new not in known}}
    renamed, notices, given_as = {}, [], {}
    for key, value in values.items():
        if key in REMOVED:
            notices.append(warning(f"{key} has no effect in this version of transformers"))
            continue
        name = successors[key] if successors.get(key) in known else key
        if name in renamed:
            raise ValueError(f"{given_as[name]} and {key} are two names of one setting; keep {name}")
        if name != key:
            notices.append(Notice(f"renamed setting: {key} is now {name}"))
        if key == "warmup_ratio":
            value = coerce(key, value, float)
            if not 0 <= value < 1:
                raise ValueError(f"warmup_ratio: must lie in [0, 1), got {value}; it is a part of all steps")
        if key == "group_by_length":
            value = "group_by_length" if coerce(key, value, bool) else "random"
        renamed[name], given_as[name] = value, key
    return renamed, notices


def input_path(key: str, value: str) -> str:
    """An input path as given, or below the repository where it is not below the working directory."""
    path = Path(os.path.expanduser(value))
    if value and not path.exists() and not path.is_absolute() and (REPO / path).exists():
        return str(REPO / path)
    if key != "model_name_or_path" and not path.is_file():
        raise ValueError(f"{key}: no file at {value!r}; give the path of an existing file")
    return str(path) if value.startswith("~") else value


def expand_sources(values: dict[str, Any]) -> None:
    """Replace the globs of the data keys by the files that they match, each with the weight of its glob."""
    for key in DATA_KEYS:
        if not (given := values.get(key)):
            continue
        entries = [given] if isinstance(given, str) else given
        if not all(isinstance(entry, str) and entry for entry in entries):
            raise ValueError(f"{key}: {given!r} is not a list of paths and names; put each in quotes")
        found = [data_paths(key, entry) for entry in entries]
        weights = values.get("train_file_weights")
        if key == "train_file" and weights and len(weights) == len(entries):
            values["train_file_weights"] = [w for w, paths in zip(weights, found, strict=True) for _ in paths]
        paths = [path for group in found for path in group]
        values[key] = paths[0] if isinstance(given, str) and len(paths) == 1 else paths


def data_paths(key: str, value: str) -> list[str]:
    """The files that an entry of a data key names, in the order of their names, or the name on the hub that it is."""
    path = Path(os.path.expanduser(value))
    if path.exists() or (REPO / path).is_file():
        return [value] if path.is_dir() and HUB_NAME.fullmatch(value) else [input_path(key, value)]
    if HUB_NAME.fullmatch(value):
        return [value]
    if not glob.has_magic(value):
        return [input_path(key, value)]
    found = [glob.glob(str(root / path), recursive=True) for root in (Path(), REPO)]
    files = sorted(file for file in found[0] or found[1] if os.path.isfile(file))
    if not files:
        raise ValueError(f"{key}: no file matches {value!r}; give the path of an existing file")
    return files


def known_keys() -> dict[str, tuple[str, dataclasses.Field, Any]]:
    """Section, field and type of every key that a YAML can have."""
    known = {}
    for name, cls in {**SECTIONS, "training": TrainingArguments}.items():
        hints = typing.get_type_hints(cls)
        known |= {key: (name, item, hints[key]) for key, item in fields_of(cls).items()}
    return known


def guess(key: str, known: typing.Collection[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def resolve_settings(
    train_args_file: str, words: list[str], *, for_this_machine: bool = True
) -> tuple[Settings, list[Notice]]:
    """Settings of a run and the notices to log.

    train_args_file: path of the YAML; words: the command line after it, `--key value` pairs. for_this_machine: if not,
    as in a plan for another one, data files need not exist and this machine forces nothing.
    """
    path = Path(os.path.expanduser(train_args_file))
    if not path.is_file():
        raise ValueError(f"--train_args_file: no file at {train_args_file!r}; give the path of a YAML in train_args/")
    # Renamed before they are laid over each other, so that an old name in the YAML gives way to the new one.
    (from_yaml, notices), (from_cli, cli_notices) = rename(read_yaml(path)), rename(read_overrides(words))
    given, known = {**from_yaml, **from_cli}, known_keys()
    unknown = [f"{key!r} (value {given[key]!r}{guess(key, known)})" for key in given if key not in known]
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}; all settings are listed in docs/settings.md")
    sections: dict[str, dict[str, Any]] = {**{name: {} for name in SECTIONS}, "training": dict(TRAINING_DEFAULTS)}
    for key, value in given.items():
        section, item, hint = known[key]
        value = coerce(key, value, hint, item.metadata.get("choices"))
        if key in FOLDER_KEYS and isinstance(value, str):
            value = os.path.expanduser(value)
        if key in PATH_KEYS and isinstance(value, str):
            value = input_path(key, value)
        given[key] = sections[section][key] = value
    if for_this_machine:
        expand_sources(sections["data"])
        given |= {key: sections["data"][key] for key in (*DATA_KEYS, "train_file_weights") if key in sections["data"]}
    for key in REQUIRED_KEYS:
        if not given.get(key):
            raise ValueError(f"{key}: missing; add `{key}: ...` to {path}")
    training = sections.pop("training")
    parts = {name: SECTIONS[name](**values) for name, values in sections.items()}
    uses_gpu = torch.cuda.is_available() and not training.get("use_cpu")
    settings, notices = Settings(**parts, training=training, given=given, uses_gpu=uses_gpu), notices + cli_notices
    for step in (fit_precision, complete_deepspeed, fit_optimizer) if for_this_machine else (complete_deepspeed,):
        settings, changes = step(settings)
        notices += changes
    return settings, list(dict.fromkeys(notices))


def coerce(key: str, value: Any, hint: Any, choices: typing.Sequence | None = None) -> Any:
    """`value` as the type of the field, or a ValueError naming key, value and what was expected."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = list(typing.get_args(hint)) if is_union else [hint]
    if value is None or (type(None) in options and isinstance(value, str) and value.lower() in ("none", "null")):
        if type(None) not in options:
            raise ValueError(f"{key}: has no value; give one, or leave the key out for its default")
        # transformers takes no reporting at all from the word, not from None.
        return "none" if key == "report_to" else None
    if key == "resume_from_checkpoint" and isinstance(value, bool):
        return str(value).lower()
    # Text last: it would take what an option before it reads better.
    kinds = sorted((typing.get_origin(o) or o for o in options if o is not type(None)), key=lambda kind: kind is str)
    for kind in kinds:
        converted = convert(value, kind)
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            # An unquoted `no` is false in YAML.
            choices, converted = [member.value for member in kind], "no" if value is False else value
        if converted is None:
            continue
        if choices and converted not in choices:
            near = choices if len(choices) <= 12 else difflib.get_close_matches(str(value), choices, n=6, cutoff=0)
            raise ValueError(f"{key}: {value!r} is not one of {', '.join(near)}{'' if near is choices else ', ...'}")
        return converted
    expected = " or ".join(KIND_NAMES.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
    hint = "; put it in quotes" if str in kinds and not isinstance(value, (dict, list)) else ""
    raise ValueError(f"{key}: {value!r} is not {expected}{hint}")


def convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`, or None where it is not one. YAML reads 2e-4 as text, the command line everything."""
    try:
        if kind is bool:
            return value if isinstance(value, bool) else BOOLEANS.get(str(value).lower())
        if kind in (str, dict, list):
            parsed = yaml.safe_load(value) if isinstance(value, str) and kind is not str else value
            return parsed if isinstance(parsed, kind) else None
        if kind not in (int, float) or not isinstance(value, (int, float, str)) or isinstance(value, bool):
            return None
        if kind is int and isinstance(value, int):
            return value
        number = float(value)
        if not math.isfinite(number) or (kind is int and not number.is_integer()):
            return None
        return kind(number)
    except (ValueError, OverflowError, yaml.YAMLError):
        return None


def fit_precision(settings: Settings) -> tuple[Settings, list[Notice]]:
    """Settings in a precision that this GPU, or this CPU, computes in."""
    training = settings.training
    if training.get("fp16") and training.get("bf16"):
        raise ValueError("fp16 and bf16 are both true; keep one (fp16 on V100, bf16 on A100 or later)")
    if settings.uses_gpu:
        if training.get("bf16") and torch.cuda.get_device_capability() < (8, 0):
            raise ValueError("bf16: True, but this GPU has no bf16 arithmetic; set fp16: true and bf16: false")
        return settings, []
    reasons = {"fp16": "it needs a GPU"} | ({} if cpu_has_bf16() else {"bf16": "this CPU has no bf16 instructions"})
    keys = {key: reason for name, reason in reasons.items() for key in (name, f"{name}_full_eval")}
    lost = {key: reason for key, reason in keys.items() if training.get(key)}
    # There is no device memory to copy into from pinned pages. Without use_cpu accelerate takes each of several CPU
    # processes for a world of one.
    forced = {"dataloader_pin_memory": training.get("dataloader_pin_memory", False), "use_cpu": True}
    notices = [warning(f"{key} becomes false: {reason}; the run computes in fp32") for key, reason in lost.items()]
    return settings.with_training(**forced, **dict.fromkeys(lost, False)), notices


def fit_optimizer(settings: Settings) -> tuple[Settings, list[Notice]]:
    """Settings without a bitsandbytes optimizer where its state cannot live on a GPU."""
    name, deepspeed = settings.training.get("optim", ""), settings.training.get("deepspeed")
    is_bitsandbytes = name.endswith("bit") and not name.startswith("adamw_torch") or "bnb" in name
    is_offloaded = offloads(deepspeed, "optimizer")
    if not is_bitsandbytes or "optimizer" in (deepspeed or {}) or (settings.uses_gpu and not is_offloaded):
        return settings, []
    where = "DeepSpeed keeps the optimizer on the CPU" if is_offloaded else "there is no GPU for its state"
    plain = "adamw_torch" if "adamw" in name else "rmsprop" if "rmsprop" in name else None
    if plain is None:
        raise ValueError(f"optim: {name!r} cannot be used, since {where}; use adamw_torch")
    return settings.with_training(optim=plain), [warning(f"optim: {name} becomes {plain}, since {where}")]
