"""Read a training YAML and command-line overrides into settings.

Defaults < YAML < `--key value`. Each dataclass stands beside the code it configures; this file only
knows how to fill them. A key nobody owns, a value of the wrong type or a file that is not there is a
ValueError that names the key, the value and the fix.
"""

import dataclasses
import difflib
import os
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from longqlora.settings.config import (
    AdapterConfig,
    AttentionConfig,
    ContextConfig,
    DataConfig,
    LogConfig,
    MemoryConfig,
    ModelConfig,
    OutputConfig,
    SequenceParallelConfig,
)
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


SECTIONS = {
    "model": ModelConfig,
    "context": ContextConfig,
    "attention": AttentionConfig,
    "adapter": AdapterConfig,
    "memory": MemoryConfig,
    "parallel": SequenceParallelConfig,
    "data": DataConfig,
    "training": TrainingArguments,
    "output": OutputConfig,
    "log": LogConfig,
}


@dataclass
class Settings:
    """All settings of a run, section by section, and those that the user gave."""

    model: ModelConfig
    context: ContextConfig
    attention: AttentionConfig
    adapter: AdapterConfig
    memory: MemoryConfig
    parallel: SequenceParallelConfig
    data: DataConfig
    output: OutputConfig
    log: LogConfig
    training: dict[str, Any]
    given: dict[str, Any]

    def training_arguments(self, kind: type[TrainingArguments] = TrainingArguments) -> TrainingArguments:
        """Build transformers' TrainingArguments; under a launcher this joins the process group."""
        if self.log.logging_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.log.logging_dir
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return kind(**self.training)

    def as_dict(self) -> dict[str, dict]:
        """Sections as plain values for a record on disk, without the secret among them."""
        parts = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS if name != "training"}
        return {**parts, "training": {key: value for key, value in self.training.items() if key != "hub_token"}}


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
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {error.problem}; mend the line") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML ({error}); mend the file") from None
    if values is None:
        raise ValueError(f"{path}: is empty; give `key: value` lines as in train_args/")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {KIND_NAMES.get(type(values), 'a single value')}; give `key: value` lines")
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


def rename(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values under the names that the installed transformers knows, and a notice for each that changed."""
    known = fields_of(TrainingArguments)
    successors = {**RENAMED, **{new: old for old, new in RENAMED.items() if new not in known}}
    renamed, notices, given_as = {}, [], {}
    for key, value in values.items():
        if key in REMOVED:
            notices.append(f"{key} has no effect in this version of transformers")
            continue
        name = successors[key] if successors.get(key) in known else key
        if name in renamed:
            raise ValueError(f"{given_as[name]} and {key} are two names of one setting; keep {name}")
        if name != key:
            notices.append(f"renamed setting: {key} is now {name}")
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


def check_known(given: dict[str, Any], owners: dict[str, str]) -> None:
    """Raise ValueError for keys that no section owns, each with the nearest known name."""
    unknown = []
    for key in given:
        if key not in owners:
            close = difflib.get_close_matches(key, owners, n=1)
            unknown.append(f"{key!r} (value {given[key]!r}{f'; did you mean {close[0]!r}?' if close else ''})")
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}; all settings are listed in docs/settings.md")


def read_settings(train_args_file: str, words: list[str], *, needs_data: bool = True) -> tuple[Settings, list[str]]:
    """Settings of a run and the notices to log.

    train_args_file: path of the YAML; words: the command line after it, `--key value` pairs. needs_data: if not,
    data files need not exist.
    """
    path = Path(os.path.expanduser(train_args_file))
    if not path.is_file():
        raise ValueError(f"--train_args_file: no file at {train_args_file!r}; give the path of a YAML in train_args/")
    # Renamed before they are laid over each other, so that an old name in the YAML gives way to the new one.
    (from_yaml, notices), (from_cli, cli_notices) = rename(read_yaml(path)), rename(read_overrides(words))
    given = {**from_yaml, **from_cli}
    owners = {key: name for name, cls in SECTIONS.items() for key in fields_of(cls)}
    check_known(given, owners)
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    values["training"].update(TRAINING_DEFAULTS)
    hints = {name: typing.get_type_hints(cls) for name, cls in SECTIONS.items()}
    for key, value in given.items():
        section = owners[key]
        choices = fields_of(SECTIONS[section])[key].metadata.get("choices")
        value = coerce(key, value, hints[section][key], choices)
        if key in FOLDER_KEYS and isinstance(value, str):
            value = os.path.expanduser(value)
        is_path = key in PATH_KEYS and isinstance(value, str) and (needs_data or not key.endswith("_file"))
        values[section][key] = input_path(key, value) if is_path else value
        given[key] = values[section][key]
    for key in REQUIRED_KEYS:
        if not values[owners[key]].get(key):
            raise ValueError(f"{key}: missing; add `{key}: ...` to {path}")
    parts = {name: cls(**values[name]) for name, cls in SECTIONS.items() if name != "training"}
    settings = Settings(**parts, training=values["training"], given=given)
    return settings, list(dict.fromkeys(notices + cli_notices))
