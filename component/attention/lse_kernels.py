"""Causal attention of whole sequences, full or shift-short, a few heads at a time, with its log-sum-exp.

For a backward pass that has the output and log-sum-exp and need not run attention again
(layer_function.py). Gradients take the place of the queries, keys and values that they belong to, so that
the backward pass holds little more than the forward pass: with 4 pieces, 3/4 of one [B, S, H, D] tensor.

Dimensions: B batch, S sequence, H query heads, K key/value heads (K divides H), D head dim, G group size,
N groups. Tensors are laid out as the projections give them: [B, S, H, D].

Pure maths: knows nothing of Hugging Face.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch

from longqlora.attention.sdpa import attend, attend_backward, sum_dtype
from longqlora.attention.segments import Documents
from longqlora.attention.shift_short import cut, group_sizes

NUM_PIECES = 4


class CausalPattern(NamedTuple):
    """Which keys a query sees: all up to its own position, or those of its group (None: no groups).

    num_heads: all query heads of the layer, of which a call may compute some: the second half is shifted.
    documents: where rows hold several, between which nothing is seen.
    """

    group_size: int | None
    num_heads: int
    documents: Documents | None = None


class Piece(NamedTuple):
    """Rows and query heads computed together, the key/value heads that they share, and the sizes of their groups."""

    batch: slice
    heads: slice
    kv_heads: slice | list[int]
    sizes: list[int]


def attention_forward(query, key, value, output, lse, *, pattern: CausalPattern, first_head: int, scaling: float):
    """Write the attention of some heads into `output` and `lse`.

    query and output [B, S, H, D]; key and value [B, S, K, D]; lse [B, H, S] in fp32 (fp64 for fp64).
    first_head: place of the first of the H heads among pattern.num_heads.
    """
    for batch, heads, kv_heads, sizes in pieces_of(query, key, pattern, first_head):
        inputs = query[batch, :, heads], key[batch, :, kv_heads], value[batch, :, kv_heads]
        for rows, size in runs_of(sizes):
            part, part_lse = attend(*(grouped(x[:, rows], size) for x in inputs), is_causal=True, scaling=scaling)
            write_groups(output[batch, rows, heads], part, size)
            write_groups(lse[batch, heads, rows].transpose(1, 2)[..., None], part_lse[..., None], size)


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
    for batch, heads, kv_heads, sizes in pieces:
        keys, values = key[batch, :, kv_heads], value[batch, :, kv_heads]
        for rows, size in runs_of(sizes):
            inputs = [query[batch, rows, heads], keys[:, rows], values[:, rows], output[batch, rows, heads]]
            run_lse = grouped(lse[batch, heads, rows].transpose(1, 2)[..., None], size)[..., 0].contiguous()
            run_gradient = grouped(gradient[batch, rows, heads], size)
            grads = attend_backward(
                run_gradient, *(grouped(x, size) for x in inputs), run_lse, is_causal=True, scaling=scaling
            )
            write_groups(query[batch, rows, heads], grads[0], size)
            for target, grad in ((grad_key, grads[1]), (grad_value, grads[2])):
                if is_shared:
                    flat = torch.empty_like(inputs[0])
                    write_groups(flat, grad, size)
                    target[batch, rows].index_add_(2, torch.tensor(kv_heads, device=grad.device), flat)
                else:
                    write_groups(target[batch, rows, kv_heads], grad, size)
            # Not to be held while the next piece is at work.
            del grads, grad
    return query, grad_key, grad_value


def pieces_of(query: torch.Tensor, key: torch.Tensor, pattern: CausalPattern, first_head: int) -> list[Piece]:
    """Split the heads where the shift begins, and each side further, between key/value heads where that is possible.

    Rows whose documents differ are pieces of their own; short runs of groups need no further split.
    """
    num_heads, length = query.shape[2], query.shape[1]
    groups = [group_sizes(length, pattern.group_size, shifted=shifted) for shifted in (False, True)]
    cut_head = num_heads
    if pattern.group_size is not None:
        cut_head = min(max(pattern.num_heads // 2 - first_head, 0), num_heads)
    rows = [(slice(None), groups)]
    if pattern.documents is not None:
        rows = [
            (slice(index, index + 1), [cut(sizes, lengths) for sizes in groups])
            for index, lengths in enumerate(pattern.documents)
        ]
    pieces = []
    for batch, sizes in rows:
        longest = max(run.stop - run.start for side in sizes for run, _ in runs_of(side))
        num_pieces = NUM_PIECES if longest * NUM_PIECES > length else 1
        bounds, kv_heads = head_bounds(num_heads, key.shape[2], cut_head, num_pieces)
        pieces += [
            Piece(batch, slice(low, high), shared, sizes[low >= cut_head])
            for (low, high), shared in zip(bounds, kv_heads, strict=True)
        ]
    return pieces


def head_bounds(num_heads: int, num_kv_heads: int, cut_head: int, num_pieces: int) -> tuple[list, list]:
    """Ranges of query heads, none across `cut_head`, and the key/value heads that each needs."""
    per_kv_head = num_heads // num_kv_heads
    if cut_head % per_kv_head:
        # A key/value head straddles the two halves: each query head gets a copy of its own.
        bounds = [(0, cut_head), (cut_head, num_heads)]
        return bounds, [[head // per_kv_head for head in range(*bound)] for bound in bounds]
    per_piece = per_kv_head * max(1, num_kv_heads // num_pieces)
    bounds = [(low, min(low + per_piece, end)) for start, end in ((0, cut_head), (cut_head, num_heads))
              for low in range(start, end, per_piece)]  # fmt: skip
    return bounds, [slice(low // per_kv_head, high // per_kv_head) for low, high in bounds]


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
