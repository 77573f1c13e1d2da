"""What dual chunk attention (DCA) needs of a transformers model: positions within the chunk, and its attention call.

RoPE must turn a token at position p as if it stood at p modulo the stride s of the chunks. Two forward
pre-hooks see to that, on the decoder (position ids of padded batches) and on its rotary embedding (the
modulo), and leave every forward method as it is; so a KV cache holds keys that are turned once and for
all. Where in a head RoPE's pairs lie, and in which layers, is read off the queries (`rotary_layouts`).
component/attention/binding.py registers `dual_chunk_forward` and `dual_chunk_mask` with transformers.

Dimensions: B batch, H query heads, K key/value heads, Q queries, S keys, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from longqlora.attention.dual_chunk import (
    LLAMA_LAYOUT,
    DualChunkSizes,
    RotaryLayout,
    attention_mscale,
    dual_chunk_attention,
    rotate,
    segment_dual_chunk_attention,
)
from longqlora.attention.shift_short import causal_attention
from longqlora.attention.shift_short_binding import segment_ids_of_rows

# The key and the names in it are those of Qwen2.5-1M's configs.
CONFIG_KEY = "dual_chunk_attention_config"
ATTRIBUTE = "dual_chunk_rotary"
# A layer without RoPE knows no positions: to it every input is one chunk.
ONE_CHUNK = DualChunkSizes(2**62)


@dataclass
class DualChunkRotary:
    """The rotary embedding of a model, for an attention layer; plain, so that no layer owns it as a submodule."""

    module: torch.nn.Module
    sizes: DualChunkSizes
    layout: RotaryLayout
    handles: list[RemovableHandle]


def dual_chunk_sizes(config: PretrainedConfig) -> DualChunkSizes | None:
    """Sizes of dual chunk attention that `config` names; None where it names none."""
    values = getattr(config, CONFIG_KEY, None)
    if not values:
        return None
    return DualChunkSizes(
        pretraining_length=values.get("original_max_position_embeddings") or config.max_position_embeddings,
        chunk_size=values.get("chunk_size"),
        local_window=values.get("local_size"),
    )


def logit_scale(config: PretrainedConfig) -> float:
    """Factor of the logits: 1, or where `config` asks for mscale, that of its context.

    One number for a model: with that of the tokens so far, reading in blocks and decoding would disagree
    with reading at once.
    """
    values = getattr(config, CONFIG_KEY, None) or {}
    if not values.get("mscale"):
        return 1.0
    pretraining = values.get("original_max_position_embeddings") or config.max_position_embeddings
    return attention_mscale(values.get("max_position_embeddings") or config.max_position_embeddings, pretraining)


def add_chunk_positions(model: PreTrainedModel, sizes: DualChunkSizes, layouts: dict[int, RotaryLayout | None]) -> None:
    """Let RoPE of `model` turn by positions within the chunk; layouts: by layer index, None without RoPE."""
    remove_chunk_positions(model)
    decoder = model.get_decoder()
    rotary = decoder.rotary_emb
    handles = [
        decoder.register_forward_pre_hook(number_real_tokens, with_kwargs=True),
        rotary.register_forward_pre_hook(ModuloPositions(sizes.stride), with_kwargs=True),
    ]
    for module in attention_layers(decoder):
        layout = layouts.get(module.layer_idx, LLAMA_LAYOUT)
        own_sizes = ONE_CHUNK if layout is None else sizes
        setattr(module, ATTRIBUTE, DualChunkRotary(rotary, own_sizes, layout or LLAMA_LAYOUT, handles))


def rotary_layouts(model: PreTrainedModel, queries: dict[int, torch.Tensor]) -> dict[int, RotaryLayout | None]:
    """Layout of RoPE in each layer that calls the attention function, by its index; None where it has no RoPE.

    model: a float32 copy whose attention function is `recording_forward` with `queries`. RoPE sees differences only:
    with all positions shifted, queries are turned and nothing else changes. Which turn it is tells the layout.
    Raises ValueError for a model without rotary embedding, or where no layout known here makes that turn.
    """
    inv_freq = getattr(getattr(model.get_decoder(), "rotary_emb", None), "inv_freq", None)
    if not isinstance(inv_freq, torch.Tensor):
        raise ValueError("it has no rotary position embeddings")
    ids, shift = torch.arange(3, 9)[None], 3
    recorded = []
    for start in (0, shift):
        model(input_ids=ids, position_ids=torch.arange(start, start + ids.shape[1])[None], use_cache=False)
        recorded.append(dict(queries))
    return {index: layout_between(first, recorded[1][index], shift, inv_freq) for index, first in recorded[0].items()}


def layout_between(
    query: torch.Tensor, shifted: torch.Tensor, shift: int, inv_freq: torch.Tensor
) -> RotaryLayout | None:
    """The layout in which `query` [B, H, Q, D] turned by `shift` positions is `shifted`; None where they are equal."""
    rest, tolerance = query.shape[-1] - 2 * len(inv_freq), 1e-3 * float(query.abs().max())
    if torch.allclose(query, shifted, rtol=0, atol=tolerance):
        return None
    for start in sorted({0, rest}) if rest >= 0 else ():
        for layout in (RotaryLayout(start, is_interleaved) for is_interleaved in (False, True)):
            turned = rotate(query, torch.full((query.shape[2],), shift), inv_freq, layout)
            if torch.allclose(turned, shifted, rtol=0, atol=tolerance):
                return layout
    raise ValueError("positions enter its attention in another way than by RoPE alone")


def recording_forward(module, query, key, value, attention_mask, scaling=None, *, queries, **kwargs):
    """Attention function that notes its queries under the layer's index; causal attention."""
    queries[module.layer_idx] = query
    return causal_attention(query, key, value, scaling=scaling).transpose(1, 2), None


def remove_chunk_positions(model: PreTrainedModel) -> None:
    """Undo `add_chunk_positions`; a model without it is left as it is."""
    for module in attention_layers(model.get_decoder()):
        if hasattr(module, ATTRIBUTE):
            for handle in getattr(module, ATTRIBUTE).handles:
                handle.remove()
            delattr(module, ATTRIBUTE)


def attention_layers(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in decoder.modules() if hasattr(module, "layer_idx")]


def number_real_tokens(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Give a padded batch without position ids those that count real tokens only, as `generate` does.

    Without DCA a shift of all positions changes nothing; with it the borders of the chunks would move.
    """
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and mask is not None and mask.ndim == 2 and not bool(mask.all()):
        inputs = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else kwargs.get("input_ids")
        num_queries = (args[0] if inputs is None else inputs).shape[1]
        kwargs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -num_queries:]
    return args, kwargs


@dataclass(frozen=True)
class ModuloPositions:
    """Pre-hook of a rotary embedding: position ids [B, Q] become position ids modulo `stride`."""

    stride: int

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": kwargs["position_ids"] % self.stride}
        states, position_ids, *rest = args
        return (states, position_ids % self.stride, *rest), kwargs


def dual_chunk_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    mscale: float = 1.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface; the same in training and evaluation.

    query [B, H, Q, D], the last Q of S positions; key and value [B, K, S, D], turned by positions within
    the chunk; attention_mask as `dual_chunk_mask` makes it; mscale: factor of the logits. Returns
    ([B, Q, H, D], None).
    """
    rotary: DualChunkRotary | None = getattr(module, ATTRIBUTE, None)
    if rotary is None:
        raise ValueError("attention: dca is set on a model that it was not bound to; use bind_inference_attention")
    if dropout > 0:
        raise ValueError(f"attention: dca has no attention dropout; set attention_dropout to 0, it is {dropout}")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError("attention: dca takes padding masks [batch, tokens] and packed rows, no 4-D mask")
    inv_freq = rotary.module.inv_freq.to(query.device)
    scaling = (query.shape[-1] ** -0.5 if scaling is None else scaling) * mscale
    options = {"inv_freq": inv_freq, "sizes": rotary.sizes, "layout": rotary.layout, "scaling": scaling}
    if attention_mask is None:
        output = dual_chunk_attention(query, key, value, **options)
    else:
        output = segment_dual_chunk_attention(query, key, value, attention_mask, **options)
    return output.transpose(1, 2), None


def dual_chunk_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """Mask function of transformers' interface: segment ids int64 [B, S], -1 for padding, or None for plain rows."""
    if q_length == kv_length:
        return segment_ids_of_rows(
            batch_size, q_length, mask_function=mask_function, attention_mask=attention_mask, device=device
        )
    if kv_length != int(q_offset) + q_length:
        raise ValueError("attention: dca decodes with a dynamic cache, not with a static one")
    if attention_mask is None or bool(attention_mask[:, -kv_length:].all()):
        return None
    real = attention_mask[:, -kv_length:].bool()
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError("attention: dca decodes batches that are padded on the left; set padding_side to left")
    return torch.where(real, 0, -1)
