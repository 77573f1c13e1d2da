"""Rotation of queries by further positions, after RoPE has rotated them; RoPE's pairs may lie in any known layout.

Pure maths: knows nothing of Hugging Face. Dimensions: Q queries, D head dim, R frequencies (2 R <= D; the rest of a
head passes through).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotaryLayout:
    """Where RoPE's pairs lie in a head: pair d is (start + d, start + R + d) as in Llama, or, interleaved,
    (start + 2 d, start + 2 d + 1)."""

    start: int = 0
    is_interleaved: bool = False

    def pairs(self, x: torch.Tensor, num_freqs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [..., R] on the first and the second dimensions of all pairs of x [..., D]."""
        rotary = x[..., self.start : self.start + 2 * num_freqs]
        if self.is_interleaved:
            return rotary[..., 0::2], rotary[..., 1::2]
        return rotary[..., :num_freqs], rotary[..., num_freqs:]


LLAMA_LAYOUT = RotaryLayout()


@dataclass(frozen=True)
class QueryRotation:
    """Rotation of queries [..., Q, D] by an angle per row and frequency: cos and sin [Q, R]."""

    cos: torch.Tensor
    sin: torch.Tensor
    layout: RotaryLayout = LLAMA_LAYOUT

    def rotate(self, x: torch.Tensor, *, is_back: bool = False) -> torch.Tensor:
        """Rotate x [..., Q, D], computed in the dtype of cos; is_back: by the opposite angles, as gradients need."""
        num_freqs, rotated, sin = self.cos.shape[-1], torch.empty_like(x), -self.sin if is_back else self.sin
        begin, end = self.layout.start, self.layout.start + 2 * num_freqs
        rotated[..., :begin], rotated[..., end:] = x[..., :begin], x[..., end:]
        first, second = self.layout.pairs(x, num_freqs)
        rotated_first, rotated_second = self.layout.pairs(rotated, num_freqs)
        rotated_first.copy_((first * self.cos).addcmul_(second, sin, value=-1))
        rotated_second.copy_((second * self.cos).addcmul_(first, sin))
        return rotated


def query_rotation(
    delta_positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype, layout: RotaryLayout = LLAMA_LAYOUT
) -> QueryRotation:
    """Rotation by `delta_positions` [Q]; inv_freq [R] in radians per position; angles are in `dtype`."""
    angles = torch.outer(delta_positions.to(inv_freq.device, dtype), inv_freq.to(dtype))
    return QueryRotation(angles.cos(), angles.sin(), layout)
