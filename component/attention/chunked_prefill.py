"""Read a long input in blocks against a KV cache of fixed size.

A block needs no more memory for a longer input, but for the keys and values themselves: the cache is
one buffer per layer, filled in place, where growing by concatenation would hold every layer twice.

Dimensions: B batch, K key/value heads, S sequence, D head dim.
"""

from collections.abc import Iterator

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in buffers [B, K, num_tokens, D], allocated by the first block."""

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, ...]:
        """Add key_states and value_states [B, K, n, D]; returns views of all tokens so far."""
        states, first = (key_states, value_states), self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(*states)
            self.buffers = [x.new_empty(*x.shape[:2], self.num_tokens, x.shape[3]) for x in states]
        end = first + key_states.shape[2]
        assert end <= self.num_tokens, "the cache was made for fewer tokens"
        for buffer, x in zip(self.buffers, states, strict=True):
            buffer[:, :, first:end] = x
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


@torch.no_grad()
def states_in_blocks(
    module: torch.nn.Module, input_ids: torch.Tensor, *, config: PretrainedConfig, block_size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first position, output of `module` for the block) for blocks of `input_ids` int [B, S].

    module: a decoder or a causal language model of transformers; its first output [B, block, any] is given out.
    """
    num_layers, num_tokens = config.get_text_config().num_hidden_layers, input_ids.shape[1]
    cache = Cache(layers=[PreallocatedLayer(num_tokens) for _ in range(num_layers)])
    for first in range(0, num_tokens, block_size):
        block = input_ids[:, first : first + block_size]
        yield first, module(input_ids=block, past_key_values=cache, use_cache=True)[0]
