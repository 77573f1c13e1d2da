"""The demo's claims, its commands side by side, and that all models are measured on the same windows."""

import copy
import sys
import time

import pytest
import yaml
from conftest import REPO
from rigged_model import load_script

demo = load_script("script/demo.py")
REPORT = {
    "perplexity": {
        "base": {"256": 10.0, "512": 16.0, "1024": 35.0}, "base + DCA": {"256": 10.0, "512": 9.0, "1024": 8.5},
        "adapter": {"256": 10.2, "512": 8.9, "1024": 8.1}, "merged, NF4 weights": {"256": 9.0, "512": 8.0, "1024": 7.0},
    },
    "loss_by_quarter": {"adapter": [2.3, 2.1, 2.15, 2.05]},
    "loss_beyond_256": {"base": 4.0, "adapter": 2.1},
    "merge_difference_nf4": 1e-7,
}  # fmt: skip


def test_the_claims_hold_for_a_good_report():
    assert demo.check(REPORT) == []


@pytest.mark.parametrize(
    ("path", "value", "claim"),
    [
        (("perplexity", "adapter", "1024"), 8.5, "adapter at 1024: perplexity below"),
        (("perplexity", "base + DCA", "512"), 8.8, "adapter at 512: perplexity below"),
        (("perplexity", "base", "512"), 8.8, "adapter at 512: perplexity below"),
        (("perplexity", "adapter", "256"), 10.4, "at most 3% above the base's"),
        (("loss_by_quarter", "adapter"), [2.3, 2.1, 2.31, 2.05], "loss falls with position"),
        (("loss_by_quarter", "adapter"), [2.3, 2.1, 2.15, 2.11], "loss falls with position"),
        (("loss_beyond_256", "adapter"), 3.6, "at least 0.5 nat below"),
        (("merge_difference_nf4",), 2e-3, "merged into NF4 weights"),
    ],
)
def test_each_claim_can_fail(path, value, claim):
    report = copy.deepcopy(REPORT)
    place = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    [failed] = demo.check(report)
    assert claim in failed


def test_the_loss_of_positions_is_weighted_by_their_tokens():
    blocks = [(1, 4, 3, 5.0), (4, 6, 2, 1.0), (6, 8, 6, 2.0)]
    result = {"loss_by_position": [dict(zip(("start", "end", "num_tokens", "loss"), b, strict=True)) for b in blocks]}
    assert demo.mean_loss(result, 4, 8) == pytest.approx((2 * 1 + 6 * 2) / 8)
    assert demo.mean_loss(result, 0, 4) == 5


def python(code: str) -> tuple[str, str, str]:
    return sys.executable, "-c", code


def test_lanes_share_the_cores(monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(6))
    steps = demo.Steps()
    show = python("import os, sys; print(os.environ['OMP_NUM_THREADS'], end=''); print('a bar', file=sys.stderr)")
    lanes = (lambda: steps.run("a", *show), lambda: steps.run("b", *show, has_bar=False))
    assert steps.side_by_side(*lanes) == ["3", "3"] and capfd.readouterr().err == "a bar\n"
    assert steps.run("c", *show) == "6" and set(steps.seconds) == {"a", "b", "c"} and not steps.running


def test_a_failure_ends_the_other_lane(capfd):
    steps, started = demo.Steps(), time.monotonic()
    sleeps = python("import time; print('asleep', flush=True); time.sleep(60)")
    fails = python("import sys; print('the reason', file=sys.stderr); sys.exit(3)")
    with pytest.raises(ValueError, match=r"the step 'fails' failed with exit code 3"):
        steps.side_by_side(lambda: steps.run("sleeps", *sleeps), lambda: steps.run("fails", *fails, has_bar=False))
    assert time.monotonic() - started < 30 and "the reason" in capfd.readouterr().err


def test_all_models_are_measured_on_the_same_windows():
    comparison = yaml.safe_load(demo.COMPARISON.read_text(encoding="utf-8"))
    assert (REPO / comparison["base_model"]).samefile(demo.BASE)
    assert tuple(comparison["lengths"]) == demo.LENGTHS and comparison["sliding_window"] == demo.STRIDE
    assert "max_windows" not in comparison and comparison["protocol"] == "longlora"
    assert comparison["load_in_4bit"] and comparison["dtype"] == "fp32" and comparison["batch_size"] == demo.BATCH_SIZE
    # One context for all lengths, as the adapter has.
    assert comparison["methods"].pop("base") == {}
    assert {method["context_size"] for method in comparison["methods"].values()} == {demo.LENGTHS[-1]}
