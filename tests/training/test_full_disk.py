"""A disk that fills up: what was half-written is removed, what existed stays, and one line says so.

A limit on the size of a file stands in for the disk.
"""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import save_file
from training_process import fail, finish, start

from longqlora.files import atomic_file, atomic_folder, write_json
from longqlora.training.checkpoint import list_checkpoints

LIMIT = 10_000
TOO_MUCH = "x" * (2 * LIMIT)


@contextmanager
def full_disk():
    """Around the write alone: pytest's own log may be a file, and longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_text(path: Path) -> None:
    with atomic_file(path) as file:
        file.write(TOO_MUCH)


def write_bytes(path: Path) -> None:
    with atomic_file(path, "wb") as file:
        file.write(TOO_MUCH.encode())


def write_folder(path: Path) -> None:
    with atomic_folder(path) as folder:
        (folder / "small").write_text("done")
        (folder / "large").write_text(TOO_MUCH)


def write_weights(path: Path) -> None:
    with atomic_folder(path) as folder:
        save_file({"weight": torch.zeros(LIMIT)}, folder / "model.safetensors")


WRITERS = [write_text, write_bytes, lambda path: write_json(path, TOO_MUCH), write_folder, write_weights]


@pytest.mark.parametrize("write", WRITERS)
def test_writers_leave_what_was_there(tmp_path, write):
    path = tmp_path / "result"
    if write in (write_folder, write_weights):
        path.mkdir()
        path = path / "kept"
    path.write_text("before")
    with pytest.raises(OSError, match=f"could not write '{tmp_path / 'result'}'.*File too large"), full_disk():
        write(tmp_path / "result")
    assert path.read_text() == "before" and [item.name for item in tmp_path.iterdir()] == ["result"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("deepspeed", [None, str(REPO / "train_args" / "deepspeed" / "zero2.json")])
def test_a_run_on_a_full_disk(write_yaml, deepspeed):
    path, out = write_yaml(max_steps=2, deepspeed=deepspeed)
    log = path.with_suffix(".out")
    finish(start("--train_args_file", path, log=log), log)
    good = {name: contents(out / name) for name in ("checkpoint-2", "final")}
    resume = ("--resume_from_checkpoint", "true", "--max_steps", 4)
    for name, words in (("checkpoint-4", ()), ("final", ("--save_strategy", "no"))):
        error = fail(path, *resume, *words, max_file_bytes=100_000)
        assert f"could not write {name}" in error and f"last good checkpoint is {out / 'checkpoint-2'}" in error
        assert [item.name for item in list_checkpoints(out)] == ["checkpoint-2"]
        assert {name: contents(out / name) for name in good} == good
        assert not {item.name for item in out.iterdir()} & {".saving", ".final.partial"}
