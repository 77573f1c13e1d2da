"""Shift-short attention (S2-Attn): causal attention inside groups, half of the heads shifted by half a group.

LongLoRA (arXiv 2309.12307, section 3.2). The first half of the heads attends within groups
[0, G), [G, 2G), ...; the second half within [0, G/2), [G/2, 3G/2), ... so that information crosses
group borders. There is no wrap-around: both ends of the shifted half are shorter groups, hence no
token ever sees a later one (the roll of LongLoRA's published code lets the first tokens see the last).

Neither a roll nor a mask is needed: every group is a plain causal attention on a view, and because
the views come from `split`, whose backward is one concatenation, no gradient buffer of full length
is filled more than once. Documents that share a row end groups early, and need no mask either.
Pure torch; the binding to transformers is in attention.py.

Dimensions: B batch, H query heads, K key/value heads, S sequence, D head dim, G group size, N groups.

Pure maths: knows nothing of Hugging Face.
"""

from collections.abc import Callable, Iterable
from itertools import accumulate, groupby, pairwise

import torch
import torch.nn.functional as F

from longqlora.attention.segments import Documents, segment_mask

AttentionKernel = Callable[..., torch.Tensor]


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention through torch's SDPA, which picks flash, cuDNN, memory-efficient or math.

    query [B, H, S, D]; key and value [B, K, S, D] with K dividing H; mask bool [B, 1, S, S], True
    where attention is allowed and already causal. Returns [B, H, S, D] in the dtype of query.
    """
    num_groups = query.shape[1] // key.shape[1]
    enable_gqa = num_groups > 1 and has_gqa_kernel(query, mask)
    if num_groups > 1 and not enable_gqa:
        key, value = (x.repeat_interleave(num_groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=enable_gqa,
    )


def has_gqa_kernel(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a fused kernel reads grouped key/value heads as they are.

    On CUDA only flash attention does (Ampere or later, 16 bit, no mask, D <= 256); elsewhere there
    SDPA would fall back to the kernel that holds all scores, which costs more than repeating heads.
    """
    if query.device.type != "cuda":
        return True
    has_flash = torch.cuda.get_device_capability(query.device) >= (8, 0) and torch.backends.cuda.flash_sdp_enabled()
    return has_flash and mask is None and query.element_size() == 2 and query.shape[-1] <= 256


def group_sizes(length: int, group_size: int | None, *, shifted: bool) -> list[int]:
    """Sizes of the consecutive groups that cover `length` tokens; shifted ones begin with half a group.

    group_size None: full attention, one group.
    """
    if group_size is None:
        return [length]
    lead = min(group_size // 2, length) if shifted else 0
    num_full, rest = divmod(length - lead, group_size)
    return [size for size in [lead] + [group_size] * num_full + [rest] if size]


def shift_short_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group_size: int,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segment_ids: torch.Tensor | None = None,
    documents: Documents | None = None,
    num_shifted: int | None = None,
    kernel: AttentionKernel = causal_attention,
) -> torch.Tensor:
    """Shift-short attention over any sequence length.

    query [B, H, S, D]; key and value [B, K, S, D], K dividing H; any float dtype.
    group_size: tokens per group, even. S need not be a multiple of it: the last group is ragged.
    segment_ids: int [B, S]; tokens attend only within equal ids, and a negative id marks padding
        that nothing attends to. None when rows hold one sequence, padded at most on the right
        (causality alone then keeps padding out of every real token).
    documents: instead of segment_ids, where `segments.document_lengths` knows them: exact without a mask.
    num_shifted: how many heads, the last ones, have shifted groups; None for half of them. Other numbers are
        for calls that see a part of a layer's heads.
    kernel: attention within a group, the signature of `causal_attention`.
    Returns [B, H, S, D], laid out in memory as [B, S, H, D].

    Raises ValueError for an odd number of query heads or an odd or non-positive group size.
    """
    num_heads, num_kv_heads, length = query.shape[1], key.shape[1], query.shape[2]
    if num_shifted is None:
        check_shift_short(num_heads, group_size)
        num_shifted = num_heads // 2
    num_plain, per_kv_head = num_heads - num_shifted, num_heads // num_kv_heads
    if num_kv_heads > 1 and num_plain % per_kv_head:
        # A key/value head straddles the two kinds: give each query head its own.
        key, value = (x.repeat_interleave(per_kv_head, dim=1) for x in (key, value))
        per_kv_head = 1
    # With one key/value head both kinds share it.
    kv_sizes = [num_plain // per_kv_head, num_shifted // per_kv_head]
    queries = query.split([num_plain, num_shifted], dim=1)
    keys, values = ((x, x) if x.shape[1] == 1 else x.split(kv_sizes, dim=1) for x in (key, value))
    halves = [
        grouped_attention(
            *half,
            group_sizes(length, group_size, shifted=shifted),
            segment_ids=segment_ids,
            documents=documents,
            kernel=kernel,
            scaling=scaling,
            dropout=dropout,
        )
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


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sizes: list[int],
    *,
    segment_ids: torch.Tensor | None = None,
    documents: Documents | None = None,
    kernel: AttentionKernel = causal_attention,
    **kernel_args,
) -> torch.Tensor:
    """Attention within consecutive groups of the given sizes; runs of equal groups share one kernel call.

    query [B, H, S, D], key and value [B, K, S, D] with S = sum(sizes); segment_ids and documents as in
    `shift_short_attention`. Returns [B, S, H, D].
    """
    if documents is not None:
        rows = zip(*(x.split(1) for x in (query, key, value)), documents, strict=True)
        outputs = [grouped_attention(*row, cut(sizes, lengths), kernel=kernel, **kernel_args) for *row, lengths in rows]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    runs = [(size, len(list(run))) for size, run in groupby(sizes)]
    lengths = [size * num_groups for size, num_groups in runs]
    pieces = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    segments = segment_ids.split(lengths, dim=1) if segment_ids is not None else [None] * len(runs)
    outputs = []
    for (size, num_groups), piece, segment in zip(runs, pieces, segments, strict=True):
        mask = None if segment is None else segment_mask(segment.reshape(-1, size))
        out = kernel(*(fold_groups(x, num_groups) for x in piece), mask=mask, **kernel_args)
        outputs.append(unfold_groups(out, num_groups))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def cut(sizes: Iterable[int], lengths: Iterable[int]) -> list[int]:
    """Sizes of the groups that end wherever one of `sizes` or one of `lengths` does."""
    ends = sorted({0, *accumulate(sizes), *accumulate(lengths)})
    return [end - start for start, end in pairwise(ends)]


def fold_groups(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[B, H, N*G, D] -> [B*N, H, G, D]; a view unless B > 1 on a part of the sequence."""
    return x if num_groups == 1 else x.unflatten(2, (num_groups, -1)).transpose(1, 2).flatten(0, 1)


def unfold_groups(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[B*N, H, G, D] -> [B, N*G, H, D]; a view on the kernels that write [B, S, H, D]."""
    return x.transpose(1, 2) if num_groups == 1 else x.transpose(1, 2).unflatten(0, (-1, num_groups)).flatten(1, 2)
