"""A second run into one output_dir: what the first left is refused, kept or replaced, never lost before."""

import json
import os
import shutil
from pathlib import Path

import pytest
from training_process import fail, finish, start

from longqlora.training.checkpoint import list_checkpoints, rotate
from longqlora.training.earlier_run import EarlierRun

OVERWRITE = ("--overwrite_output_dir", "true")


def train(path: Path, *arguments: object) -> None:
    log = path.with_suffix(".out")
    finish(start("--train_args_file", path, *arguments, log=log), log)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but the lock and the log of a later attempt."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ".lock" and not name.endswith(".new")}


@pytest.fixture
def finished_run(write_yaml):
    path, out = write_yaml(max_steps=4)
    train(path)
    return path, out


def test_a_second_run_is_refused(finished_run):
    path, out = finished_run
    before = contents(out)
    assert "holds checkpoint-4 and final" in fail(path)
    assert contents(out) == before
    shutil.rmtree(out / "checkpoint-2")
    shutil.rmtree(out / "checkpoint-4")
    before = contents(out)
    for words in ((), ("--resume_from_checkpoint", "true")):
        error = fail(path, *words)
        assert "holds final of an earlier run; add --overwrite_output_dir true" in error
    assert contents(out) == before


def test_resuming_from_another_folder_does_not_mix_two_runs(finished_run, write_yaml):
    path, out = finished_run
    _, other = write_yaml("other")
    shutil.copytree(out / "checkpoint-2", other / "checkpoint-2")
    before = contents(out)
    assert "holds checkpoint-4 and final" in fail(path, "--resume_from_checkpoint", other / "checkpoint-2")
    assert contents(out) == before


def test_a_second_run_that_fails_leaves_the_first_as_it_was(finished_run, tiny_model_dir, tmp_path):
    path, out = finished_run
    before = contents(out)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    (broken / "model.safetensors").write_bytes(b"cut off")
    log = path.with_suffix(".failed")
    process = start("--train_args_file", path, *OVERWRITE, "--model_name_or_path", broken, log=log)
    process.join(120)
    assert process.exitcode not in (0, None)
    assert contents(out) == before
    # Diverged before its first checkpoint, and before its end without any.
    for save in ("steps", "no"):
        fail(path, *OVERWRITE, "--learning_rate", "1e30", "--warmup_steps", 0, "--save_strategy", save)
        assert contents(out) == before


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
    assert log.count("versions:") == 1 and "finished: global_step 3" in log
    assert "the earlier run" in log and not [path for path in out.iterdir() if path.name.endswith((".new", ".old"))]
    assert not (out / ".overwritten").exists()


def test_an_overwriting_run_that_was_killed_before_its_end_saves_its_own_final(write_yaml):
    """Its last checkpoint is there, and `final` still the earlier run's."""
    path, out = write_yaml(max_steps=2, save_strategy="no")
    train(path)
    other_path, other = write_yaml("other", max_steps=2, seed=8)
    train(other_path)
    shutil.copytree(other / "checkpoint-2", out / "checkpoint-2")
    words = ("--seed", 8, "--save_strategy", "steps", "--resume_from_checkpoint", "true")
    for is_complete in (False, True):
        path.with_suffix(".out").unlink()
        train(path, *words)
        assert (
            contents(out / "final")["adapter_model.safetensors"]
            == contents(other / "final")["adapter_model.safetensors"]
        )
        assert ("nothing left to train" in path.with_suffix(".out").read_text()) == is_complete


def test_resuming_before_the_last_checkpoint_keeps_the_later_one_apart(write_yaml):
    """From 4 of 2, 4, 6, with one checkpoint to keep: the newest of this run survives, not the abandoned one."""
    path, out = write_yaml(save_total_limit=None)
    train(path)
    abandoned = contents(out / "checkpoint-6")
    words = ("--resume_from_checkpoint", out / "checkpoint-4", "--save_total_limit", 1, "--save_steps", 1)
    train(path, *words, "--max_steps", 5)
    assert [folder.name for folder in list_checkpoints(out)] == ["checkpoint-5"]
    assert contents(out / "checkpoint-6.abandoned") == abandoned
    assert "checkpoint-6 lies behind the start of this run" in (out / "train.log").read_text()
    train(path, "--resume_from_checkpoint", "true", "--save_steps", 1)
    assert f"resuming from {out / 'checkpoint-5'}" in (out / "train.log").read_text()
    assert (out / "checkpoint-6").is_dir() and contents(out / "checkpoint-6.abandoned") == abandoned


def checkpoint(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "trainer_state.json").write_text("{}")
    return folder / name


def test_abandoned_checkpoints_get_names_of_their_own(tmp_path):
    for expected in ("checkpoint-6.abandoned", "checkpoint-6.abandoned1"):
        start, late = (tmp_path / "checkpoint-4"), checkpoint(tmp_path, "checkpoint-6")
        start.is_dir() or checkpoint(tmp_path, "checkpoint-4")
        earlier = EarlierRun(tmp_path, start)
        assert earlier.checkpoints == [late] and expected in earlier.describe()[0]
        assert earlier.last_checkpoint().endswith("checkpoint-4")
        earlier.step_aside()
        assert (tmp_path / expected).is_dir() and not late.exists()


def test_a_linked_checkpoint_is_never_followed(tmp_path):
    """Deleting a checkpoint that is a symbolic link deletes the link."""
    out, behind = tmp_path / "out", checkpoint(tmp_path, "elsewhere")
    for number in (2, 4):
        out.mkdir(exist_ok=True)
        (out / f"checkpoint-{number}").symlink_to(behind, target_is_directory=True)
    checkpoint(out, "checkpoint-6")
    rotate(out, 1)
    assert sorted(os.listdir(out)) == ["checkpoint-6"]
    (out / "checkpoint-2").symlink_to(behind, target_is_directory=True)
    earlier = EarlierRun(out, None)
    for name in ("train.log", "run_record.json"):
        earlier.place(name).touch()
    earlier.step_aside()
    earlier.give_way()
    assert sorted(os.listdir(out)) == ["run_record.json", "train.log"]
    assert (behind / "trainer_state.json").is_file()


def test_linked_folders_of_a_run_are_replaced_not_followed(write_yaml, tmp_path):
    path, out = write_yaml(max_steps=2)
    out.mkdir()
    behind = []
    for name in (".saving", "checkpoint-2", ".checkpoint-2.old", ".final.partial", ".final.old"):
        behind.append(tmp_path / f"behind{name}")
        behind[-1].mkdir()
        (behind[-1] / "precious").touch()
        (out / name).symlink_to(behind[-1], target_is_directory=True)
    train(path)
    assert all((folder / "precious").is_file() and len(list(folder.iterdir())) == 1 for folder in behind)
    assert not (out / "checkpoint-2").is_symlink() and not (out / "final").is_symlink()
