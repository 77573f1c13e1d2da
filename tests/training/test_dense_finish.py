"""The dense finish: which steps train with full attention, and that a resumed run trains the same ones."""

import pytest
from conftest import NUM_STEPS, ZERO2
from training_process import losses_of, same_weights, train

from longqlora.training.dense_finish import num_sparse_steps

FOUR_STEPS_SPARSE = {"dense_finish": 0.34, "save_steps": 1, "save_total_limit": None}


@pytest.mark.parametrize("part,sparse", [(1, 0), (0.5, 3), (0.34, 4), (0.2, 5), (0.01, 5)])
def test_the_last_steps_are_dense(part, sparse):
    assert num_sparse_steps(6, part) == sparse


RUNS = {
    "plain": {},
    "rows-of-one-document": {"pack": False},
    "policy": {"memory": "balanced", "gradient_checkpointing": None},
    "all-kept": {"memory": "fast", "gradient_checkpointing": None},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "zero2": {"deepspeed": ZERO2},
    "shared-rows": {"sequence_parallel_size": 2, "num_processes": 2},
}


@pytest.fixture(params=RUNS.values(), ids=RUNS)
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
    assert [mixed[step] == sparse[step] for step in range(1, NUM_STEPS + 1)] == [True] * 4 + [False] * 2
    for step in (3, 4, 5):
        resume = ("--resume_from_checkpoint", out / f"checkpoint-{step}")
        resumed, again, log = losses(f"from{step}", *resume, **FOUR_STEPS_SPARSE)
        assert resumed == mixed and same_weights(again / "final", out / "final")
        assert log.count(f"step {max(5, step + 1)}: full causal attention") == 1
