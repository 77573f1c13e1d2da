"""The output_dir of a run: what an earlier run left is kept until it is replaced, and no second run writes there."""

import itertools
import json
import os
import resource
import shutil
import socket
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ZERO2
from safetensors.torch import save_file
from training_process import contents, fail, same_weights, start_ranks, train, wait_for

from longqlora.files import atomic_folder, write_json
from longqlora.training.resume import list_checkpoints
from longqlora.training.run_folder import lock_output_dir

RESUME, OVERWRITE = ("--resume_from_checkpoint", "true"), ("--overwrite_output_dir", "true")


@pytest.fixture
def finished_run(write_yaml):
    path, out = write_yaml(max_steps=4)
    train(path)
    return path, out


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("save_steps", [3, 100], ids=["checkpoint", "final"])
def test_overwriting_replaces_the_first_run_by_a_result(finished_run, save_steps):
    path, out = finished_run
    train(path, *OVERWRITE, "--max_steps", 3, "--save_steps", save_steps, "--learning_rate", "5e-3")
    assert [folder.name for folder in list_checkpoints(out)] == ["checkpoint-3"]
    assert json.loads((out / "train_results.json").read_text())["global_step"] == 3
    for folder in (out, out / "final"):
        record = json.loads((folder / "run_record.json").read_text())
        assert record["arguments"]["training"]["learning_rate"] == 5e-3
    log = (out / "train.log").read_text()
    assert log.count("versions:") == 1 and "finished: global_step 3" in log and "the earlier run" in log
    assert not [name for name in names_in(out) if name.endswith((".new", ".old", ".abandoned"))]


def test_an_overwriting_run_that_was_killed_before_its_end_saves_its_own_final(write_yaml):
    """Its last checkpoint is there, and `final` still the earlier run's."""
    path, out = write_yaml(max_steps=2, save_strategy="no")
    train(path)
    other_path, other = write_yaml("other", max_steps=2, seed=8)
    train(other_path)
    shutil.copytree(other / "checkpoint-2", out / "checkpoint-2")
    for is_complete in (False, True):
        log = train(path, "--seed", 8, "--save_strategy", "steps", *RESUME)
        assert same_weights(out / "final", other / "final")
        assert ("nothing left to train" in log) == is_complete


def test_resuming_before_the_last_checkpoint_keeps_the_later_one_apart(write_yaml):
    """From 4 of 2, 4, 6, with one checkpoint to keep: the newest of this run survives, not the abandoned one."""
    path, out = write_yaml(save_total_limit=None)
    train(path)
    abandoned = contents(out / "checkpoint-6")
    words = ("--save_total_limit", 1, "--save_steps", 1, "--max_steps", 5)
    log = train(path, "--resume_from_checkpoint", out / "checkpoint-4", *words)
    assert [folder.name for folder in list_checkpoints(out)] == ["checkpoint-5"]
    assert contents(out / "checkpoint-6.abandoned") == abandoned
    assert "checkpoint-6 is later than the start of this run" in log
    assert f"resuming from {out / 'checkpoint-5'}" in train(path, *RESUME, "--save_steps", 1)
    # Once more: the second one abandoned gets a name of its own.
    train(path, "--resume_from_checkpoint", out / "checkpoint-5", "--save_steps", 1, "--seed", 8)
    assert (out / "checkpoint-6").is_dir() and (out / "checkpoint-6.abandoned1").is_dir()
    assert contents(out / "checkpoint-6.abandoned") == abandoned


def test_linked_folders_of_a_run_are_replaced_not_followed(write_yaml, tmp_path):
    """Those of an earlier run too, which are links to whole checkpoints, and in a rotation."""
    path, out = write_yaml(max_steps=4, save_total_limit=1)
    out.mkdir()
    names = (".saving", "checkpoint-2", "checkpoint-9", ".checkpoint-2.old", ".final.partial", ".final.old", "final")
    for name in names:
        behind = tmp_path / f"behind-{name}"
        behind.mkdir()
        (behind / "trainer_state.json").touch()
        (out / name).symlink_to(behind, target_is_directory=True)
    train(path, *OVERWRITE)
    assert len(list(tmp_path.glob("behind-*/trainer_state.json"))) == len(names)
    assert not [folder for folder in out.iterdir() if folder.is_symlink()]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_second_run_in_one_folder_ends_at_once(write_yaml, num_processes):
    path, out = write_yaml(max_steps=10_000, save_steps=2)
    log = path.with_suffix(".first")
    ranks = start_ranks("--train_args_file", path, log=log, num_processes=num_processes)
    wait_for(log, "step 4:")
    for words in ((), RESUME, OVERWRITE):
        error = fail(path, *words, num_processes=num_processes)
        assert f"process {ranks[0].pid} on {socket.gethostname()}" in error and str(out) in error
    assert all(rank.is_alive() for rank in ranks)
    for rank in ranks:
        rank.kill()
        rank.join()
    # A killed run holds nothing.
    train(path, "--max_steps", 1, *OVERWRITE)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    no_locks = Mock(side_effect=OSError(37, "No locks available"))
    monkeypatch.setattr("longqlora.training.run_folder.fcntl.lockf", no_locks)
    file, (notice,) = lock_output_dir(tmp_path / "out")
    assert "no locks" in notice.text


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "disk that is not there")
    for path in (tmp_path / "out", "/proc/out"):
        with pytest.raises(ValueError, match=f"output_dir: cannot write in '{path}' .*; give another folder"):
            lock_output_dir(path)


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_stays_where_it_cannot_be_renamed(tmp_path, monkeypatch, number):
    """number: of the renaming that fails, the old folder's or the new one's."""
    rename, calls = Path.rename, itertools.count(1)

    def busy(path, target):
        if next(calls) == number:
            raise OSError("busy")
        return rename(path, target)

    (tmp_path / "final").mkdir()
    write_json(tmp_path / "final" / "kept", 1)
    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OSError, match="busy"), atomic_folder(tmp_path / "final"):
        pass
    assert names_in(tmp_path) == ["final"] and names_in(tmp_path / "final") == ["kept"]


# The size of a file that can be written stands in for the space on a disk.
LIMIT = 10_000


def write_weights(path: Path) -> None:
    with atomic_folder(path) as folder:
        save_file({"weight": torch.zeros(LIMIT)}, folder / "model.safetensors")


WRITERS = {"result": lambda path: write_json(path, "x" * 2 * LIMIT), "result/kept": write_weights}


@pytest.mark.parametrize("kept,write", WRITERS.items())
def test_a_writer_on_a_full_disk_leaves_what_was_there(tmp_path, kept, write):
    path, kept = tmp_path / "result", tmp_path / kept
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("before")
    # Around the write alone: pytest's own log may be a file, and longer.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        with pytest.raises(OSError, match=f"could not write '{path}'.*File too large"):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert kept.read_text() == "before" and names_in(tmp_path) == ["result"]


@pytest.mark.parametrize("deepspeed", [None, ZERO2])
def test_a_run_on_a_full_disk(write_yaml, deepspeed):
    path, out = write_yaml(max_steps=2, deepspeed=deepspeed)
    train(path)
    good = {name: contents(out / name) for name in ("checkpoint-2", "final")}
    for name, words in (("checkpoint-4", ()), ("final", ("--save_strategy", "no"))):
        error = fail(path, *RESUME, "--max_steps", 4, *words, max_file_bytes=100_000)
        assert f"could not write {name}" in error and f"last good checkpoint is {out / 'checkpoint-2'}" in error
        assert [item.name for item in list_checkpoints(out)] == ["checkpoint-2"]
        assert {name: contents(out / name) for name in good} == good
        assert not {".saving", ".final.partial"} & set(names_in(out))
