"""Exact attention put together from parts: ranges of keys, each by a fast kernel, merged by log-sum-exp.

    causal_attention_with_past(query, key, value)      # the last Q of S positions, with no mask
    merged_attention(query, key, value, blocks, scaling=...)

A `Block` is a range of query rows, and its parts say which keys they see: all of a range, or a causal
triangle; a part may see its keys through turned queries (dual chunk attention). Forward and backward hold
memory linear in the length: scores stay inside the kernels, and only the inputs, the output and one
log-sum-exp per row are kept for the backward pass, whatever the number of parts.

Dimensions: B batch, H query heads, K key/value heads (K divides H), Q queries, S keys, D head dim, N chunks.

Pure maths: knows nothing of Hugging Face.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from longqlora.attention.sdpa import attend, attend_backward, sum_dtype
from longqlora.attention.shift_short import causal_attention

ALL = slice(None)


class Turn(Protocol):
    """A linear map of queries [B, H, Q, D] and its transpose, which takes gradients back."""

    def apply(self, query: torch.Tensor) -> torch.Tensor: ...

    def undo(self, gradient: torch.Tensor) -> torch.Tensor: ...


class Part(NamedTuple):
    """Query rows `queries` attend to the keys `keys`, both ranges of the whole tensors.

    is_causal: row i sees keys up to i of the range, which has as many keys as rows.
    num_chunks: both ranges fall into so many equal chunks, and a chunk of rows sees its own chunk of keys only;
        `turn` then applies to each chunk.
    """

    queries: slice
    keys: slice
    is_causal: bool = False
    num_chunks: int = 1
    turn: Turn | None = None


class Block(NamedTuple):
    """Query rows computed together; no two blocks share a row. The first part covers all rows, others may cover some.

    rows: the range of query rows; batch: the range of batch rows.
    """

    rows: slice
    parts: Sequence[Part]
    batch: slice = ALL


def causal_attention_with_past(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None = None
) -> torch.Tensor:
    """Dense causal attention of the last Q of S positions: prefill, a later piece of a prefill, or decoding.

    query [B, H, Q, D]; key and value [B, K, S, D], Q <= S. Returns [B, H, Q, D]; no mask is built.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    check_lengths(query, key)
    if num_queries == num_keys:
        return causal_attention(query, key, value, scaling=scaling)
    rows, past = slice(0, num_queries), num_keys - num_queries
    parts = [Part(rows, slice(past, num_keys), is_causal=True), Part(rows, slice(0, past))]
    if num_queries == 1:
        parts = [Part(rows, slice(0, num_keys))]
    return merged_attention(query, key, value, [Block(rows, parts)], scaling=scaling)


def check_lengths(query: torch.Tensor, key: torch.Tensor) -> None:
    """Raise ValueError where the queries cannot be the last positions of the keys."""
    if query.shape[2] > key.shape[2]:
        raise ValueError(f"{query.shape[2]} queries cannot be the last of {key.shape[2]} key positions")


def merged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: Sequence[Block],
    *,
    scaling: float | None = None,
) -> torch.Tensor:
    """Softmax attention of each row over the keys of all its parts together, differentiable.

    query [B, H, Q, D]; key and value [B, K, S, D]. Rows that no block names are zero.
    Returns [B, H, Q, D] in the dtype of query, or of autocast where that is on, as SDPA does;
    laid out in memory as [B, Q, H, D].
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    # Kernels divide by the number of rows: with none of them they kill the process.
    return MergedAttention.apply(query, key, value, blocks if query.numel() else [], scaling)


class MergedAttention(torch.autograd.Function):
    """All blocks as one node of the graph: what a part computes on the way is made again in the backward pass."""

    @staticmethod
    def forward(ctx, query, key, value, blocks, scaling):
        batch, num_heads, num_queries, _ = query.shape
        output = query.new_zeros(batch, num_queries, num_heads, value.shape[-1]).transpose(1, 2)
        lse = query.new_zeros(batch, num_heads, num_queries, dtype=sum_dtype(query))
        with torch.autocast(query.device.type, enabled=False):
            for block in blocks:
                place = block.batch, ALL, block.rows
                output[place], lse[place] = block_forward(query, key, value, block, scaling)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.blocks, ctx.scaling = blocks, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, output, lse = ctx.saved_tensors
        grad_query = torch.zeros_like(query)
        # Many parts may share a key: their gradients are summed before they are rounded.
        grad_key, grad_value = (torch.zeros_like(x, dtype=sum_dtype(x)) for x in (key, value))
        with torch.autocast(query.device.type, enabled=False):
            for block in ctx.blocks:
                place = block.batch, ALL, block.rows
                rows = torch.zeros_like(query[place], dtype=sum_dtype(query))
                for part in block.parts:
                    span = (block.batch, ALL, part.queries)
                    whole = (fold_chunks(x[span], part.num_chunks) for x in (gradient, output, lse))
                    grads = part_backward(*whole, *part_inputs(query, key, value, block, part), part, ctx.scaling)
                    rows[:, :, within(block, part)] += grads[0]
                    grad_key[block.batch, :, part.keys] += grads[1]
                    grad_value[block.batch, :, part.keys] += grads[2]
                grad_query[place] = rows
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def block_forward(query, key, value, block: Block, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, Q, D] and log-sum-exp [B, H, Q] of the block's rows."""
    first, *others = block.parts
    merged, lse = part_forward(*part_inputs(query, key, value, block, first), first, scaling)
    if others:
        merged = merged.to(lse.dtype)
    for part in others:
        span = within(block, part)
        piece = part_forward(*part_inputs(query, key, value, block, part), part, scaling)
        merge_into(merged[:, :, span], lse[:, :, span], *piece)
    return merged, lse


def merge_into(merged: torch.Tensor, lse: torch.Tensor, piece: torch.Tensor, piece_lse: torch.Tensor) -> None:
    """Add keys to a finished attention: `merged` and `lse` become those over both sets of keys, in place.

    merged, piece [B, H, Q, D]; lse, piece_lse [B, H, Q]. No exponent is positive, so nothing overflows.
    """
    total = torch.logaddexp(lse, piece_lse)
    merged.mul_((lse - total).exp_()[..., None]).addcmul_(piece, (piece_lse - total).exp_()[..., None])
    lse.copy_(total)


def within(block: Block, part: Part) -> slice:
    """The part's rows counted from the block's first."""
    return slice(part.queries.start - block.rows.start, part.queries.stop - block.rows.start)


def part_inputs(query, key, value, block: Block, part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the kernel reads: [B * N, H, Q / N, D] and twice [B * N, K, S / N, D], queries turned."""
    query = fold_chunks(query[block.batch, :, part.queries], part.num_chunks)
    key, value = (fold_chunks(x[block.batch, :, part.keys], part.num_chunks) for x in (key, value))
    return query if part.turn is None else part.turn.apply(query), key, value


def part_forward(query, key, value, part: Part, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse = attend(query, key, value, is_causal=part.is_causal, scaling=scaling)
    return unfold_chunks(output, part.num_chunks), unfold_chunks(lse, part.num_chunks)


def part_backward(gradient, output, lse, query, key, value, part: Part, scaling: float) -> list[torch.Tensor]:
    """The part's share of the gradients of its query rows and its keys and values, chunks unfolded."""
    grads = attend_backward(gradient, query, key, value, output, lse, is_causal=part.is_causal, scaling=scaling)
    grad_query = grads[0] if part.turn is None else part.turn.undo(grads[0])
    return [unfold_chunks(x, part.num_chunks) for x in (grad_query, *grads[1:])]


def fold_chunks(x: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """[B, H, N * S, ...] -> [B * N, H, S, ...]; a view for one batch row."""
    return x if num_chunks == 1 else x.unflatten(2, (num_chunks, -1)).transpose(1, 2).flatten(0, 1)


def unfold_chunks(x: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """[B * N, H, S, ...] -> [B, H, N * S, ...]; a view on what the kernels write, which is [B * N, S, H, ...]."""
    if num_chunks == 1:
        return x
    return x.unflatten(0, (-1, num_chunks)).transpose(2, 3).flatten(1, 2).transpose(1, 2)
