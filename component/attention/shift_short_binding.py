"""S2-Attn, and dense attention without a mask [S, S], as transformers' interfaces call them.

S2-Attn is sparse while `module.training` and dense otherwise (LongLoRA, section 3.2); layers with a window keep it,
and are never sparse. transformers' own dense attention would hold a mask for packed rows, and for blocks against a
key/value cache.

Dimensions: B batch, H query heads, K key/value heads, Q queries (the last of S positions), S keys, D head dim.
"""

from collections.abc import Callable

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from longqlora.attention.merged import causal_attention_with_past
from longqlora.attention.model_internals import is_local
from longqlora.attention.sdpa import AttentionKernel
from longqlora.attention.shift_short import grouped_attention, shift_short_attention


def shift_short_forward(
    module, query, key, value, attention_mask, *, group_size: int, kernel: AttentionKernel, dropout=0.0, **kwargs
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface: S2-Attn in training, else `dense_forward`.

    query [B, H, S, D]; key and value [B, K, S, D]; attention_mask as `segment_mask_function` makes it.
    Returns ([B, S, H, D], None).
    """
    if not module.training or is_local(module.config, module.layer_idx):
        return dense_forward(module, query, key, value, attention_mask, dropout=dropout, **kwargs)
    if query.shape[2] != key.shape[2] or (attention_mask is not None and attention_mask.ndim != 2):
        raise ValueError(
            "S2-Attn trains on whole sequences with a 2-D padding mask or position ids that restart; "
            "pass no key/value cache and no 4-D mask in training mode"
        )
    options = {"segment_ids": attention_mask, "kernel": kernel, "dropout": dropout, "scaling": kwargs.get("scaling")}
    return shift_short_attention(query, key, value, group_size, **options).transpose(1, 2), None


def dense_forward(
    module, query, key, value, attention_mask, *, dropout=0.0, scaling=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface: dense, else as `shift_short_forward`, for Q queries of S keys."""
    options = {"scaling": scaling, "dropout": dropout}
    if attention_mask is not None and attention_mask.ndim == 2:
        return grouped_attention(query, key, value, [query.shape[2]], segment_ids=attention_mask, **options), None
    if attention_mask is None and query.shape[2] < key.shape[2]:
        return causal_attention_with_past(query, key, value, scaling=scaling).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)


def segment_mask_function(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable, attention_mask, device, **others
) -> torch.Tensor | None:
    """Mask function of transformers' interface: None, segment ids [B, S], or the stock mask [B, 1, Q, S].

    None where causality is enough: one sequence per row, padded at most on the right, whole or as a block that
    sees all tokens before it. Segment ids for other whole rows. Sliding windows, other blocks and the user's own
    mask functions (use_vmap) get the stock mask.
    """
    options = {"mask_function": mask_function, "attention_mask": attention_mask, "device": device}
    is_to_the_end = kv_length == int(others.get("q_offset", 0)) + q_length and not others.get("kv_offset", 0)
    if is_to_the_end and not others.get("use_vmap", False):
        segment_ids, sees_whole_segments = segment_ids_of_rows(batch_size, kv_length, **options)
        if sees_whole_segments and (segment_ids is None or q_length == kv_length):
            return segment_ids
    return sdpa_mask(batch_size, q_length, kv_length, **options, **others)


def segment_ids_of_rows(
    batch_size: int, length: int, *, mask_function: Callable, attention_mask, device
) -> tuple[torch.Tensor | None, bool]:
    """Segment ids int64 [B, S] of rows, -1 for padding, or None where causality alone is enough.

    mask_function(row, head, query, key) says whether a token sees another: a segment starts wherever a token does not
    see the one before it. Also returns whether every token sees the first of its segment: false under a window.
    """
    rows, positions = torch.arange(batch_size, device=device)[:, None], torch.arange(length, device=device)[None]
    head = torch.zeros_like(rows)
    starts = ~mask_function(rows, head, positions, (positions - 1).clamp_min(0))
    first = (starts * positions).cummax(dim=1).values
    facts = [starts.any(), mask_function(rows, head, positions, first).all()]
    if attention_mask is not None:
        real = attention_mask[:, -length:].to(device=device, dtype=torch.bool)
        facts[0] = facts[0] | (real[:, 1:] & ~real[:, :-1]).any()
    # Waits for the device once.
    needs_ids, sees_whole_segments = torch.stack(facts).tolist()
    if not needs_ids:
        return None, sees_whole_segments
    segment_ids = starts.expand(batch_size, length).long().cumsum(dim=1)
    return (segment_ids if attention_mask is None else segment_ids.masked_fill(~real, -1)), sees_whole_segments
