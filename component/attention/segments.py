"""Segments: the packed documents and the padding of rows, as ids int [B, S]; negative ids are padding.

Tokens attend within equal ids only. Where the tokens of each id are adjacent, lengths say as much as a mask.

Pure maths: knows nothing of Hugging Face. Dimensions: B batch, S sequence.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

# For each row of a batch the lengths of its segments, in order, padding included.
SegmentLengths = tuple[tuple[int, ...], ...]


def segment_runs(segment_ids: torch.Tensor) -> list[list[tuple[int, int]]]:
    """(id, length) of each run of equal ids, row by row; waits for the device, once per tensor."""
    # Inference tensors do not count changes.
    return find_runs(segment_ids, None if segment_ids.is_inference() else segment_ids._version)


@lru_cache(maxsize=4)
def find_runs(segment_ids: torch.Tensor, version: int | None) -> list[list[tuple[int, int]]]:
    """`segment_runs` of a tensor in this version."""
    rows = [torch.unique_consecutive(ids, return_counts=True) for ids in segment_ids.cpu()]
    return [list(zip(values.tolist(), lengths.tolist(), strict=True)) for values, lengths in rows]


def segment_lengths(segment_ids: torch.Tensor) -> SegmentLengths | None:
    """Lengths of the segments; None where tokens of one id are not adjacent. Each run of padding is a segment."""
    rows = segment_runs(segment_ids)
    for row in rows:
        real = [value for value, _ in row if value >= 0]
        if len(set(real)) < len(real):
            return None
    return tuple(tuple(length for _, length in row) for row in rows)


def segment_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Bool mask [B, 1, S, S]: causal and within a segment.

    Padding sees padding: an empty row of the softmax would be NaN, and its gradient reaches real tokens.
    """
    positions = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (same & (positions[:, None] >= positions[None, :]))[:, None]


def segments_of(position_ids: torch.Tensor) -> torch.Tensor:
    """Segment ids int64 [B, S] of position ids int [B, S]: a segment starts where positions do not count on by one."""
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return F.pad(starts.long().cumsum(dim=1), (1, 0))
