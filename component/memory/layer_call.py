"""How one call of a decoder layer is carried out: what is kept, in which tiles and chunks, with which dropout masks.

Dimensions: B batch, S sequence, H query heads, D head dim.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from longqlora.attention.lse_kernels import CausalPattern
from longqlora.memory.decoder_layer import DecoderLayer


@dataclass(frozen=True)
class LayerOptions:
    """keep: what stays from the forward pass, one of KEPT, each with those before it: the layer's input, the
    attention's output and log-sum-exp, queries/keys/values, the products inside the MLP.

    tile_size: tokens at a time; num_head_chunks: parts in which attention and its projections are computed.
    """

    keep: str = "attention"
    tile_size: int = 1024
    num_head_chunks: int = 1


@dataclass
class LayerCall:
    """One call of a layer: what does not change between its forward and its backward pass.

    cos, sin [B or 1, S, D]. pattern: None where attention is `attend(q, k, v)` on [B, H, S, D], through autograd.
    seed: of all dropout masks.
    """

    layer: DecoderLayer
    options: LayerOptions
    dtype: torch.dtype
    cos: torch.Tensor
    sin: torch.Tensor
    pattern: CausalPattern | None
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    seed: int
    store: Any = None

    def tiles(self, length: int) -> Iterator[tuple[slice, Callable[[str], int]]]:
        """Tiles of the sequence, each with the seeds of its dropout masks."""
        for start in range(0, length, self.options.tile_size):
            yield (
                slice(start, min(start + self.options.tile_size, length)),
                lambda name, start=start: mask_seed(self.seed, name, start),
            )

    def rope(self, tile: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos[:, tile], self.sin[:, tile]

    def head_chunks(self) -> list[tuple[slice, slice]]:
        """Query heads and the key/value heads that they share, chunk by chunk."""
        num_kv_heads, per_kv_head = self.layer.num_kv_heads, self.layer.num_heads // self.layer.num_kv_heads
        size = -(-num_kv_heads // (self.options.num_head_chunks if self.pattern else 1))
        bounds = [(low, min(low + size, num_kv_heads)) for low in range(0, num_kv_heads, size)]
        return [(slice(low * per_kv_head, high * per_kv_head), slice(low, high)) for low, high in bounds]


def mask_seed(seed: int, name: str, start: int) -> int:
    """Seed of one dropout mask; mixed well, since torch's CPU generator uses the low 32 bits only."""
    mixed = (seed + (sum(map(ord, name)) * 2**32 + start + 1) * 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> shift)) * factor % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63
