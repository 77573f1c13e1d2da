"""The lines of jsonl files: every error names the key, the file, the line, and the fix."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
UTF8_BOM = b"\xef\xbb\xbf"


def read_rows(
    lines: Iterable[bytes], path: str | os.PathLike, *, flag: str, parse: Callable[[dict], T] = dict, first: int = 1
) -> Iterator[tuple[int, T]]:
    """(line number, parsed object) of the lines of the file `path`; blank lines and byte order marks are passed over.

    Raises ValueError "<flag>: <path> line 17: <what>; <fix>" for a line that is no JSON object, or that `parse` refuses
    with a ValueError. flag: the option or YAML key that gave the path; first: number of the first line.
    """
    for number, line in enumerate(lines, start=first):
        if not is_blank(line):
            try:
                row = parse(parse_line(line))
            except ValueError as error:
                raise error_at(path, number, error, flag=flag) from None
            yield number, row


def is_blank(line: bytes) -> bool:
    return not line.removeprefix(UTF8_BOM).strip()


def error_at(
    path: str | os.PathLike, number: int, error: Exception | str, *, flag: str, unit: str = "line"
) -> ValueError:
    """The ValueError for what is wrong with one line or row of a file."""
    return ValueError(f"{flag}: {Path(path)} {unit} {number}: {error}")


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object on a line of a jsonl file, or in an array. Raises ValueError saying what is there instead."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the row); save the file as UTF-8") from None
    try:
        row = json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deep; give one flat object per row") from None
    except ValueError as error:
        fix = (
            "jsonl has one object per line, so write no array"
            if text.lstrip().startswith(("[", "]"))
            else "correct the line"
        )
        raise ValueError(f"not valid JSON ({error}); {fix}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object; give one object per row")
    return row
