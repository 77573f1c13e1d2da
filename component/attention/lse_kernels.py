"""Causal attention of whole sequences, full or shift-short, a few heads at a time, with its log-sum-exp.

For a backward pass that need not run attention again (memory/layer_function.py). Gradients overwrite the queries, keys
and values that they belong to: the backward pass holds 3/4 of one [B, S, H, D] tensor more than the forward pass.

Dimensions: B batch, S sequence, H query heads, K key/value heads (K divides H), D head dim, G group size, N groups.
Tensors are laid out as the projections give them: [B, S, H, D].

Pure maths: knows nothing of Hugging Face.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange

from longqlora.attention.sdpa import attend, attend_backward, sum_dtype
from longqlora.attention.segments import SegmentLengths
from longqlora.attention.shift_short import cut, group_sizes, runs_of

NUM_HEAD_RANGES = 4


class CausalPattern(NamedTuple):
    """Which keys a query sees: all up to its own position, or those of its group (None: no groups).

    num_heads: all query heads of the layer, of which a call may compute some: the second half is shifted.
    segment_lengths: where rows have several segments, which do not see each other.
    """

    group_size: int | None
    num_heads: int
    segment_lengths: SegmentLengths | None = None


class KernelCall(NamedTuple):
    """Batch rows, a run of equal groups and query heads computed together, with the key/value heads that they read."""

    batch: slice
    rows: slice
    heads: slice
    kv_heads: slice
    group_size: int


def attention_forward(query, key, value, output, lse, *, pattern: CausalPattern, first_head: int, scaling: float):
    """Write the attention of some heads into `output` and `lse`.

    query and output [B, S, H, D]; key and value [B, S, K, D]; lse [B, H, S] in fp32 (fp64 for fp64).
    first_head: place of the first of the H heads among pattern.num_heads.
    """
    for batch, rows, heads, kv_heads, size in kernel_calls(query, key, pattern, first_head):
        inputs = query[batch, rows, heads], key[batch, rows, kv_heads], value[batch, rows, kv_heads]
        result = attend(*(fold_groups(x, size) for x in inputs), is_causal=True, scaling=scaling)
        write_groups(output[batch, rows, heads], result[0], size)
        write_groups(lse[batch, heads, rows].transpose(1, 2)[..., None], result[1][..., None], size)


def attention_backward(
    gradient, query, key, value, output, lse, *, pattern: CausalPattern, first_head: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value for the gradient [B, S, H, D] of the output.

    Shapes as in `attention_forward`. query, key and value are overwritten: the gradients lie in their memory,
    or in new memory where query heads on both sides of the shift read one key/value head.
    """
    calls, per_kv_head = kernel_calls(query, key, pattern, first_head), query.shape[2] // key.shape[2]
    is_shared = any(call.heads.stop % per_kv_head for call in calls)
    grad_key, grad_value = (torch.zeros_like(x) if is_shared else x for x in (key, value))
    for batch, rows, heads, kv_heads, size in calls:
        place, kv_place = (batch, rows, heads), (batch, rows, kv_heads)
        inputs = gradient[place], query[place], key[kv_place], value[kv_place], output[place]
        own_lse = fold_groups(lse[batch, heads, rows].transpose(1, 2)[..., None], size)[..., 0].contiguous()
        grads = attend_backward(*(fold_groups(x, size) for x in inputs), own_lse, is_causal=True, scaling=scaling)
        write_groups(query[place], grads[0], size)
        write_groups(grad_key[kv_place], grads[1], size, is_sum=is_shared)
        write_groups(grad_value[kv_place], grads[2], size, is_sum=is_shared)
        # Not to be held while the next call is at work.
        del grads
    return query, grad_key, grad_value


def kernel_calls(query: torch.Tensor, key: torch.Tensor, pattern: CausalPattern, first_head: int) -> list[KernelCall]:
    """Split the heads where the shift begins, and each side further, between key/value heads.

    Batch rows whose segments differ are split as well; short runs of groups need no further split of heads.
    """
    length, num_heads, num_kv_heads = query.shape[1], query.shape[2], key.shape[2]
    per_kv_head, cut_head = num_heads // num_kv_heads, num_heads
    if pattern.group_size is not None:
        cut_head = min(max(pattern.num_heads // 2 - first_head, 0), num_heads)
    # A key/value head that query heads on both sides of the cut read is in two calls, alone.
    around_cut = cut_head // per_kv_head * per_kv_head, cut_head, -(-cut_head // per_kv_head) * per_kv_head
    groups, calls = [group_sizes(length, pattern.group_size, shifted=shifted) for shifted in (False, True)], []
    for index, lengths in enumerate(pattern.segment_lengths or [None]):
        batch = slice(None) if lengths is None else slice(index, index + 1)
        runs = [list(runs_of(sizes if lengths is None else cut(sizes, lengths))) for sizes in groups]
        longest = max(rows.stop - rows.start for side in runs for rows, _ in side)
        step = per_kv_head * max(1, num_kv_heads // (NUM_HEAD_RANGES if longest * NUM_HEAD_RANGES > length else 1))
        for low, high in pairwise(sorted({*range(0, num_heads, step), *around_cut, num_heads})):
            kv_heads = slice(low // per_kv_head, -(-high // per_kv_head))
            calls += [KernelCall(batch, rows, slice(low, high), kv_heads, size) for rows, size in runs[low >= cut_head]]
    return calls


def fold_groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, N * G, H, D] -> [B * N, H, G, D]; a view, but for several batch rows of a part of the sequence."""
    if size < x.shape[1]:
        x = rearrange(x, "b (n g) h d -> (b n) g h d", g=size)
    return x.transpose(1, 2)


def write_groups(target: torch.Tensor, source: torch.Tensor, size: int, *, is_sum: bool = False) -> None:
    """Copy or add source [B * N, H, G, D] into target [B, N * G, H, D], without a copy in between."""
    if size < target.shape[1]:
        target = rearrange(target, "b (n g) h d -> b n g h d", g=size)
        source = rearrange(source, "(b n) h g d -> b n h g d", b=len(target))
    source = source.transpose(-3, -2)
    target.add_(source) if is_sum else target.copy_(source)


def empty_lse(query: torch.Tensor) -> torch.Tensor:
    """Room for the log-sum-exp [B, H, S] of query [B, S, H, D]."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], dtype=sum_dtype(query))
