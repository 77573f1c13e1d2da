"""load_best_model_at_end: final/ is the best checkpoint, wherever it lies, and a limit on checkpoints keeps it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import REPO, sentences
from safetensors.torch import load_file
from training_process import finish, history_of, start

from longqlora.training.checkpoint import list_checkpoints

ZERO2 = str(REPO / "train_args" / "deepspeed" / "zero2.json")
GETS_WORSE = {"learning_rate": "3", "warmup_steps": 0, "finetuning_type": "full"}
RUNS = {
    "last is best": ({}, 6, ["checkpoint-6"]),
    "last is best, zero2": ({"deepspeed": ZERO2}, 6, ["checkpoint-6"]),
    "first is best": (GETS_WORSE, 2, ["checkpoint-2", "checkpoint-6"]),
}


@pytest.fixture
def evaluated(write_yaml, tmp_path):
    """Settings of a run that evaluates every second step and ends with its best checkpoint."""
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"text": sentences(200, seed=99)}))
    best = {"eval_strategy": "steps", "eval_steps": 2, "eval_file": str(path), "load_best_model_at_end": True}
    return lambda name="run", **changes: write_yaml(name, **best, **{"save_total_limit": 1, **changes})


def train(path: Path, *words: object) -> str:
    log = path.with_suffix(".out")
    log.unlink(missing_ok=True)
    finish(start("--train_args_file", path, *words, log=log), log)
    return log.read_text(errors="replace")


def same_weights(first: Path, second: Path) -> bool:
    (file,) = first.glob("*model.safetensors")
    one, other = load_file(file), load_file(second / file.name)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("changes,best,kept", RUNS.values(), ids=RUNS)
def test_final_is_the_best_checkpoint(evaluated, changes, best, kept):
    path, out = evaluated(**changes)
    log = train(path)
    scores = {entry["step"]: entry["eval_loss"] for entry in history_of(out) if "eval_loss" in entry}
    assert min(scores, key=scores.get) == best
    assert [folder.name for folder in list_checkpoints(out)] == kept
    assert same_weights(out / "final", out / f"checkpoint-{best}")
    assert "Could not locate the best model" not in log
    for folder in list_checkpoints(out):
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(out / f"checkpoint-{best}")


def test_the_best_may_lie_in_the_folder_that_a_run_was_resumed_from(evaluated):
    path, first = evaluated("first", **GETS_WORSE, save_total_limit=None)
    train(path)
    path, second = evaluated("second", **GETS_WORSE)
    train(path, "--resume_from_checkpoint", first / "checkpoint-4")
    assert same_weights(second / "final", first / "checkpoint-2")


def test_abandoned_checkpoints_are_not_counted(evaluated):
    path, out = evaluated(save_total_limit=None, max_steps=4)
    train(path)
    train(path, "--resume_from_checkpoint", out / "checkpoint-2", "--save_total_limit", 1)
    assert [folder.name for folder in list_checkpoints(out)] == ["checkpoint-4"]
    assert (out / "checkpoint-4.abandoned" / "adapter_model.safetensors").is_file()
