"""A KV cache of constant size for endless input: the first tokens and the latest ones (StreamingLLM, arXiv 2309.17453).

Kept are `num_sinks` tokens, on which attention leans whatever they say, and the `window - num_sinks` latest ones. A
query sees these and the tokens of its own forward pass, at distances as if no token had ever stood between sinks and
window (section 3.2 of the paper). RoPE knows distances only: the latest keys stay as they were rotated, at positions
that go on growing, and the sink keys are rotated forward by the number of tokens evicted, from their originals each
time, so that nothing adds up.

Positions need not grow for ever: `SinkCache.rebase` turns the state into that of a cache that has seen the kept
tokens only. RoPE computes angles in fp32, whose error is 0.03 rad at position 10^6.

Dimensions: B batch, K key/value heads, S sequence, D head dim, R RoPE frequencies (2 R <= D).
"""

import copy

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from longqlora.attention.binding import set_attention
from longqlora.attention.dual_chunk_binding import CONFIG_KEY as DUAL_CHUNK_KEY
from longqlora.attention.dual_chunk_binding import rotary_layouts
from longqlora.attention.model_internals import has_sliding_window, rotary_embedding
from longqlora.attention.proof import refusing, tiny_copy
from longqlora.attention.rotation import LLAMA_LAYOUT, query_rotation
from longqlora.attention.sdpa import sum_dtype
from longqlora.model.context import context_length, rope_that_follows_length

DEFAULT_NUM_SINKS = 4
MAX_BLOCK_SIZE = 1024


class SinkLayer(DynamicLayer):
    """Keys and values of one layer: those of the first `num_sinks` tokens and of the latest `window - num_sinks`.

    Counts as many tokens as it was ever given since the last `rebase`. Sink keys are kept as they came. Tensors are
    replaced and never written to, so that a shallow copy is a snapshot.
    """

    # What is evicted cannot come back.
    is_croppable = False

    def __init__(self, inv_freq: torch.Tensor, window: int, num_sinks: int):
        super().__init__()
        self.inv_freq, self.window, self.num_sinks, self.num_seen = inv_freq, window, num_sinks, 0

    @property
    def num_evicted(self) -> int:
        return max(self.num_seen - self.window, 0)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, ...]:
        """Add key_states and value_states [B, K, n, D]; returns those of kept and new tokens, the sinks' keys rotated
        to stand right before the window."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        sinks, latest = self._kept(self.keys)
        self.keys = keys = torch.cat([sinks, latest, key_states], dim=2)
        self.values = torch.cat([*self._kept(self.values), value_states], dim=2)
        if self.num_evicted:
            keys = torch.cat([self._rotated(sinks, self.num_evicted), latest, key_states], dim=2)
        self.num_seen += key_states.shape[2]
        return keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, position of the first): the sinks stand where the tokens before the window were."""
        return self.num_seen - self.num_evicted + query_length, self.num_evicted

    def get_seq_length(self) -> int:
        return self.num_seen

    def reset(self) -> None:
        # Dropped, not zeroed as transformers 5.17 does: they may be inference tensors.
        self.keys = self.values = None
        self.is_initialized, self.num_seen = False, 0

    def rebase(self) -> None:
        """Let the kept tokens have the positions from 0 on: one rotation of the latest keys."""
        if self.num_evicted:
            sinks, latest = self._kept(self.keys)
            self.keys = torch.cat([sinks, self._rotated(latest, -self.num_evicted)], dim=2)
            self.values = torch.cat(self._kept(self.values), dim=2)
            self.num_seen = self.window

    def _rotated(self, keys: torch.Tensor, num_positions: int) -> torch.Tensor:
        positions = self.inv_freq.new_full((1,), num_positions)
        return query_rotation(positions, self.inv_freq, sum_dtype(keys)).rotate(keys)

    def _kept(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Sinks and latest tokens, [B, K, S, D] each, of the states after the last forward pass."""
        num_latest = max(min(self.num_seen, self.window) - self.num_sinks, 0)
        return [states[:, :, : self.num_sinks], states[:, :, states.shape[2] - num_latest :]]


class SinkCache(Cache):
    """The cache of a model; made by `sink_cache`. `block_size` is the most tokens that one forward pass may add."""

    def __init__(self, inv_freq: torch.Tensor, num_layers: int, *, window: int, num_sinks: int, block_size: int):
        super().__init__(layers=[SinkLayer(inv_freq, window, num_sinks) for _ in range(num_layers)])
        self.window, self.num_sinks, self.block_size = window, num_sinks, block_size

    @property
    def num_evicted(self) -> int:
        return self.layers[0].num_evicted

    def rebase(self, ids: list[int]) -> list[int]:
        """Count from 0 again. ids: those of all tokens seen since the last time, and any not seen yet; returns them
        without the evicted ones, as the cache counts them now.

        Where at least `window` tokens are evicted from one time to the next, no key is rotated twice by it.
        """
        kept = [*ids[: self.num_sinks], *ids[self.num_sinks + self.num_evicted :]]
        for layer in self.layers:
            layer.rebase()
        return kept

    def snapshot(self) -> list[CacheLayerMixin]:
        """The present state, for `restore`; takes no memory until the cache moves on."""
        return [copy.copy(layer) for layer in self.layers]

    def restore(self, snapshot: list[CacheLayerMixin]) -> None:
        # One assignment: an interrupt finds the one state or the other.
        self.layers = snapshot


def check_streaming(config: PretrainedConfig, window: int | None, num_sinks: int | None) -> tuple[int, int]:
    """Window and sinks in tokens for a model with `config`. None takes as window all of the context but the block in
    which long inputs are read, and the paper's number of sinks.

    Raises ValueError, naming the flag, for sizes or a model with which sinks and a window make no context.
    """
    if getattr(config, DUAL_CHUNK_KEY, None):
        raise ValueError("--streaming: does not go with dual chunk attention; pass --attention full")
    if rope_type := rope_that_follows_length(config):
        raise ValueError(
            f"--streaming: {rope_type} RoPE rotates by other angles as the text grows, which kept keys cannot follow; "
            "use a model with another rope_type"
        )
    if has_sliding_window(config):
        raise ValueError(f"--streaming: {config.model_type} has sliding-window layers, which forget its sinks")
    context_size = context_length(config)
    num_sinks = DEFAULT_NUM_SINKS if num_sinks is None else num_sinks
    window = context_size - min(MAX_BLOCK_SIZE, max(1, context_size // 8)) if window is None else window
    if not 0 <= num_sinks < window < context_size:
        raise ValueError(
            f"--streaming_window {window}, --num_sinks {num_sinks}: the window contains the sinks (the paper uses "
            f"{DEFAULT_NUM_SINKS}) and must be less than the model's context of {context_size} tokens"
        )
    return window, num_sinks


def sink_cache(
    model: PreTrainedModel | PeftModel, *, window: int | None = None, num_sinks: int | None = None
) -> SinkCache:
    """An empty cache for `model`. Raises ValueError as `check_streaming`, and where a layer lacks Llama's RoPE."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    window, num_sinks = check_streaming(model.config, window, num_sinks)
    num_layers = model.config.get_text_config().num_hidden_layers
    with torch.no_grad(), refusing(model, "--streaming", "leave it out"):
        layouts = rotary_layouts(tiny_copy(model), set_attention)
        if list(layouts.values()) != [LLAMA_LAYOUT] * num_layers:
            raise ValueError("it has no rotary position embeddings as Llama has them, in every layer")
    block_size = min(MAX_BLOCK_SIZE, context_length(model.config) - window)
    inv_freq = rotary_embedding(model).inv_freq
    return SinkCache(inv_freq, num_layers, window=window, num_sinks=num_sinks, block_size=block_size)
