"""What S2-Attn is measured against: the rolled form of LongLoRA's code, with and without held scores.

The second half of the heads is rolled by half a group, groups become batch rows, and the result is
rolled back. The roll wraps around: in the last group of the rolled heads the sequence's first half
group of tokens comes after its last, and attends to it. Lengths must be multiples of the group size.

Dimensions: B batch, H query heads, K key/value heads, S sequence, D head dim, G group size, N groups.
"""

import math

import torch
import torch.nn.functional as F


def roll_half(x: torch.Tensor, shift: int) -> torch.Tensor:
    """[B, H, S, D] with the second half of the heads rolled by `shift` tokens, as a new tensor."""
    first, second = x.chunk(2, dim=1)
    return torch.cat([first, second.roll(shift, dims=2)], dim=1)


def to_groups(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """[B, H, S, D] -> [B*N, H, G, D]."""
    batch, heads, length, dim = x.shape
    rows = x.transpose(1, 2).reshape(batch * (length // group_size), group_size, heads, dim)
    return rows.transpose(1, 2)


def from_groups(x: torch.Tensor, batch: int) -> torch.Tensor:
    """[B*N, H, G, D] -> [B, H, S, D]."""
    _, heads, _, dim = x.shape
    return x.transpose(1, 2).reshape(batch, -1, heads, dim).transpose(1, 2)


def materialized_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention that holds all scores [B, H, S, S], with an additive mask and an fp32 softmax."""
    length, dim = query.shape[-2:]
    hidden = torch.full((length, length), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    scores = query @ key.transpose(-1, -2) / math.sqrt(dim) + hidden.triu(1)
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def sdpa_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention through torch's SDPA; equal head counts."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def rolled_shift_short_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group_size: int, *, kernel=sdpa_attention
) -> torch.Tensor:
    """Shift-short attention with wrap-around.

    query [B, H, S, D]; key and value [B, K, S, D], K dividing H; S a multiple of the even `group_size`.
    kernel: causal attention within a group. Returns [B, H, S, D].
    """
    batch, heads, length, _ = query.shape
    if length % group_size:
        raise ValueError(f"length {length} is no multiple of the group size {group_size}; the rolled form needs one")
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    grouped = (to_groups(roll_half(x, -(group_size // 2)), group_size) for x in (query, key, value))
    return roll_half(from_groups(kernel(*grouped), batch), group_size // 2)
