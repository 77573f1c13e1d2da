"""Causal attention of whole sequences, full or shift-short, a few heads at a time, with its log-sum-exp.

For a backward pass that has the output and log-sum-exp and need not run attention again
(layer_backward.py). Gradients take the place of the queries, keys and values that they belong to, so that
the backward pass holds little more than the forward pass: with 4 pieces, 3/4 of one [B, S, H, D] tensor.

Dimensions: B batch, S sequence, H query heads, K key/value heads (K divides H), D head dim, G group size,
N groups. Tensors are laid out as the projections give them: [B, S, H, D].
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch

from component.attention_kernels import attend, attend_backward, sum_dtype
from component.shift_short_attention import group_sizes

NUM_PIECES = 4


class CausalPattern(NamedTuple):
    """Which keys a query sees: all up to its own position, or those of its group (None: no groups).

    num_heads: all query heads of the layer, of which a call may compute some: the second half is shifted.
    """

    group_size: int | None
    num_heads: int


class Piece(NamedTuple):
    """Query heads computed together, the key/value heads that they share, and the sizes of their groups."""

    heads: slice
    kv_heads: slice | list[int]
    sizes: list[int]


def attention_forward(query, key, value, output, lse, *, pattern: CausalPattern, first_head: int, scaling: float):
    """Write the attention of some heads into `output` and `lse`.

    query and output [B, S, H, D]; key and value [B, S, K, D]; lse [B, H, S] in fp32 (fp64 for fp64).
    first_head: place of the first of the H heads among pattern.num_heads.
    """
    for piece in pieces_of(query, key, pattern, first_head):
        pieces = query[:, :, piece.heads], key[:, :, piece.kv_heads], value[:, :, piece.kv_heads]
        for rows, size in runs_of(piece.sizes):
            part, part_lse = attend(*(grouped(x[:, rows], size) for x in pieces), is_causal=True, scaling=scaling)
            write_groups(output[:, rows, piece.heads], part, size)
            write_groups(lse[:, piece.heads, rows].transpose(1, 2)[..., None], part_lse[..., None], size)


def attention_backward(
    gradient, query, key, value, output, lse, *, pattern: CausalPattern, first_head: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value for the gradient [B, S, H, D] of the output.

    Shapes as in `attention_forward`. query, key and value are overwritten: the gradients lie in their memory,
    or in new memory for key/value heads that several pieces share.
    """
    pieces = pieces_of(query, key, pattern, first_head)
    is_shared = any(isinstance(piece.kv_heads, list) for piece in pieces)
    grad_key, grad_value = (torch.zeros_like(x) if is_shared else x for x in (key, value))
    for piece in pieces:
        keys, values = key[:, :, piece.kv_heads], value[:, :, piece.kv_heads]
        for rows, size in runs_of(piece.sizes):
            inputs = [query[:, rows, piece.heads], keys[:, rows], values[:, rows], output[:, rows, piece.heads]]
            run_lse = grouped(lse[:, piece.heads, rows].transpose(1, 2)[..., None], size)[..., 0].contiguous()
            run_gradient = grouped(gradient[:, rows, piece.heads], size)
            grads = attend_backward(
                run_gradient, *(grouped(x, size) for x in inputs), run_lse, is_causal=True, scaling=scaling
            )
            write_groups(query[:, rows, piece.heads], grads[0], size)
            for target, grad in ((grad_key, grads[1]), (grad_value, grads[2])):
                if is_shared:
                    flat = torch.empty_like(inputs[0])
                    write_groups(flat, grad, size)
                    target[:, rows].index_add_(2, torch.tensor(piece.kv_heads, device=grad.device), flat)
                else:
                    write_groups(target[:, rows, piece.kv_heads], grad, size)
            # Not to be held while the next piece is at work.
            del grads, grad
    return query, grad_key, grad_value


def pieces_of(query: torch.Tensor, key: torch.Tensor, pattern: CausalPattern, first_head: int) -> list[Piece]:
    """Split the heads where the shift begins, and each side further, between key/value heads where that is possible."""
    num_heads, num_kv_heads, length = query.shape[2], key.shape[2], query.shape[1]
    per_kv_head, cut = num_heads // num_kv_heads, num_heads
    if pattern.group_size is not None:
        cut = min(max(pattern.num_heads // 2 - first_head, 0), num_heads)
    if cut % per_kv_head:
        # A key/value head straddles the two halves: each query head gets a copy of its own.
        bounds = [(0, cut), (cut, num_heads)]
        kv_heads = [[head // per_kv_head for head in range(*bound)] for bound in bounds]
    else:
        per_piece = per_kv_head * max(1, num_kv_heads // NUM_PIECES)
        bounds = [(low, min(low + per_piece, end)) for start, end in ((0, cut), (cut, num_heads))
                  for low in range(start, end, per_piece)]  # fmt: skip
        kv_heads = [slice(low // per_kv_head, high // per_kv_head) for low, high in bounds]
    sizes = {
        shifted: [length] if pattern.group_size is None else group_sizes(length, pattern.group_size, shifted=shifted)
        for shifted in (False, True)
    }
    return [
        Piece(slice(low, high), heads, sizes[low >= cut]) for (low, high), heads in zip(bounds, kv_heads, strict=True)
    ]


def runs_of(sizes: list[int]) -> Iterator[tuple[slice, int]]:
    """Rows of consecutive groups of one size, and that size: a run is one kernel call."""
    start = 0
    for size, run in groupby(sizes):
        stop = start + size * len(list(run))
        yield slice(start, stop), size
        start = stop


def grouped(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, N * G, H, D] -> [B * N, H, G, D]; a view."""
    return x.unflatten(1, (-1, size)).flatten(0, 1).transpose(1, 2)


def write_groups(target: torch.Tensor, source: torch.Tensor, size: int) -> None:
    """Copy source [B * N, H, G, D] into target [B, N * G, H, D], without a copy in between."""
    target.unflatten(1, (-1, size)).copy_(source.unflatten(0, (target.shape[0], -1)).transpose(2, 3))


def empty_lse(query: torch.Tensor) -> torch.Tensor:
    """Room for the log-sum-exp [B, H, S] of query [B, S, H, D]."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], dtype=sum_dtype(query))
