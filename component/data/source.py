"""Where rows come from: jsonl files, arrays in json files, parquet files, and data sets of the Hugging Face hub.

All are read row by row, with flat memory: files by the place of each row in them, tables memory-mapped by `datasets`.
"""

import functools
import hashlib
import mmap
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np

from longqlora.cli import require_file
from longqlora.data.jsonl import UTF8_BOM, error_at, is_blank, parse_line
from longqlora.files import file_sha256
from longqlora.settings.config import HUB_NAME, DataConfig

T = TypeVar("T")
ARRAY_SUFFIX, TABLE_SUFFIX = ".json", ".parquet"
# What a JSON array is made of outside of its numbers and words; a string counts as one piece.
JSON_PIECE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)


@dataclass(frozen=True)
class Source(ABC):
    """One file or data set. name: as given; flag: key that gave it; unit: what its rows are called in errors."""

    name: str
    flag: str
    unit: str

    @property
    @abstractmethod
    def content(self) -> str:
        """What changes with the rows, and with nothing else."""

    @abstractmethod
    def index(self) -> dict[str, Any]:
        """Where the rows are: columns "number", counted from 1, and what else `read` needs."""

    @abstractmethod
    def read(self, place: dict[str, int]) -> dict[str, Any]:
        """The row at a place of the index. Raises ValueError."""

    def places(self) -> dict[str, Any]:
        """`index`, with a row at least."""
        index = self.index()
        if not len(index["number"]):
            raise ValueError(f"{self.flag}: {self.name} is empty; give rows in one of the forms of data/README.md")
        return index

    def parsed(self, place: dict[str, int], parse: Callable[[dict], T]) -> T:
        """What `parse` makes of the row at `place`; its ValueError becomes one that names source and row."""
        try:
            return parse(self.read(place))
        except ValueError as error:
            raise error_at(self.name, place["number"], error, flag=self.flag, unit=self.unit) from None

    def check(self, parse: Callable[[dict], Any]) -> None:
        """Parse every row."""
        index = self.places()
        for place in zip(*index.values(), strict=True):
            self.parsed(dict(zip(index, place, strict=True)), parse)


@dataclass(frozen=True)
class FileSource(Source):
    """A jsonl file, whose rows are lines, or a json file that holds an array of objects."""

    @property
    def content(self) -> str:
        return file_sha256(self.name)

    def index(self) -> dict[str, array]:
        """Columns number, offset and size, both in bytes."""
        columns = {name: array("q") for name in ("number", "offset", "size")}
        for place in array_places(self.name, self.flag) if self.unit == "row" else line_places(self.name):
            for column, value in zip(columns.values(), place, strict=True):
                column.append(value)
        return columns

    def read(self, place: dict[str, int]) -> dict[str, Any]:
        with open(self.name, "rb") as file:
            file.seek(place["offset"])
            return parse_line(file.read(place["size"]))


@dataclass(frozen=True)
class TableSource(Source):
    """A parquet file or a data set of the hub, as `datasets` keeps them in its cache."""

    table: datasets.Dataset = field(repr=False)

    @property
    def content(self) -> str:
        # Of a file its own, so that a record tells it wherever it was read.
        return file_sha256(self.name) if os.path.isfile(self.name) else self.table._fingerprint

    def index(self) -> dict[str, np.ndarray]:
        return {"number": np.arange(1, len(self.table) + 1)}

    def read(self, place: dict[str, int]) -> dict[str, Any]:
        return self.table[int(place["number"]) - 1]


def line_places(path: str) -> Iterator[tuple[int, int, int]]:
    """Number, offset and size of the lines of a file that are not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not is_blank(line):
                yield number, offset, len(line)
            offset += len(line)


def array_places(path: str, flag: str) -> Iterator[tuple[int, int, int]]:
    """Number, offset and size of what stands between the commas of a JSON array. The rows themselves are not parsed."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        number, depth, start, end = 1, 0, 0, None
        for piece in JSON_PIECE.finditer(text):
            sign = text[piece.start() : piece.start() + 1]
            if sign in b"[{":
                depth += 1
                start = piece.end() if depth == 1 else start
            depth -= sign in b"]}"
            is_end = depth == 0 and sign in b"]}"
            if (is_end or (depth == 1 and sign == b",")) and (number > 1 or text[start : piece.start()].strip()):
                yield number, start, piece.start() - start
                number, start = number + 1, piece.end()
            if is_end:
                end = piece.end()
                break
        if end is None or text[end:].strip():
            what = "does not end" if end is None else "is followed by something else"
            raise ValueError(f"{flag}: {path}: the JSON array {what} after row {number - 1}; correct the file")


def sources_of(config: DataConfig, flag: str) -> list[Source]:
    """The sources that the key `flag` names, in order."""
    return [open_source(name, flag, cache_dir=config.data_cache_dir) for name in config.files[flag]]


def open_source(name: str, flag: str, *, cache_dir: str | None = None) -> Source:
    """The source of a path or of `org/name[:split]`. cache_dir: where tables are kept, of `datasets` by default.

    Raises ValueError for what is not there or cannot be read.
    """
    path = Path(name)
    if not path.is_file() and HUB_NAME.fullmatch(name):
        repository, _, split = name.partition(":")
        return TableSource(name, flag, "row", load_table(repository, flag, split=split or "train", cache_dir=cache_dir))
    require_file(path, flag)
    if path.suffix.lower() == TABLE_SUFFIX:
        table = load_table("parquet", flag, data_files=name, split="train", cache_dir=cache_dir)
        return TableSource(name, flag, "row", table)
    with path.open("rb") as file:
        is_array = path.suffix.lower() == ARRAY_SUFFIX and file.read(4096).removeprefix(UTF8_BOM).lstrip()[:1] == b"["
    return FileSource(name, flag, "row" if is_array else "line")


@functools.lru_cache(maxsize=64)
def load_table(path: str, flag: str, **options: Any) -> datasets.Dataset:
    """`datasets.load_dataset`, which downloads or converts what its cache lacks; any failure is a ValueError."""
    name = options.get("data_files") or f"{path}:{options['split']}"
    try:
        return datasets.load_dataset(path, **options)
    # Behind it are the hub's client, readers of many formats and Arrow, each with errors of its own.
    except Exception as error:
        cause = error.__cause__ or error
        what = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        fix = "give a parquet file that is whole" if "data_files" in options else "give a file, or org/name[:split]"
        raise ValueError(f"{flag}: {name!r} cannot be read ({what}); {fix}") from None


def joint_content(sources: list[Source]) -> str:
    """The content of one source, or the SHA-256 of those of several."""
    contents = [source.content for source in sources]
    return contents[0] if len(contents) == 1 else hashlib.sha256("\n".join(contents).encode()).hexdigest()
