"""A run that diverges: it stops at that step, says so in one line and saves nothing of it."""

import json
import math

import pytest
import torch
from conftest import REPO, sentences
from safetensors.torch import load_file
from training_process import fail, finish, start

from longqlora.training.checkpoint import list_checkpoints
from longqlora.training.divergence import MAX_SKIPPED_STEPS, DivergenceWatch, all_finite
from longqlora.training.trainer import LongContextTrainer

ZERO2 = str(REPO / "train_args" / "deepspeed" / "zero2.json")
DIVERGES = {"learning_rate": "1e30", "warmup_steps": 0, "save_steps": 1, "save_total_limit": 9, "max_steps": 8}
RUNS = {
    "plain": {},
    "zero2": {"deepspeed": ZERO2},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "no-clipping": {"max_grad_norm": 0},
    "logging-every-10": {"logging_steps": 10, "logging_nan_inf_filter": True},
    "two-processes": {"num_processes": 2},
    "two-processes-zero2": {"num_processes": 2, "deepspeed": ZERO2},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_run_that_diverges_stops_and_saves_nothing_of_that_step(write_yaml, changes):
    settings = {**DIVERGES, **changes}
    num_processes = settings.pop("num_processes", 1)
    path, out = write_yaml(**settings)
    error = fail(path, num_processes=num_processes)
    assert "training diverged at step" in error and "learning_rate" in error
    step = int(error.split("training diverged at step ")[1].split()[0])
    checkpoints = list_checkpoints(out)
    assert (f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no earlier checkpoint") in error
    assert not (out / "final").exists() and not (out / ".saving").exists()
    assert all(int(folder.name.split("-")[1]) < step for folder in checkpoints)
    for folder in checkpoints:
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "adapter_model.safetensors").values())
    given = changes.get("logging_nan_inf_filter")
    assert ("logging_nan_inf_filter has no effect" in (out / "train.log").read_text()) == bool(given)


def test_weights_that_are_not_finite_are_not_saved(write_yaml):
    """The last step's loss is a number; what that step made of the weights is not."""
    path, out = write_yaml(learning_rate="1e39", warmup_steps=0, max_steps=1)
    assert "training diverged at step 1 (its weights are not finite)" in fail(path)
    assert not (out / "final").exists() and not list_checkpoints(out)


def test_an_evaluation_that_is_not_finite_stops_the_run(write_yaml, tmp_path):
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(json.dumps({"text": sentences(60)}))
    path, out = write_yaml(
        learning_rate="1e30",
        warmup_steps=0,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_file=str(evaluation),
    )
    error = fail(path)
    assert "training diverged at step 1 (" in error and ("eval_loss nan" in error or "weights" in error)
    assert not list_checkpoints(out)


def test_a_high_learning_rate_that_stays_finite_is_no_divergence(write_yaml):
    path, out = write_yaml(learning_rate="0.3", warmup_steps=0, save_strategy="no")
    log = path.with_suffix(".out")
    finish(start("--train_args_file", path, log=log), log)
    assert (out / "final").is_dir()


NAN, INF = math.nan, math.inf
SIGNS = [
    ("loss", NAN, 1.0, False), ("loss", INF, 1.0, False), ("gradient", 1.0, NAN, False), ("gradient", 1.0, INF, False),
    ("loss, norm unknown", NAN, None, False), ("loss in fp16, step not skipped", NAN, 1.0, True),
]  # fmt: skip


@pytest.mark.parametrize("name,loss,norm,is_fp16", SIGNS, ids=[name for name, *_ in SIGNS])
def test_watch_stops_at_the_first_value_that_is_not_finite(name, loss, norm, is_fp16):
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


def test_deepspeed_at_its_least_loss_scale_is_divergence(monkeypatch):
    def at_minimum(self, *args, **kwargs):
        raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")

    monkeypatch.setattr("transformers.Trainer.training_step", at_minimum)
    trainer = LongContextTrainer.__new__(LongContextTrainer)
    trainer.state = type("State", (), {"global_step": 4})
    trainer.earlier = type("Earlier", (), {"last_checkpoint": lambda self: "there is no earlier checkpoint"})()
    with pytest.raises(ValueError, match="diverged at step 5 .*loss scale.* minimum"):
        trainer.training_step()


@pytest.mark.parametrize("value", [NAN, INF, -INF, 6e4])
def test_all_finite(value):
    frozen, trained = torch.nn.Parameter(torch.tensor([NAN]), requires_grad=False), torch.nn.Parameter(torch.ones(3))
    shard = torch.nn.Parameter(torch.empty(0))
    shard.ds_tensor = torch.tensor([1.0, value, 2.0], dtype=torch.float16)
    assert all_finite([frozen, trained])
    assert all_finite([frozen, trained, shard]) == math.isfinite(value)
