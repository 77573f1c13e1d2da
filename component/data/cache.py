"""The cache of tokenised files: one folder per key, memory-mapped Arrow rows beside a json report.

The key covers the file's content, the tokenizer, the settings and the code, so a stale folder is never read.
"""

import functools
import hashlib
import inspect
import json
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers
from datasets.arrow_writer import ArrowWriter

from longqlora.files import read_json, replace_folder, write_json

ROWS_NAME, REPORT_NAME = "rows.arrow", "report.json"
ROWS_PER_WRITE = 100


def cache_key(path: Path, tokenizer: Any, settings: dict[str, Any], modules: list[ModuleType]) -> str:
    """Hash of all that decides the rows of a file; `modules` hold the code that makes them."""
    decisive = {
        "content": content_hash(path),
        "settings": settings,
        "code": [inspect.getsource(module) for module in modules],
        "versions": [tokenizers.__version__, transformers.__version__],
        "tokenizer": tokenizer_state(tokenizer),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:24]


def content_hash(path: Path) -> str:
    """SHA-256 of what a file holds, computed once in a process; 300 MB take half a second."""
    found = path.stat()
    return hash_file(path, found.st_size, found.st_mtime_ns)


@functools.cache
def hash_file(path: Path, num_bytes: int, modified: int) -> str:
    """SHA-256 of a file of that size and time of modification, which make a changed file another one."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """All of a tokenizer that decides ids, wherever it was loaded from."""
    state = {
        "class": type(tokenizer).__name__,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": getattr(tokenizer, "chat_template", None),
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by earlier calls, and set anew by each.
        state["backend"] = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    else:
        vocab_file = Path(getattr(tokenizer, "vocab_file", None) or "")
        state["vocab"] = tokenizer.get_vocab()
        state["vocab_file"] = hashlib.sha256(vocab_file.read_bytes()).hexdigest() if vocab_file.is_file() else None
    return state


def load_cache(folder: Path) -> tuple[datasets.Dataset, dict[str, Any]] | None:
    """The rows and the report in `folder`; None where it is missing or damaged."""
    try:
        return datasets.Dataset.from_file(str(folder / ROWS_NAME)), read_json(folder / REPORT_NAME)
    except (OSError, ValueError):
        return None


def write_cache(
    folder: Path, rows: Iterable[dict[str, np.ndarray]], columns: list[str], report: Callable[[], dict[str, Any]]
) -> None:
    """Write int32 `rows` and then `report()`, a dict, as `folder`, which appears whole or not at all.

    The report is asked for last, since rows may be counted while they are made. The parent folder must exist.
    Several processes may write the same folder at once: the first to finish wins.
    """
    # A name of its own for each writer, since two runs may start on one file.
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        features = datasets.Features({name: datasets.Sequence(datasets.Value("int32")) for name in columns})
        arrow = str(partial / ROWS_NAME)
        with ArrowWriter(path=arrow, features=features, writer_batch_size=ROWS_PER_WRITE) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
        write_json(partial / REPORT_NAME, report())
        if load_cache(folder) is None:
            replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
