"""Turn what a YAML or a command line holds into a value of the type that a setting has."""

import difflib
import enum
import math
import types
import typing
from typing import Any

import yaml

BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
KIND_NAMES = {
    bool: "true or false", int: "a whole number", float: "a finite number", str: "text", dict: "a mapping",
    list: "a list",
}  # fmt: skip


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
        if kind in (dict, list):
            parsed = yaml.safe_load(value) if isinstance(value, str) else value
            return parsed if isinstance(parsed, kind) else None
        if kind is str:
            return value if isinstance(value, str) else None
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
