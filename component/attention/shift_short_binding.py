"""Shift-short attention (S2-Attn) as transformers' interfaces call it: attention function and mask function.

component/attention/binding.py registers both. Sparse while `module.training`, dense otherwise (LongLoRA section
3.2: trained sparse, tested dense). Full attention to packed rows comes here too, for transformers' own would hold
a mask [B, 1, S, S].

Dimensions: B batch, H query heads, K key/value heads, S sequence, D head dim.
"""

from collections.abc import Callable

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from longqlora.attention.segments import Documents, document_lengths, segment_mask
from longqlora.attention.sequence_parallel import sharded_attention, trade_heads_for_tokens
from longqlora.attention.shift_short import (
    AttentionKernel,
    causal_attention,
    grouped_attention,
    shift_short_attention,
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
    group_size: int | None,
    kernel: AttentionKernel,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface.

    query [B, H, S, D]; key and value [B, K, S', D]; attention_mask as `shift_short_mask` makes it; group_size None
    for full attention. Returns ([B, S, H, D], None).
    """
    documents, options = documents_of(attention_mask), {"scaling": scaling, "dropout": dropout}
    is_dense = group_size is None or not module.training
    if is_dense and documents is not None:
        return grouped_attention(query, key, value, [query.shape[2]], documents=documents, **options), None
    if is_dense:
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = segment_mask(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    if query.shape[2] != key.shape[2] or (attention_mask is not None and attention_mask.ndim != 2):
        raise ValueError(
            "S2-Attn trains on whole sequences with a 2-D padding mask or position ids that restart; "
            "pass no key/value cache and no 4-D mask in training mode"
        )
    segment_ids = attention_mask if documents is None else None
    output = shift_short_attention(
        query, key, value, group_size, segment_ids=segment_ids, documents=documents, kernel=kernel, **options
    )
    return output.transpose(1, 2), None


def documents_of(attention_mask: torch.Tensor | None) -> Documents | None:
    """Documents of a mask as `shift_short_mask` makes it; None where it tells none, or only a mask can."""
    return document_lengths(attention_mask) if attention_mask is not None and attention_mask.ndim == 2 else None


def shared_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    attend: Callable,
    size: int,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The same where `size` processes share a row in training: query [B, H, S / size, D] then has all heads.

    attend: `heads_forward` with its settings.
    """
    if not module.training:
        dense = {"group_size": None, "kernel": causal_attention}
        return shift_short_forward(module, query, key, value, attention_mask, dropout, scaling, **dense, **kwargs)
    options = {"dropout": dropout, "scaling": scaling, "position_ids": kwargs["position_ids"]}
    output = trade_heads_for_tokens(module, query, key, value, attend=attend, size=size, **options)
    return output.unflatten(2, (query.shape[1], -1)), None


def heads_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    position_ids: torch.Tensor,
    is_packed: bool,
    **options,
) -> tuple[torch.Tensor, None]:
    """Attention of some heads over whole rows: query [B, H, S, D], position_ids [B, S]; returns [B, S, H, D]."""
    return sharded_attention(query, key, value, position_ids=position_ids if is_packed else None, **options), None


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
    return segment_ids_of_rows(
        batch_size, q_length, mask_function=mask_function, attention_mask=attention_mask, device=device
    )


def segment_ids_of_rows(
    batch_size: int,
    length: int,
    *,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor | None:
    """Segment ids int64 [B, S] of whole rows, -1 for padding; None where causality alone is enough."""
    is_packed = mask_function is not causal_mask_function
    real = None if attention_mask is None else attention_mask[:, -length:].to(device=device, dtype=torch.bool)
    has_holes = real is not None and bool((real[:, 1:] & ~real[:, :-1]).any())
    if not is_packed and not has_holes:
        return None
    rows = torch.arange(batch_size, device=device)[:, None]
    positions = torch.arange(length, device=device)[None]
    # A segment starts wherever a token may not see the token right before it.
    sees_previous = mask_function(rows, torch.zeros_like(rows), positions, (positions - 1).clamp_min(0))
    segment_ids = (~sees_previous).expand(batch_size, length).long().cumsum(dim=1)
    return segment_ids if real is None else segment_ids.masked_fill(~real, -1)
