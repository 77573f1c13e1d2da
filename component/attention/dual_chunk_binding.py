"""What dual chunk attention (DCA) needs of a transformers model: positions within the chunk, and its attention call.

RoPE must rotate a token at position p as if it stood at p modulo the stride of the chunks. Two forward pre-hooks do
that, on the decoder (position ids of padded batches) and on its rotary embedding (the modulo). Where in a head RoPE's
pairs lie, and in which layers, is read off the queries (`rotary_layouts`).

Dimensions: B batch, H query heads, K key/value heads, Q queries, S keys, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel

from longqlora.attention.dual_chunk import DualChunkSizes, attention_mscale, dual_chunk_attention
from longqlora.attention.model_internals import attention_layers, rotary_embedding
from longqlora.attention.rotation import LLAMA_LAYOUT, RotaryLayout, query_rotation
from longqlora.attention.sdpa import causal_attention
from longqlora.attention.shift_short_binding import segment_ids_of_rows
from longqlora.settings.config import DEFAULT_MSCALE, MSCALES

# The key and the names in it are those of Qwen2.5-1M's configs.
CONFIG_KEY = "dual_chunk_attention_config"
ATTRIBUTE = "dual_chunk_rotary"
# A layer without RoPE has no positions: to it every input is one chunk.
ONE_CHUNK = DualChunkSizes(2**62)


@dataclass
class DualChunkRotary:
    """The rotary embedding of a model, for an attention layer, which must not own it as a submodule."""

    module: torch.nn.Module
    sizes: DualChunkSizes
    layout: RotaryLayout
    handles: list[RemovableHandle]


def dual_chunk_sizes(config: PretrainedConfig) -> DualChunkSizes | None:
    """Sizes of dual chunk attention that `config` names; None where it names none."""
    values = getattr(config, CONFIG_KEY, None)
    if not values:
        return None
    pretraining_length = values.get("original_max_position_embeddings") or config.max_position_embeddings
    return DualChunkSizes(pretraining_length, values.get("chunk_size"), values.get("local_size"))


def set_dual_chunk(
    config: PretrainedConfig, sizes: DualChunkSizes, context_size: int, mscale: str | bool | None
) -> None:
    """Let `config` ask for dual chunk attention over `context_size` tokens, as the functions around this read it."""
    values = {
        "chunk_size": sizes.chunk_size,
        "local_size": sizes.local_window,
        "original_max_position_embeddings": sizes.pretraining_length,
        "max_position_embeddings": context_size,
    }
    setattr(config, CONFIG_KEY, {**values, "mscale": mscale} if mscale else values)


def logit_scale(config: PretrainedConfig) -> float:
    """Factor of the logits: 1, or where `config` asks for mscale, that of its context, whatever the input's length."""
    values = getattr(config, CONFIG_KEY, None) or {}
    if not values.get("mscale"):
        return 1.0
    num_tokens = values.get("max_position_embeddings") or config.max_position_embeddings
    name = values["mscale"] if values["mscale"] in MSCALES else DEFAULT_MSCALE
    return attention_mscale(num_tokens, dual_chunk_sizes(config).pretraining_length, name)


def add_chunk_positions(model: PreTrainedModel, sizes: DualChunkSizes, layouts: dict[int, RotaryLayout | None]) -> None:
    """Let RoPE of `model` rotate by positions within the chunk; layouts: by layer index, None without RoPE."""
    rotary = rotary_embedding(model)
    handles = [
        model.get_decoder().register_forward_pre_hook(number_real_tokens, with_kwargs=True),
        rotary.register_forward_pre_hook(partial(modulo_positions, stride=sizes.stride), with_kwargs=True),
    ]
    for module in attention_layers(model):
        layout = layouts.get(module.layer_idx, LLAMA_LAYOUT)
        own_sizes = ONE_CHUNK if layout is None else sizes
        setattr(module, ATTRIBUTE, DualChunkRotary(rotary, own_sizes, layout or LLAMA_LAYOUT, handles))


def remove_chunk_positions(model: PreTrainedModel) -> None:
    """Undo `add_chunk_positions`; a model without it is left as it is."""
    for module in attention_layers(model):
        if hasattr(module, ATTRIBUTE):
            for handle in getattr(module, ATTRIBUTE).handles:
                handle.remove()
            delattr(module, ATTRIBUTE)


def number_real_tokens(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Give a padded batch without position ids those that count real tokens only, as `generate` does.

    Without DCA a shift of all positions changes nothing; with it the borders of the chunks would move.
    """
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and mask is not None and mask.ndim == 2 and not bool(mask.all()):
        inputs = next(x for x in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args) if x is not None)
        kwargs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -inputs.shape[1] :]
    return args, kwargs


def modulo_positions(module: torch.nn.Module, args: tuple, kwargs: dict, *, stride: int) -> tuple[tuple, dict]:
    """Pre-hook of a rotary embedding: position ids [B, Q] become position ids modulo `stride`."""
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": kwargs["position_ids"] % stride}
    return (args[0], args[1] % stride, *args[2:]), kwargs


def rotary_layouts(model: PreTrainedModel, set_attention: Callable) -> dict[int, RotaryLayout | None]:
    """Layout of RoPE in each layer that calls the attention function, by its index; None where it has no RoPE.

    model: a small float32 copy; set_attention: that of binding.py. With all positions shifted, queries are rotated
    and nothing else changes: which rotation it is tells the layout. Raises ValueError for a model without rotary
    embedding, or where no layout known here rotates like this.
    """
    inv_freq, ids, shift, queries = rotary_embedding(model).inv_freq, torch.arange(3, 9)[None], 3, {}

    def record(module, query, key, value, attention_mask, *, scaling=None, **kwargs):
        queries.setdefault(module.layer_idx, []).append(query)
        return causal_attention(query, key, value, scaling=scaling).transpose(1, 2), None

    set_attention(model, "recording", record, lambda **kwargs: None)
    for start in (0, shift):
        model(input_ids=ids, position_ids=torch.arange(start, start + ids.shape[1])[None], use_cache=False)
    if any(len(found) != 2 for found in queries.values()):
        raise ValueError("a layer calls attention more than once")
    return {index: layout_between(*pair, shift, inv_freq) for index, pair in queries.items()}


def layout_between(query, shifted, shift: int, inv_freq: torch.Tensor) -> RotaryLayout | None:
    """The layout in which query [B, H, Q, D], rotated by `shift` positions, is `shifted`; None where they are equal."""
    rest, tolerance = query.shape[-1] - 2 * len(inv_freq), 1e-3 * float(query.abs().max())
    if torch.allclose(query, shifted, rtol=0, atol=tolerance):
        return None
    positions, starts = torch.full((query.shape[2],), shift), sorted({0, rest}) if rest >= 0 else []
    for layout in (RotaryLayout(start, is_interleaved) for start in starts for is_interleaved in (False, True)):
        rotated = query_rotation(positions, inv_freq, query.dtype, layout).rotate(query)
        if torch.allclose(rotated, shifted, rtol=0, atol=tolerance):
            return layout
    raise ValueError("positions enter its attention in another way than by RoPE alone")


def dual_chunk_forward(
    module, query, key, value, attention_mask, *, dropout=0.0, scaling=None, mscale=1.0, **kwargs
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface; the same in training and evaluation.

    query [B, H, Q, D] and key [B, K, S, D], rotated by positions within the chunk; attention_mask as
    `dual_chunk_mask_function` makes it; mscale: factor of the logits. Returns ([B, Q, H, D], None).
    """
    rotary: DualChunkRotary | None = getattr(module, ATTRIBUTE, None)
    if rotary is None:
        raise ValueError("attention: dca is set on a model that it was not bound to; use bind_inference_attention")
    if dropout > 0:
        raise ValueError(f"attention: dca has no attention dropout; set attention_dropout to 0, it is {dropout}")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError("attention: dca takes padding masks [batch, tokens] and packed rows, no 4-D mask")
    output = dual_chunk_attention(
        query, key, value, inv_freq=rotary.module.inv_freq.to(query.device), sizes=rotary.sizes, layout=rotary.layout,
        scaling=(query.shape[-1] ** -0.5 if scaling is None else scaling) * mscale, segment_ids=attention_mask,
    )  # fmt: skip
    return output.transpose(1, 2), None


def dual_chunk_mask_function(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable, attention_mask, device, **others
) -> torch.Tensor | None:
    """Mask function of transformers' interface: segment ids int64 [B, S], -1 for padding, or None for plain rows."""
    if kv_length != int(others.get("q_offset", 0)) + q_length:
        raise ValueError("attention: dca decodes with a dynamic cache, not with a static one")
    if q_length < kv_length and attention_mask is not None:
        real = attention_mask[:, -kv_length:].bool()
        if bool((real[:, :-1] & ~real[:, 1:]).any()):
            raise ValueError("attention: dca decodes batches that are padded on the left; set padding_side to left")
    options = {"mask_function": mask_function, "attention_mask": attention_mask, "device": device}
    return segment_ids_of_rows(batch_size, kv_length, **options)[0]
