"""Bind attention methods to transformers: the only file that knows both sides.

transformers calls the function registered under `config._attn_implementation` in every attention
layer of every model type that uses its AttentionInterface, and builds the mask with the function of
the same name in AttentionMaskInterface. `bind_attention` registers S2-Attn there under a name that
carries its group size; no forward method is copied or replaced, and `unbind_attention` undoes it.

Sparse while `module.training`, dense otherwise (LongLoRA section 3.2: trained sparse, tested dense).

Dimensions: B batch, H query heads, K key/value heads, S sequence, D head dim.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from component.shift_short_attention import (
    AttentionKernel,
    causal_attention,
    check_shift_short,
    segment_mask,
    shift_short_attention,
)

DENSE = "sdpa"


@dataclass
class AttentionConfig:
    """Attention during training; evaluation is always dense."""

    attention: str = field(
        default="s2", metadata={"help": "s2 (shift-short attention) or full", "choices": ["s2", "full"]}
    )
    group_size_ratio: float = field(
        default=0.25, metadata={"help": "S2-Attn group size as a part of max_seq_length (the papers use 1/4)"}
    )
    use_flash_attn: bool = field(
        default=False, metadata={"help": "use the flash-attn package, which must be installed; else torch's SDPA"}
    )

    def group_size(self, max_seq_length: int) -> int:
        """Tokens per S2-Attn group, rounded down to an even number; fixed for the whole run."""
        if not 0 < self.group_size_ratio <= 1:
            raise ValueError(f"group_size_ratio: must lie in (0, 1], got {self.group_size_ratio}; the papers use 0.25")
        return int(max_seq_length * self.group_size_ratio) // 2 * 2


def bind_attention(model: PreTrainedModel, config: AttentionConfig, max_seq_length: int) -> str:
    """Set the model's attention for training; returns a one-line description for the log.

    Raises ValueError, naming the model type and what is wrong, where S2-Attn is not defined:
    sliding-window layers, an odd number of heads, or a model that bypasses AttentionInterface.
    """
    kernel = flash_kernel() if config.use_flash_attn else causal_attention
    if config.attention == "full":
        model.set_attn_implementation("flash_attention_2" if config.use_flash_attn else DENSE)
        return f"full causal attention ({'flash-attn' if config.use_flash_attn else 'SDPA'})"
    group_size = config.group_size(max_seq_length)
    check_model_supports_shift_short(model, group_size)
    # transformers takes any name with "flash" in it for its own flash-attn integration.
    name = f"s2_{'fa' if config.use_flash_attn else 'sdpa'}_g{group_size}"
    AttentionInterface.register(name, partial(shift_short_forward, group_size=group_size, kernel=kernel))
    AttentionMaskInterface.register(name, shift_short_mask)
    model.set_attn_implementation(name)
    return (
        f"S2-Attn, groups of {group_size} tokens, no wrap-around ({'flash-attn' if config.use_flash_attn else 'SDPA'})"
    )


def unbind_attention(model: PreTrainedModel) -> None:
    """Give the model stock dense attention back."""
    model.set_attn_implementation(DENSE)


def check_model_supports_shift_short(model: PreTrainedModel, group_size: int) -> None:
    config = model.config
    if not model._supports_attention_backend:
        raise ValueError(
            f"attention: {config.model_type} does not use transformers' AttentionInterface; use attention: full"
        )
    if has_sliding_window(config):
        raise ValueError(
            f"attention: {config.model_type} has sliding-window layers (sliding_window={config.sliding_window}), which "
            "S2-Attn does not define; set sliding_window to null in its config.json, or use attention: full"
        )
    check_shift_short(config.num_attention_heads, group_size)


def has_sliding_window(config: PretrainedConfig) -> bool:
    layer_types = getattr(config, "layer_types", None) or []
    return any("sliding" in kind for kind in layer_types) or (
        not layer_types and getattr(config, "sliding_window", None) is not None
    )


def shift_short_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    group_size: int,
    kernel: AttentionKernel,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface.

    query [B, H, S, D]; key and value [B, K, S', D]; attention_mask as `shift_short_mask` makes it.
    Returns ([B, S, H, D], None).
    """
    if not module.training:
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = segment_mask(attention_mask)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[2] != key.shape[2] or (attention_mask is not None and attention_mask.ndim != 2):
        raise ValueError(
            "S2-Attn trains on whole sequences with a 2-D padding mask or position ids that restart; "
            "pass no key/value cache and no 4-D mask in training mode"
        )
    output = shift_short_attention(
        query, key, value, group_size, scaling=scaling, dropout=dropout, segment_ids=attention_mask, kernel=kernel
    )
    return output.transpose(1, 2), None


def shift_short_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """Mask function of transformers' interface: segment ids [B, S] instead of a mask [B, 1, S, S].

    Returns None where causality is enough: one sequence per row, padded at most on the right.
    Decoding with a cache and masks of the user's own are left to the stock function.
    """
    if q_length != kv_length or use_vmap:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, use_vmap=use_vmap, device=device, **kwargs,
        )  # fmt: skip
    is_packed = mask_function is not causal_mask_function
    real = None if attention_mask is None else attention_mask[:, -kv_length:].to(device=device, dtype=torch.bool)
    has_holes = real is not None and bool((real[:, 1:] & ~real[:, :-1]).any())
    if not is_packed and not has_holes:
        return None
    rows = torch.arange(batch_size, device=device)[:, None]
    positions = torch.arange(q_length, device=device)[None]
    # A segment starts wherever a token may not see the token right before it.
    sees_previous = mask_function(rows, torch.zeros_like(rows), positions, (positions - 1).clamp_min(0))
    segment_ids = (~sees_previous).expand(batch_size, q_length).long().cumsum(dim=1)
    return segment_ids if real is None else segment_ids.masked_fill(~real, -1)


def flash_kernel() -> AttentionKernel:
    """The attention kernel of the flash-attn package, imported only here and only when asked for."""
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "use_flash_attn: the flash-attn package is not installed; pip install flash-attn, or set it to false"
        )
    from flash_attn import flash_attn_func

    def flash_attention(query, key, value, *, scaling=None, dropout=0.0, mask=None):
        if mask is not None:
            return causal_attention(query, key, value, scaling=scaling, dropout=dropout, mask=mask)
        inputs = (x.transpose(1, 2) for x in (query, key, value))
        return flash_attn_func(*inputs, dropout_p=dropout, softmax_scale=scaling, causal=True).transpose(1, 2)

    return flash_attention
