"""Outputs that appear whole or not at all: written under a temporary name, then renamed."""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from longqlora.reading import cause_of


def partial_name(path: Path) -> Path:
    """The temporary name beside `path` (same file system, so that the rename is atomic)."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def partial_output(path: Path) -> Iterator[Path]:
    """Yield the temporary name of `path`, free; what stands there is removed when the block fails.

    A failed write that does not say to which file becomes an OSError that names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    remove(partial)
    try:
        yield partial
    except BaseException as error:
        remove(partial)
        is_unnamed = isinstance(error, OSError) and error.errno and not error.filename
        if is_unnamed or isinstance(error, SafetensorError) and str(error).startswith("Error while serializing"):
            raise OSError(f"could not write {str(path)!r} ({error})") from error.__cause__
        raise


@contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file that takes the place of `path` when the block ends without error."""
    with partial_output(Path(path)) as partial:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new temporary folder that takes the place of `path` when the block ends without error."""
    with partial_output(Path(path)) as partial:
        partial.mkdir()
        yield partial
        replace_folder(partial, Path(path))


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`; what stood there is removed only afterwards, and comes back where that fails."""
    old = target.with_name(f".{target.name}.old")
    remove(old)
    if os.path.lexists(target):
        target.rename(old)
    try:
        source.rename(target)
    except OSError:
        if os.path.lexists(old):
            old.rename(target)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Delete a folder, a file or a symbolic link, as far as possible; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike, flag: str = "file") -> dict[str, Any]:
    """The JSON object in a file; `flag` names the option that gave it, for the error."""
    data = Path(path).read_bytes()
    try:
        value = json.loads(data)
    # Of a number with thousands of digits, and of nesting, json raises errors of their own.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{flag}: {str(path)!r} is not valid JSON ({cause_of(error)}); correct it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{flag}: {str(path)!r} holds no JSON object; give a file that does")
    return value


def decode_utf8(data: bytes, flag: str, path: str) -> str:
    """Text of a file or stream without its byte order mark; `flag` and `path` name it in the ValueError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{flag}: {path!r} is not UTF-8 text ({where}); save it as UTF-8") from None


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of what a file holds, computed once in a process while the file stays as it is."""
    status = os.stat(path)
    return _sha256(os.fspath(path), status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256(path: str, num_bytes: int, modified: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
