"""Read a training YAML and command-line overrides into checked settings.

Defaults < YAML < `--key value`. Each dataclass stands beside the code it configures; this file only
knows how to fill them. A key nobody owns, a value of the wrong type or a file that is not there is a
ValueError that names the key, the value and the fix.
"""

import dataclasses
import difflib
import enum
import types
import typing
import warnings
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from component.adapter import AdapterConfig
from component.attention import AttentionConfig
from component.checkpoint import OutputConfig
from component.dataset import DataConfig
from component.model import ModelConfig
from component.rope_scaling import ContextConfig

SECTIONS = {
    "model": ModelConfig,
    "context": ContextConfig,
    "attention": AttentionConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "output": OutputConfig,
    "training": TrainingArguments,
}
TRAINING_DEFAULTS = {"per_device_train_batch_size": 1, "report_to": "tensorboard", "logging_steps": 10}
REPO = Path(__file__).resolve().parents[1]
PATH_KEYS = ("model_name_or_path", "train_file", "eval_file", "deepspeed")

# Names that TrainingArguments dropped, and where their meaning lives now; None: it has no effect any more.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "group_by_length": "train_sampling_strategy",
    "save_safetensors": None,
    "logging_dir": None,
}


@dataclasses.dataclass
class Settings:
    """All settings of a run, section by section, and where they came from."""

    model: ModelConfig
    context: ContextConfig
    attention: AttentionConfig
    adapter: AdapterConfig
    data: DataConfig
    output: OutputConfig
    training: dict[str, Any]
    given: dict[str, Any]

    def training_arguments(self) -> TrainingArguments:
        """Build transformers' TrainingArguments; this starts the process group under a launcher."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return TrainingArguments(**self.training)

    def as_dict(self) -> dict[str, dict]:
        parts = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS if name != "training"}
        return {**parts, "training": self.training}


def fields_of(cls: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def read_yaml(path: Path) -> dict[str, Any]:
    """Mapping of a YAML file; a key given twice is an error, where PyYAML would keep the last."""

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
        keys = [loader.construct_object(key) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(f"{path}: key {twice!r} is given twice; keep one")
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: must be a list of `key: value` lines")
    return values


def read_overrides(words: list[str]) -> dict[str, str]:
    """`--key value` and `--key=value` pairs; a key alone is true."""
    overrides, position = {}, 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--") or len(word) == 2:
            raise ValueError(f"unexpected argument {word!r}; settings are given as --key value")
        key, equals, value = word[2:].partition("=")
        position += 1
        if not equals:
            if position < len(words) and not words[position].startswith("--"):
                value, position = words[position], position + 1
            else:
                value = "true"
        overrides[key.replace("-", "_")] = value
    return overrides


def rename(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values under the names of the installed transformers, and one notice for all that changed."""
    training = fields_of(TrainingArguments)
    renamed, notices = dict(values), []
    aliases = {**RENAMED, **{new: old for old, new in RENAMED.items() if new and new not in training and old in training}}
    for old, new in aliases.items():
        if old not in renamed or (old in training and (new not in training or old not in RENAMED)):
            continue
        value = renamed.pop(old)
        if new is None:
            notices.append(f"{old} (no effect any more, ignored)")
            continue
        if new in renamed:
            raise ValueError(f"{old} and {new} are two names of one setting; keep {new}")
        if old == "group_by_length":
            value = "group_by_length" if str(value).lower() == "true" else "random"
        renamed[new] = value
        notices.append(f"{old} -> {new}")
    return renamed, [f"renamed settings: {', '.join(notices)}"] if notices else []


def coerce(key: str, value: Any, hint: Any, choices: list | None = None) -> Any:
    """`value` as the type of the field, or a ValueError naming key, value and what was expected."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if type(None) in options:
            return None
        raise ValueError(f"{key}: needs a value; leave the line out for the default")
    names = []
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is type(None):
            continue
        names.append(getattr(origin, "__name__", str(origin)))
        converted = convert(value, origin)
        if converted is not None:
            if choices and converted not in choices:
                raise ValueError(f"{key}: {value!r} is not one of {', '.join(map(str, choices))}")
            if isinstance(option, type) and issubclass(option, enum.Enum):
                return converted.value
            return converted
        if isinstance(option, type) and issubclass(option, enum.Enum):
            raise ValueError(f"{key}: {value!r} is not one of {', '.join(str(e.value) for e in option)}")
    raise ValueError(f"{key}: {value!r} is no {' or '.join(dict.fromkeys(names))}")


def convert(value: Any, kind: type) -> Any:
    """`value` as `kind`, or None where it is not one. YAML reads 2e-4 as text, the command line everything."""
    try:
        if kind is bool:
            words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            return value if isinstance(value, bool) else words.get(value.lower()) if isinstance(value, str) else None
        if isinstance(value, bool):
            return None
        if kind is int:
            return int(float(value)) if float(value) == int(float(value)) else None
        if kind is float:
            return float(value) if float(value) == float(value) else None
        if kind is str:
            return value if isinstance(value, str) else None
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return kind(value)
        if kind in (dict, list):
            parsed = yaml.safe_load(value) if isinstance(value, str) else value
            return parsed if isinstance(parsed, kind) else None
    except (ValueError, TypeError, OverflowError, yaml.YAMLError):
        return None
    return None


def input_path(key: str, value: str) -> str:
    """An input path as given, or below the repository where it is not below the working directory."""
    below_repo = REPO / Path(value)
    if not Path(value).expanduser().exists() and not Path(value).is_absolute() and below_repo.exists():
        return str(below_repo)
    if key != "model_name_or_path" and not Path(value).expanduser().is_file():
        raise ValueError(f"{key}: no file at {value!r}; give the path of an existing file")
    return str(Path(value).expanduser()) if value.startswith("~") else value


def read_settings(train_args_file: str, words: list[str]) -> tuple[Settings, list[str]]:
    """Settings of a run and the notices to log.

    train_args_file: path of the YAML; words: the command line after it, `--key value` pairs.
    """
    path = Path(train_args_file)
    if not path.is_file():
        raise ValueError(f"--train_args_file: no file at {train_args_file!r}; give the path of a YAML in train_args/")
    # Renamed before they are laid over each other, so that an old name in the YAML gives way to the new one.
    (from_yaml, notices), (from_cli, cli_notices) = rename(read_yaml(path)), rename(read_overrides(words))
    given = {**from_yaml, **from_cli}
    owners = {key: name for name, cls in SECTIONS.items() for key in fields_of(cls)}
    unknown = [key for key in given if key not in owners]
    if unknown:
        close = difflib.get_close_matches(unknown[0], owners, n=1)
        raise ValueError(f"unknown setting {unknown[0]!r}" + (f"; did you mean {close[0]!r}?" if close else f" in {path}"))
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    values["training"].update(TRAINING_DEFAULTS)
    hints = {name: typing.get_type_hints(cls) for name, cls in SECTIONS.items()}
    for key, value in given.items():
        section = owners[key]
        choices = fields_of(SECTIONS[section])[key].metadata.get("choices")
        value = coerce(key, value, hints[section][key], choices)
        values[section][key] = input_path(key, value) if key in PATH_KEYS and isinstance(value, str) else value
    for name, key in (("model", "model_name_or_path"), ("data", "train_file"), ("training", "output_dir")):
        if not values[name].get(key):
            raise ValueError(f"{key}: missing; add `{key}: ...` to {path}")
    parts = {name: cls(**values[name]) for name, cls in SECTIONS.items() if name != "training"}
    settings = Settings(**parts, training=values["training"], given=given)
    return settings, notices + cli_notices
