"""Read a long input in blocks against a KV cache of fixed size.

What a block needs does not grow with the input, but for the keys and values themselves: the cache is
one buffer per layer, filled in place, where growing by concatenation would hold every layer twice.

Dimensions: B batch, K key/value heads, S sequence, D head dim.
"""

from collections.abc import Iterator

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in buffers [B, K, num_tokens, D]; what is given out are views of their beginning."""

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.num_seen = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer, self.value_buffer = (
            states.new_empty(*states.shape[:2], self.num_tokens, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add key_states and value_states [B, K, n, D]; returns views of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.num_seen + key_states.shape[2]
        assert end <= self.num_tokens, "the cache was made for fewer tokens"
        self.key_buffer[:, :, self.num_seen : end] = key_states
        self.value_buffer[:, :, self.num_seen : end] = value_states
        self.num_seen = end
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.num_seen


def preallocated_cache(config: PretrainedConfig, num_tokens: int) -> Cache:
    """A KV cache for `num_tokens` tokens; nothing is allocated before the first block."""
    return Cache(layers=[PreallocatedLayer(num_tokens) for _ in range(config.get_text_config().num_hidden_layers)])


@torch.no_grad()
def states_in_blocks(
    module: torch.nn.Module, input_ids: torch.Tensor, *, config: PretrainedConfig, block_size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first position, output of `module` for the block) for blocks of `input_ids` int [B, S].

    module: a decoder or a causal language model of transformers; its first output [B, block, any] is given out.
    """
    cache = preallocated_cache(config, input_ids.shape[1])
    for first in range(0, input_ids.shape[1], block_size):
        block = input_ids[:, first : first + block_size]
        yield first, module(input_ids=block, past_key_values=cache, use_cache=True)[0]
