"""Exact attention merged from ranges of keys: each range by a fast kernel, the results by their log-sum-exp.

A `QueryBlock` is a range of query rows with the key ranges that they see, each whole or under a causal mask, and
possibly through rotated queries (dual chunk attention). Memory is linear in the length, forward and backward: only the
inputs, the output and one log-sum-exp per row are kept for the backward pass, whatever the number of key ranges.

Pure maths: knows nothing of Hugging Face.
Dimensions: B batch, H query heads, K key/value heads (K divides H), Q queries, S keys, D head dim, N chunks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from longqlora.attention.rotation import QueryRotation
from longqlora.attention.sdpa import attend, attend_backward, causal_attention, fold_groups, sum_dtype, unfold_groups

ALL = slice(None)


class KeyRange(NamedTuple):
    """Rows of a block attend to a range of keys.

    rows: counted from the block's first; keys: the range, of the whole sequence.
    is_causal: row i sees keys up to i of the range, which has as many keys as rows.
    num_chunks: both ranges consist of so many equal chunks, and a chunk of rows sees its own chunk of keys only.
    rotation: of the queries, the same for each chunk.
    """

    rows: slice
    keys: slice
    is_causal: bool = False
    num_chunks: int = 1
    rotation: QueryRotation | None = None


class QueryBlock(NamedTuple):
    """Query rows computed together, in no other block; the first key range is for all of them, others for some."""

    batch: slice
    rows: slice
    key_ranges: Sequence[KeyRange]


def causal_attention_with_past(query, key, value, *, scaling: float | None = None) -> torch.Tensor:
    """Dense causal attention of query [B, H, Q, D], the last Q of S positions, to key and value [B, K, S, D]."""
    past = key.shape[2] - query.shape[2]
    assert past >= 0, "more queries than keys"
    if past == 0:
        return causal_attention(query, key, value, scaling=scaling)
    key_ranges = [KeyRange(ALL, slice(past, None), is_causal=True), KeyRange(ALL, slice(0, past))]
    if query.shape[2] == 1:
        key_ranges = [KeyRange(ALL, ALL)]
    return merged_attention(query, key, value, [QueryBlock(ALL, ALL, key_ranges)], scaling=scaling)


def merged_attention(query, key, value, blocks: Sequence[QueryBlock], *, scaling: float | None = None) -> torch.Tensor:
    """Softmax attention of each row over all its key ranges together, differentiable; rows in no block are zero.

    query [B, H, Q, D]; key and value [B, K, S, D]. Returns [B, H, Q, D] in the dtype of query, or of autocast where
    that is on, as SDPA does; laid out in memory as [B, Q, H, D].
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    # Kernels divide by the number of rows: without any they end the process.
    return MergedAttention.apply(query, key, value, blocks if query.numel() else [], scaling)


class MergedAttention(torch.autograd.Function):
    """All blocks as one node of the graph: rotated and folded inputs are recomputed in the backward pass."""

    @staticmethod
    def forward(ctx, query, key, value, blocks, scaling):
        batch, num_heads, num_queries, _ = query.shape
        output = query.new_zeros(batch, num_queries, num_heads, value.shape[-1]).transpose(1, 2)
        lse = query.new_zeros(batch, num_heads, num_queries, dtype=sum_dtype(query))
        with torch.autocast(query.device.type, enabled=False):
            for batch, rows, key_ranges in blocks:
                place = batch, ALL, rows
                output[place], lse[place] = block_forward(query[place], key[batch], value[batch], key_ranges, scaling)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.blocks, ctx.scaling = blocks, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, output, lse = ctx.saved_tensors
        grad_query = torch.zeros_like(query)
        # Many ranges may share a key: their gradients are summed before they are rounded.
        grad_key, grad_value = (torch.zeros_like(x, dtype=sum_dtype(x)) for x in (key, value))
        with torch.autocast(query.device.type, enabled=False):
            for batch, rows, key_ranges in ctx.blocks:
                place = batch, ALL, rows
                sums = torch.zeros_like(query[place], dtype=sum_dtype(query)), grad_key[batch], grad_value[batch]
                for keys in key_ranges:
                    whole = [fold_groups(x[place][:, :, keys.rows], keys.num_chunks) for x in (gradient, output, lse)]
                    inputs = range_inputs(query[place], key[batch], value[batch], keys)
                    grads = attend_backward(
                        whole[0], *inputs, *whole[1:], is_causal=keys.is_causal, scaling=ctx.scaling
                    )
                    if keys.rotation is not None:
                        grads = keys.rotation.rotate(grads[0], is_back=True), *grads[1:]
                    for total, grad, span in zip(sums, grads, (keys.rows, keys.keys, keys.keys), strict=True):
                        total[:, :, span] += unfold_groups(grad, keys.num_chunks)
                grad_query[place] = sums[0]
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def block_forward(query, key, value, key_ranges: Sequence[KeyRange], scaling: float) -> list[torch.Tensor]:
    """Output [B, H, Q, D] and log-sum-exp [B, H, Q] of a block's rows."""
    merged: list[torch.Tensor] = []
    for keys in key_ranges:
        results = attend(*range_inputs(query, key, value, keys), is_causal=keys.is_causal, scaling=scaling)
        more, more_lse = (unfold_groups(x, keys.num_chunks) for x in results)
        if not merged:
            merged = [more if len(key_ranges) == 1 else more.to(more_lse.dtype), more_lse]
            continue
        output, lse = (x[:, :, keys.rows] for x in merged)
        total = torch.logaddexp(lse, more_lse)
        # No exponent is positive.
        output.mul_((lse - total).exp_()[..., None]).addcmul_(more, (more_lse - total).exp_()[..., None])
        lse.copy_(total)
    return merged


def range_inputs(query, key, value, keys: KeyRange) -> tuple[torch.Tensor, ...]:
    """What the kernel reads: [B * N, H, Q / N, D] and twice [B * N, K, S / N, D], queries rotated."""
    query = fold_groups(query[:, :, keys.rows], keys.num_chunks)
    key, value = (fold_groups(x[:, :, keys.keys], keys.num_chunks) for x in (key, value))
    return query if keys.rotation is None else keys.rotation.rotate(query), key, value
