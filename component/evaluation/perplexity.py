"""Perplexity over long windows: which windows a protocol measures, and how their losses become one number.

Two protocols (L = seq_len, n = tokens in the file):

longlora    What LongLoRA, LongQLoRA and landmark-attention report (LongLoRA eval.py). Windows of L tokens
            start at range(0, n - L, stride), the last start dropped. Each window scores its L - 1 tokens
            that have a predecessor in it; the mean over windows of the window means is exponentiated.
stride      Windows of L tokens advance by stride and score only the tokens no earlier window scored, the
            last, shorter window included: every token but the file's first is scored exactly once. The
            mean over tokens is exponentiated.

Accuracy is the share of the same tokens that the model holds most likely, averaged as the losses are. LongLoRA's
val_acc also counts the token after each window, so that it is a mean over L tokens, not L - 1.

Pure maths: plain numbers, no model, no files; knows nothing of Hugging Face.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

PROTOCOLS = ("longlora", "stride")
MAX_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens start .. start + length - 1; those from offset `score_from` (>= 1) on are scored."""

    start: int
    length: int
    score_from: int = 1

    @property
    def num_scored(self) -> int:
        return self.length - self.score_from


@dataclass(frozen=True)
class WindowPlan:
    """The windows that one measurement runs over, and what it leaves out."""

    protocol: str
    seq_len: int
    stride: int
    num_file_tokens: int
    windows: tuple[Window, ...]
    num_windows_skipped: int

    @property
    def num_scored_tokens(self) -> int:
        return sum(window.num_scored for window in self.windows)

    @property
    def num_uncovered_tokens(self) -> int:
        """Tokens of the file that lie in no window, at its end or between windows."""
        covered, end = 0, 0
        for window in self.windows:
            covered += window.start + window.length - max(end, window.start)
            end = window.start + window.length
        return self.num_file_tokens - covered

    def describe(self) -> str:
        """One line with all that decides which tokens count."""
        left_out = f"{self.num_uncovered_tokens} of {self.num_file_tokens} tokens in no window"
        up_to, scored, mean = "", "the last window dropped", f"windows of the mean over {self.seq_len - 1}"
        if self.protocol == "stride":
            up_to, scored, mean = "up to ", "only new tokens scored", f"{self.num_scored_tokens}"
        skipped = f"; evenly spread subset, {self.num_windows_skipped} windows skipped"
        return (
            f"{self.protocol}: {len(self.windows)} windows of {up_to}{self.seq_len} tokens, stride {self.stride}, "
            f"{scored}, {left_out}, mean over {mean} tokens{skipped if self.num_windows_skipped else ''}"
        )


@functools.cache
def plan_windows(
    num_tokens: int, *, seq_len: int, stride: int, protocol: str = "longlora", max_windows: int | None = None
) -> WindowPlan:
    """Lay the windows of `protocol`, one of PROTOCOLS, over a file of `num_tokens` tokens.

    `max_windows` keeps an evenly spread subset. Raises `ValueError` for values that give no window; the
    message says how many tokens are needed.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, not {seq_len}")
    if protocol == "longlora":
        windows = [Window(start, seq_len) for start in range(0, num_tokens - seq_len, stride)][:-1]
        if not windows:
            raise ValueError(
                f"the file has {num_tokens} tokens; seq_len {seq_len} with stride {stride} needs at least "
                f"{seq_len + stride + 1} (the longlora protocol drops the last window); "
                "give a longer file, a smaller seq_len or stride, or --protocol stride"
            )
    else:
        if stride >= seq_len:
            raise ValueError(
                f"the stride protocol needs a stride (sliding_window) of at most {seq_len - 1} for seq_len {seq_len}, "
                f"not {stride}: a window's first token has no predecessor in it"
            )
        if num_tokens < 2:
            raise ValueError(f"the file has {num_tokens} token; the stride protocol needs at least 2")
        # The first window whose end reaches the end of the file is the last.
        starts = range(0, max(1, num_tokens - seq_len + stride), stride)
        ends = [min(start + seq_len, num_tokens) for start in starts]
        known = [1, *ends[:-1]]
        windows = [Window(start, end - start, seen - start)
                   for start, end, seen in zip(starts, ends, known, strict=True)]  # fmt: skip
    kept = spread(windows, max_windows)
    return WindowPlan(protocol, seq_len, stride, num_tokens, tuple(kept), len(windows) - len(kept))


def spread(items: Sequence, limit: int | None) -> list:
    """At most `limit` of `items`, evenly spread, first and last included when limit > 1."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[round(index * (len(items) - 1) / max(1, limit - 1))] for index in range(limit)]


def batches(windows: Sequence[Window], batch_size: int) -> list[list[int]]:
    """Indices of `windows` in batches of equal window length, in order; nothing is ever padded."""
    groups = [list(group) for _, group in groupby(range(len(windows)), lambda index: windows[index].length)]
    return [group[first : first + batch_size] for group in groups for first in range(0, len(group), batch_size)]


def position_blocks(seq_len: int) -> list[int]:
    """Edges of at most MAX_BLOCKS nearly equal blocks of the positions 1 .. seq_len - 1, the scored ones."""
    num_blocks = min(MAX_BLOCKS, seq_len - 1)
    return [1 + (seq_len - 1) * block // num_blocks for block in range(num_blocks + 1)]


def summarize(plan: WindowPlan, losses: Sequence[Mapping]) -> dict:
    """Reduce the losses of windows, in the order of `plan.windows`, to the reported numbers.

    Each holds "total" and "block_totals" (by position block), summed negative log-likelihoods in nats, and
    "num_correct", the tokens that were held most likely. Sums are exactly rounded, so neither batching nor the number
    of processes can enter through their order. loss in nats a token; perplexity is exp(loss), `inf` where that
    overflows; accuracy between 0 and 1.
    """
    # A mean over windows of their means, or a mean over tokens.
    counts, num_parts = [1] * len(plan.windows), plan.num_scored_tokens
    if plan.protocol == "longlora":
        counts, num_parts = [window.num_scored for window in plan.windows], len(plan.windows)
    loss, accuracy = (
        math.fsum(value / count for value, count in zip(values, counts, strict=True)) / num_parts
        for values in ([loss[name] for loss in losses] for name in ("total", "num_correct"))
    )
    return {
        "perplexity": perplexity(loss),
        "loss": loss,
        "accuracy": accuracy,
        "num_windows": len(plan.windows),
        "num_tokens": plan.num_scored_tokens,
        "num_windows_nonfinite": sum(not math.isfinite(loss["total"]) for loss in losses),
        "loss_by_position": loss_by_position(plan, losses),
    }


def loss_by_position(plan: WindowPlan, losses: Sequence[Mapping]) -> list[dict]:
    """Mean loss of each block of positions in a window, `end` exclusive."""
    blocks = []
    totals = zip(*(loss["block_totals"] for loss in losses), strict=True)
    for (start, end), of_block in zip(pairwise(position_blocks(plan.seq_len)), totals, strict=True):
        count = sum(max(0, min(end, window.length) - max(start, window.score_from)) for window in plan.windows)
        if count:
            blocks.append({"start": start, "end": end, "num_tokens": count, "loss": math.fsum(of_block) / count})
    return blocks


def perplexity(loss: float) -> float:
    """exp(loss), `inf` where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
