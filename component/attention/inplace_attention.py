"""Causal attention of whole sequences, full or shift-short, a few heads at a time, with its log-sum-exp.

For a backward pass that need not run attention again (memory/layer_function.py). Gradients overwrite the queries, keys
and values that they belong to: the backward pass holds 3/4 of one [B, S, H, D] tensor more than the forward pass.

Pure maths: knows nothing of Hugging Face. Tensors are laid out as the projections give them: [B, S, H, D].
Dimensions: B batch, S sequence, H query heads, K key/value heads (K divides H), D head dim, G group size, N groups.
"""

from itertools import pairwise
from typing import NamedTuple

import torch

from longqlora.attention.sdpa import attend, attend_backward, fold_groups
from longqlora.attention.segments import SegmentLengths
from longqlora.attention.shift_short import cut, group_sizes, runs_of

NUM_HEAD_RANGES = 4
# A range in each of [B, H, S] or [B, K, S].
Place = tuple[slice, slice, slice]


class CausalPattern(NamedTuple):
    """Which keys a query sees: all up to its own position, or those of its group (None: no groups).

    num_heads: all query heads of the layer, of which a call may compute some: the second half is shifted.
    segment_lengths: where rows have several segments, which do not see each other.
    """

    group_size: int | None
    num_heads: int
    segment_lengths: SegmentLengths | None = None


def attention_forward(query, key, value, output, lse, *, pattern: CausalPattern, first_head: int, scaling: float):
    """Write the attention of some heads into `output` and `lse`.

    query and output [B, S, H, D]; key and value [B, S, K, D]; lse [B, H, S] in fp32 (fp64 for fp64).
    first_head: place of the first of the H heads among pattern.num_heads.
    """
    query, key, value, output = (x.transpose(1, 2) for x in (query, key, value, output))
    for place, kv_place, num_groups in kernel_calls(query, key, pattern, first_head):
        inputs = (fold_groups(x, num_groups) for x in (query[place], key[kv_place], value[kv_place]))
        results = attend(*inputs, is_causal=True, scaling=scaling)
        for target, result in zip((output, lse), results, strict=True):
            write_groups(target[place], result, num_groups)


def attention_backward(
    gradient, query, key, value, output, lse, *, pattern: CausalPattern, first_head: int, scaling: float
) -> list[torch.Tensor]:
    """Gradients of query, key and value for the gradient [B, S, H, D] of the output.

    Shapes as in `attention_forward`. query, key and value are overwritten: the gradients lie in their memory,
    or in new memory where query heads on both sides of the shift read one key/value head.
    """
    gradient, query, key, value, output = (x.transpose(1, 2) for x in (gradient, query, key, value, output))
    calls, per_kv_head = kernel_calls(query, key, pattern, first_head), query.shape[1] // key.shape[1]
    is_shared = any(heads.stop % per_kv_head for (_, heads, _), _, _ in calls)
    grad_key, grad_value = (torch.zeros_like(x) if is_shared else x for x in (key, value))
    for place, kv_place, num_groups in calls:
        inputs = gradient[place], query[place], key[kv_place], value[kv_place], output[place], lse[place]
        *inputs, own_lse = (fold_groups(x, num_groups) for x in inputs)
        grads = attend_backward(*inputs, own_lse.contiguous(), is_causal=True, scaling=scaling)
        write_groups(query[place], grads[0], num_groups)
        write_groups(grad_key[kv_place], grads[1], num_groups, is_sum=is_shared)
        write_groups(grad_value[kv_place], grads[2], num_groups, is_sum=is_shared)
        # Not to be held while the next call is at work.
        del inputs, own_lse, grads
    return [x.transpose(1, 2) for x in (query, grad_key, grad_value)]


def kernel_calls(query, key, pattern: CausalPattern, first_head: int) -> list[tuple[Place, Place, int]]:
    """Queries computed together, the keys and values that they read, and the number of equal groups in them.

    Heads are split where the shift begins, and each side further, between key/value heads; batch rows where their
    segments differ. Short runs of groups need no further split of heads.
    """
    _, num_heads, length, _ = query.shape
    num_kv_heads, cut_head = key.shape[1], num_heads
    per_kv_head = num_heads // num_kv_heads
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
            heads, kv_heads = slice(low, high), slice(low // per_kv_head, -(-high // per_kv_head))
            for rows, num_groups in runs[low >= cut_head]:
                calls.append(((batch, heads, rows), (batch, kv_heads, rows), num_groups))
    return calls


def write_groups(target: torch.Tensor, source: torch.Tensor, num_groups: int, *, is_sum: bool = False) -> None:
    """Copy or add source [B * N, H, G, ...] into target [B, H, N * G, ...], without a copy in between."""
    target = target.unflatten(2, (num_groups, -1))
    source = source.unflatten(0, (-1, num_groups)).transpose(1, 2)
    target.add_(source) if is_sum else target.copy_(source)
