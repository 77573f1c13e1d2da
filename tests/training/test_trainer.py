"""The trainer: which methods of transformers it overrides, where it stops, and which checkpoint is the best."""

import json
import math
import re
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ZERO2, sentences
from training_process import fail, history_of, same_weights, train, weights_of
from transformers import Trainer

from longqlora.training.checks import check_num_rows
from longqlora.training.resume import list_checkpoints
from longqlora.training.trainer import MAX_SKIPPED_STEPS, DivergenceWatch, LongContextTrainer, all_finite

NAN, INF = math.nan, math.inf


def test_only_public_methods_of_transformers_are_overridden():
    """Private ones change without notice. Each override must also still be there for transformers to call."""
    own = {name for name in vars(LongContextTrainer) if not name.startswith("__")}
    private = {name for name in own if name.startswith("_") and hasattr(Trainer, name)}
    assert not private, f"LongContextTrainer overrides {private}, private to transformers: use a public method"
    seams = {
        "get_train_dataloader", "get_total_train_batch_size", "get_batch_samples", "training_step", "evaluate",
        "prediction_step", "log", "save_model",
    }  # fmt: skip
    gone = {name for name in seams if not hasattr(Trainer, name)}
    assert not gone, f"this transformers has no Trainer.{', '.join(gone)}: what trainer.py overrides is never called"
    assert {name for name in own if hasattr(Trainer, name)} == seams


DIVERGES = {"learning_rate": "1e30", "warmup_steps": 0, "save_steps": 1, "save_total_limit": 9, "max_steps": 8}
DIVERGING_RUNS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "no-clipping": {"max_grad_norm": 0},
    # Nothing is saved, so only the loss and the gradients can tell.
    "not-saved": {"save_strategy": "no"},
    "not-saved-zero2": {"save_strategy": "no", "deepspeed": ZERO2},
    "logging-every-10": {"logging_steps": 10, "logging_nan_inf_filter": True},
    "two-processes": {"num_processes": 2},
    "two-processes-zero2": {"num_processes": 2, "deepspeed": ZERO2},
    # The only step's loss is a number; what that step made of the weights is not.
    "weights": {"learning_rate": "1e39", "max_steps": 1},
}


@pytest.mark.parametrize("changes", DIVERGING_RUNS.values(), ids=DIVERGING_RUNS)
def test_a_run_that_diverges_stops_and_saves_nothing_of_that_step(write_yaml, changes):
    settings = {**DIVERGES, **changes}
    num_processes = settings.pop("num_processes", 1)
    path, out = write_yaml(**settings)
    error = fail(path, num_processes=num_processes)
    step = int(re.search(r"training diverged at step (\d+) .*learning_rate", error)[1])
    assert ("its weights are not finite" in error) or "max_steps" not in changes
    assert "save_strategy" not in changes or ("(loss " in error and step < settings["max_steps"])
    checkpoints = list_checkpoints(out)
    assert (f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no earlier checkpoint") in error
    assert not (out / "final").exists() and not (out / ".saving").exists()
    for folder in checkpoints:
        assert int(folder.name.split("-")[1]) < step
        assert all(tensor.isfinite().all() for tensor in weights_of(folder).values())
    given = changes.get("logging_nan_inf_filter")
    assert ("logging_nan_inf_filter has no effect" in (out / "train.log").read_text()) == bool(given)


@pytest.mark.parametrize(
    "loss,norm,is_fp16",
    [(NAN, 1.0, False), (INF, 1.0, False), (1.0, NAN, False), (1.0, INF, False), (NAN, None, False), (NAN, 1.0, True)],
)
def test_watch_stops_at_the_first_value_that_is_not_finite(loss, norm, is_fp16):
    """In fp16, at a loss whose step was not skipped."""
    watch = DivergenceWatch()
    watch.add(torch.tensor(2.0))
    assert watch.end_step(1.0, is_fp16=is_fp16) is None
    # One micro-batch of three.
    returned = [watch.add(torch.tensor(value)).item() for value in (1.0, loss, 1.0)]
    assert all(map(math.isfinite, returned))
    sign = watch.end_step(norm and torch.tensor(norm), is_fp16=is_fp16)
    assert sign and sign.startswith("loss ")


def test_watch_lets_fp16_skip_steps_but_not_without_end():
    watch = DivergenceWatch()

    def step(norm: float, loss: float = 1.0) -> str | None:
        watch.add(torch.tensor(loss))
        return watch.end_step(norm, is_fp16=True)

    assert [step(INF) for _ in range(MAX_SKIPPED_STEPS - 1)] == [None] * (MAX_SKIPPED_STEPS - 1)
    assert step(1.0) is None
    assert [step(INF, NAN) for _ in range(MAX_SKIPPED_STEPS - 1)] == [None] * (MAX_SKIPPED_STEPS - 1)
    assert step(INF) == f"fp16 skipped {MAX_SKIPPED_STEPS} steps in a row"


def test_each_loss_is_logged_once_with_speed_and_memory(write_yaml, train_file):
    changes = {"eval_strategy": "steps", "eval_steps": 2, "eval_file": str(train_file)}
    path, out = write_yaml(max_steps=4, logging_steps=2, disable_tqdm=False, pack=True, **changes)
    printed, history = train(path), history_of(out)
    assert printed.count("step 2: loss") == printed.count("step 4: loss") == printed.count("step 4: eval_loss") == 1
    assert "'loss'" not in printed and "'eval_loss'" not in printed and "4/4" in printed
    assert (out / "train.log").read_text().count(": loss ") == 2
    for entry in (entry for entry in history if "loss" in entry):
        # Tokens of two steps of two rows of 128, in less than the time of the run.
        runtime = next(x["train_runtime"] for x in history if "train_runtime" in x)
        assert 2 * 2 * 128 / runtime < entry["tokens_per_second"] < 1e6
        assert entry["peak_gpu_memory_gib" if torch.cuda.is_available() else "host_memory_gib"] > 0


def test_what_else_ends_training(monkeypatch):
    # As DeepSpeed says that fp16 cannot go on.
    at_minimum = Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")
    monkeypatch.setattr("transformers.Trainer.training_step", Mock(side_effect=at_minimum))
    monkeypatch.setattr("transformers.Trainer.evaluate", lambda self: {"eval_loss": NAN})
    trainer = LongContextTrainer.__new__(LongContextTrainer)
    folder = SimpleNamespace(last_checkpoint=lambda: "there is no earlier checkpoint")
    vars(trainer).update(folder=folder, start_up_seconds=1.0, state=SimpleNamespace(global_step=4))
    with pytest.raises(ValueError, match="diverged at step 5 .*loss scale.* minimum"):
        trainer.training_step(None, {})
    with pytest.raises(ValueError, match="diverged at step 4 .eval_loss nan"):
        trainer.evaluate()


@pytest.mark.parametrize("value", [NAN, INF, -INF, 6e4])
def test_all_finite(value):
    frozen, trained = torch.nn.Parameter(torch.tensor([NAN]), requires_grad=False), torch.nn.Parameter(torch.ones(3))
    shard = torch.nn.Parameter(torch.empty(0))
    shard.ds_tensor = torch.tensor([1.0, value, 2.0], dtype=torch.float16)
    assert all_finite([frozen, trained])
    assert all_finite([frozen, trained, shard]) == math.isfinite(value)


def test_too_few_rows_are_refused_before_the_model_loads(write_yaml):
    path, out = write_yaml(per_device_train_batch_size=640, dataloader_drop_last=True)
    assert "dataloader_drop_last: train_file makes" in fail(path)
    assert "trainable" not in (out / "train.log").read_text() and not (out / "final").exists()
    arguments = SimpleNamespace(train_batch_size=1, eval_batch_size=8, world_size=2, dataloader_drop_last=True)
    for enough in (None, 16):
        check_num_rows(arguments, 2, enough, processes_per_row=1)
    with pytest.raises(ValueError, match="eval_file makes 15 rows, a batch of all processes takes 16"):
        check_num_rows(arguments, 2, 15, processes_per_row=1)


GETS_WORSE = {"learning_rate": "3", "warmup_steps": 0, "finetuning_type": "full"}
BEST = {
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
    return partial(write_yaml, **best)


@pytest.mark.parametrize("changes,best,kept", BEST.values(), ids=BEST)
def test_final_is_the_best_checkpoint(evaluated, changes, best, kept):
    path, out = evaluated(**changes, save_total_limit=1)
    assert "Could not locate the best model" not in train(path)
    scores = {entry["step"]: entry["eval_loss"] for entry in history_of(out) if "eval_loss" in entry}
    assert min(scores, key=scores.get) == best
    assert [folder.name for folder in list_checkpoints(out)] == kept
    assert same_weights(out / "final", out / f"checkpoint-{best}")
    for folder in list_checkpoints(out):
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(out / f"checkpoint-{best}")


def test_the_best_may_lie_in_the_folder_that_a_run_was_resumed_from(evaluated):
    path, first = evaluated("first", **GETS_WORSE, save_total_limit=None)
    train(path)
    path, second = evaluated("second", **GETS_WORSE, save_total_limit=1)
    train(path, "--resume_from_checkpoint", first / "checkpoint-4")
    assert same_weights(second / "final", first / "checkpoint-2")


def test_a_sampling_strategy_that_gives_each_process_rows_of_its_own_is_refused(write_yaml):
    path, _ = write_yaml(train_sampling_strategy="batch_rebalance", sequence_parallel_size=2)
    assert "train_sampling_strategy: 'batch_rebalance'" in fail(path, num_processes=2)
