"""Shift-short attention (S2-Attn): causal attention inside groups, half of the heads shifted by half a group.

LongLoRA (arXiv 2309.12307, section 3.2). The first half of the heads attends within groups [0, G), [G, 2G), ...; the
second half within [0, G/2), [G/2, 3G/2), ... so that information crosses group borders. There is no wrap-around: both
ends of the shifted half are shorter groups, so no token ever sees a later one (the roll of LongLoRA's published code
lets the first tokens see the last).

Every group is plain causal attention on a view, without a mask; packed documents end groups early. The views come from
`split`, whose backward is one concatenation; slices would each fill a gradient of full length.

Pure maths: knows nothing of Hugging Face.
Dimensions: B batch, H query heads, K key/value heads (K divides H), S sequence, D head dim, G group size, N groups.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby, pairwise

import torch

from longqlora.attention.sdpa import AttentionKernel, causal_attention, fold_groups, repeat_heads, unfold_groups
from longqlora.attention.segments import segment_lengths, segment_mask


def shift_short_attention(
    query, key, value, group_size: int, *, segment_ids=None, num_shifted: int | None = None, **options
) -> torch.Tensor:
    """Shift-short attention over any sequence length.

    query [B, H, S, D]; key and value [B, K, S, D]; group_size: tokens per group, even; the last group may be shorter.
    num_shifted: how many heads, the last ones, are shifted: half by default, another number for part of a layer.
    segment_ids and options (kernel, scaling, dropout): as in `grouped_attention`.
    Returns [B, H, S, D], laid out in memory as [B, S, H, D].
    Raises ValueError for an odd number of query heads or an odd or non-positive group size.
    """
    num_heads, num_kv_heads, length = query.shape[1], key.shape[1], query.shape[2]
    if num_shifted is None:
        check_shift_short(num_heads, group_size)
        num_shifted = num_heads // 2
    num_plain, per_kv_head = num_heads - num_shifted, num_heads // num_kv_heads
    if num_kv_heads > 1 and num_plain % per_kv_head:
        # Plain and shifted query heads share a key/value head: give each query head its own.
        key, value = (repeat_heads(x, num_heads) for x in (key, value))
        per_kv_head = 1
    # One key/value head alone serves both halves.
    kv_sizes = [num_plain // per_kv_head, num_shifted // per_kv_head]
    queries = query.split([num_plain, num_shifted], dim=1)
    keys, values = ((x, x) if x.shape[1] == 1 else x.split(kv_sizes, dim=1) for x in (key, value))
    halves = [
        grouped_attention(*half, group_sizes(length, group_size, shifted=shifted), segment_ids=segment_ids, **options)
        for shifted, *half in zip((False, True), queries, keys, values, strict=True)
        if half[0].shape[1]
    ]
    return torch.cat(halves, dim=2).transpose(1, 2)


def check_shift_short(num_heads: int, group_size: int) -> None:
    """Raise ValueError where S2-Attn is not defined."""
    if num_heads % 2:
        raise ValueError(
            f"S2-Attn shifts half of the heads, but the model has an odd number ({num_heads}); use attention: full"
        )
    if group_size < 2 or group_size % 2:
        raise ValueError(f"S2-Attn needs an even group size of at least 2, got {group_size}; change group_size_ratio")


def group_sizes(length: int, group_size: int | None, *, shifted: bool) -> list[int]:
    """Sizes of the groups that cover `length` tokens, one for group_size None; shifted ones begin with half a group."""
    if group_size is None:
        return [length]
    lead = min(group_size // 2, length) if shifted else 0
    num_full, rest = divmod(length - lead, group_size)
    return [size for size in [lead] + [group_size] * num_full + [rest] if size]


def grouped_attention(
    query, key, value, sizes: list[int], *, segment_ids=None, kernel: AttentionKernel = causal_attention, **options
) -> torch.Tensor:
    """Causal attention within consecutive groups of these sizes; runs of equal groups share one kernel call.

    query [B, H, S, D], key and value [B, K, S, D] with S = sum(sizes).
    segment_ids: int [B, S]; tokens attend within equal ids only, and a negative id marks padding that no real token
        sees. A mask is made only where tokens of one id are not adjacent. None where rows hold one sequence, padded
        at most on the right: causality alone then keeps padding out of every real token.
    kernel: the signature of `causal_attention`, which also gets the options (scaling, dropout).
    Returns [B, S, H, D].
    """
    lengths = None if segment_ids is None else segment_lengths(segment_ids)
    if lengths is not None:
        rows = zip(*(x.split(1) for x in (query, key, value)), lengths, strict=True)
        outputs = [grouped_attention(*row, cut(sizes, ends), kernel=kernel, **options) for *row, ends in rows]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    runs = list(runs_of(sizes))
    spans = [rows.stop - rows.start for rows, _ in runs]
    inputs = zip(*(x.split(spans, dim=2) for x in (query, key, value)), strict=True)
    ids = [None] * len(runs) if segment_ids is None else segment_ids.split(spans, dim=1)
    outputs = []
    for (_, num_groups), tensors, own_ids in zip(runs, inputs, ids, strict=True):
        mask = None if own_ids is None else segment_mask(own_ids.reshape(len(query) * num_groups, -1))
        output = kernel(*(fold_groups(x, num_groups) for x in tensors), mask=mask, **options)
        outputs.append(unfold_groups(output, num_groups).transpose(1, 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def runs_of(sizes: list[int]) -> Iterator[tuple[slice, int]]:
    """Rows of consecutive groups of one size, and the number of groups: a run is one kernel call."""
    start = 0
    for size, run in groupby(sizes):
        num_groups = len(list(run))
        yield slice(start, start + size * num_groups), num_groups
        start += size * num_groups


def cut(sizes: Iterable[int], lengths: Iterable[int]) -> list[int]:
    """Sizes of the groups that end wherever one of `sizes` or one of `lengths` does."""
    ends = sorted({0, *accumulate(sizes), *accumulate(lengths)})
    return [end - start for start, end in pairwise(ends)]
