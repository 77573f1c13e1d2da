"""Window protocols and the reduction of window losses, against straightforward reimplementations."""

import math
from itertools import product

import pytest

from longqlora.evaluation.frame import json_safe
from longqlora.evaluation.perplexity import PROTOCOLS, perplexity, plan_windows, spread, summarize


def window_loss(*block_totals):
    return {"total": sum(block_totals), "block_totals": block_totals, "num_correct": 0}


def longlora_starts(num_tokens, seq_len, stride):
    """The loop of LongLoRA's eval.py; empty where it raises."""
    starts, start = [], 0
    while start < num_tokens - seq_len:
        starts.append(start)
        start += stride
    return starts[:-1]


def test_longlora_windows_are_those_of_the_original_loop():
    for num_tokens, seq_len, stride in product(range(1, 40), range(2, 14), range(1, 16)):
        expected = longlora_starts(num_tokens, seq_len, stride)
        if not expected:
            assert num_tokens < seq_len + stride + 1
            with pytest.raises(ValueError, match=f"needs at least {seq_len + stride + 1} "):
                plan_windows(num_tokens, seq_len=seq_len, stride=stride)
            continue
        plan = plan_windows(num_tokens, seq_len=seq_len, stride=stride)
        assert [window.start for window in plan.windows] == expected
        assert {(window.length, window.score_from) for window in plan.windows} == {(seq_len, 1)}
        covered = {t for start in expected for t in range(start, start + seq_len)}
        assert plan.num_uncovered_tokens == num_tokens - len(covered)


def test_stride_protocol_scores_every_token_but_the_first_once():
    for num_tokens, seq_len, overlap in product(range(2, 40), range(2, 14), range(1, 13)):
        if overlap < seq_len:
            plan = plan_windows(num_tokens, seq_len=seq_len, stride=seq_len - overlap, protocol="stride")
            scored = [w.start + offset for w in plan.windows for offset in range(w.score_from, w.length)]
            assert scored == list(range(1, num_tokens))
            assert all(2 <= w.length <= seq_len and w.score_from >= 1 for w in plan.windows)
            assert plan.num_uncovered_tokens == 0 and plan.num_scored_tokens == num_tokens - 1


def test_max_windows_is_an_evenly_spread_subset_and_says_so():
    plan = plan_windows(1000, seq_len=10, stride=10, max_windows=4)
    assert [window.start for window in plan.windows] == [0, 320, 650, 970]
    assert plan.num_windows_skipped == 94 and "evenly spread subset, 94 windows skipped" in plan.describe()
    assert spread([1, 2, 3], 1) == [1] and spread([1, 2, 3], 9) == [1, 2, 3]
    assert all(len(set(spread(range(n), k))) == k for n in range(1, 30) for k in range(1, n + 1))


def test_overflow_and_nan_are_json_safe_and_the_loss_is_kept():
    assert perplexity(1000.0) == math.inf and perplexity(1.0) == math.e
    plan = plan_windows(10, seq_len=3, stride=4)
    summary = json_safe(summarize(plan, [window_loss(1000.0, 1000.0)]))
    assert summary["perplexity"] is None and summary["loss"] == 1000.0 and summary["num_windows_nonfinite"] == 0
    summary = json_safe(summarize(plan, [window_loss(math.nan, math.inf)]))
    assert summary["loss"] is None and summary["num_windows_nonfinite"] == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sums_do_not_depend_on_order(protocol):
    plan = plan_windows(36, seq_len=8, stride=7, protocol=protocol)
    losses = [window_loss(*[total] * 7) for total in [1e16, 1.0, 1.0, 1.0, 1.0][: len(plan.windows)]]
    assert summarize(plan, losses) == summarize(plan, losses[::-1])
