"""The settings of a run: defaults < training YAML < `--key value` < what this machine forces, resolved once.

A key nobody owns, a value of the wrong type or a file that is not there is a ValueError that names the key, the value
and the fix.
"""

import dataclasses
import difflib
import os
import typing
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from longqlora.settings.config import SECTIONS, Notice, Settings, warning
from longqlora.settings.deepspeed import complete_deepspeed
from longqlora.settings.machine import fit_optimizer, fit_precision
from longqlora.settings.values import KIND_NAMES, coerce

REPO = Path(__file__).resolve().parents[2]
PATH_KEYS = ("model_name_or_path", "train_file", "eval_file", "deepspeed")
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
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path} line {mark.line + 1}" if mark else str(path)
        raise ValueError(f"{place}: not valid YAML in UTF-8 ({getattr(error, 'problem', error)}); correct it") from None
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {KIND_NAMES.get(type(values), 'a single value')}"
        raise ValueError(f"{path}: {found}; give `key: value` lines as in train_args/")
    odd = next((key for key in values if not isinstance(key, str)), None)
    if odd is not None:
        raise ValueError(f"{path}: key {odd!r} is no name; give `key: value` lines")
    return values


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
        if key in PATH_KEYS and isinstance(value, str) and (for_this_machine or not key.endswith("_file")):
            value = input_path(key, value)
        given[key] = sections[section][key] = value
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
