"""The dense finish: which steps train with full attention, and that a resumed run trains the same ones."""

import pytest
from conftest import NUM_STEPS, REPO, ZERO2
from training_process import losses_of, same_weights, train

from longqlora.files import read_json
from longqlora.training.dense_finish import num_sparse_steps

ZERO3 = str(REPO / "train_args" / "deepspeed" / "zero3.json")
FOUR_STEPS_SPARSE = {"dense_finish": 0.34, "save_steps": 1, "save_total_limit": None}


@pytest.mark.parametrize("part,sparse", [(1, 0), (0.5, 3), (0.34, 4), (0.2, 5), (0.01, 5)])
def test_the_last_steps_are_dense(part, sparse):
    assert num_sparse_steps(6, part) == sparse


slow = pytest.mark.slow
RUNS = {
    "plain": ({}, ()),
    "policy-zero2": ({"memory": "balanced", "gradient_checkpointing": None, "deepspeed": ZERO2}, slow),
    "rows-of-one-document": ({"pack": False}, slow),
    "all-kept": ({"memory": "fast", "gradient_checkpointing": None}, slow),
    "by-epochs": ({"max_steps": None, "num_train_epochs": 0.27, "gradient_accumulation_steps": 1}, slow),
    "accumulated": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}, slow),
    "zero2": ({"deepspeed": ZERO2}, slow),
    "zero3": ({"deepspeed": ZERO3, "finetuning_type": "lora"}, slow),
    "shared-rows": ({"sequence_parallel_size": 2, "num_processes": 2}, slow),
}


@pytest.fixture(params=[pytest.param(changes, marks=marks, id=name) for name, (changes, marks) in RUNS.items()])
def losses(request, write_yaml):
    """losses(name, **changes): losses by step of a run, and its output_dir."""
    options = dict(request.param)
    num_processes = options.pop("num_processes", 1)

    def run(name: str, *words, **changes):
        path, out = write_yaml(name, **options, **changes)
        log = train(path, *words, num_processes=num_processes)
        return losses_of(out), out, log

    return run


def test_steps_are_those_of_s2_and_then_of_full_attention(losses):
    """The first are bit by bit those of a run without it; all of them with `dense_finish: 1` those of full attention.

    A run that is resumed before, at and behind the switch ends with the same bits.
    """
    sparse, _, log = losses("sparse", dense_finish=0.0)
    assert "full causal attention" not in log
    full, dense_out, _ = losses("full", attention="full")
    always, always_out, _ = losses("always", dense_finish=1)
    assert always == full and same_weights(always_out / "final", dense_out / "final")
    mixed, out, log = losses("mixed", **FOUR_STEPS_SPARSE)
    assert log.count("step 5: full causal attention") == 1 and "dense_finish: 0.34" in log
    records = [out / name for name in ("run_record.json", "checkpoint-3/run_record.json", "train_results.json")]
    assert [read_json(record, "")["first_dense_step"] for record in (*records, always_out / records[0].name)] == [
        5
    ] * 3 + [1]
    assert [mixed[step] == sparse[step] for step in range(1, NUM_STEPS + 1)] == [True] * 4 + [False] * 2
    for step in (3, 4, 5):
        resume = ("--resume_from_checkpoint", out / f"checkpoint-{step}")
        resumed, again, log = losses(f"from{step}", *resume, **FOUR_STEPS_SPARSE)
        assert resumed == mixed and same_weights(again / "final", out / "final")
        assert log.count(f"step {max(5, step + 1)}: full causal attention") == 1


def test_a_dry_run_says_where_the_steps_become_dense(write_yaml, run_in_process):
    for changes, text in (({}, "step 5 of 6"), ({"max_steps": None}, "its last steps")):
        path, _ = write_yaml("dry", **{**FOUR_STEPS_SPARSE, **changes})
        code, out, _ = run_in_process("train.py", "--train_args_file", path, "--dry_run")
        assert code == 0 and f"full causal attention (SDPA) from {text} on (dense_finish: 0.34)" in out


def test_more_steps_on_resume_move_the_switch(write_yaml):
    """Also where the run that stopped was dense already."""
    path, out = write_yaml("run", **FOUR_STEPS_SPARSE)
    train(path)
    path, _ = write_yaml("run", **{**FOUR_STEPS_SPARSE, "max_steps": 9})
    longer = train(path, "--resume_from_checkpoint", "true")
    assert "step 7: full causal attention" in longer and sorted(losses_of(out)) == list(range(1, 10))
