"""Dense attention of blocks of a long input against a key/value cache, as transformers' interfaces call it.

component/attention/binding.py registers both functions. No mask [Q, S] is made for plain rows.

Dimensions: B batch, H query heads, K key/value heads, Q queries, S keys, D head dim.
"""

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from longqlora.attention.merged import causal_attention_with_past


def dense_with_past_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Dense causal attention of query [B, H, Q, D], the last Q of S positions, without a mask [Q, S]."""
    if attention_mask is not None or dropout > 0 or query.shape[2] == key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return causal_attention_with_past(query, key, value, scaling=scaling).transpose(1, 2), None


def dense_with_past_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """Mask function of transformers' interface: none for plain rows, else the stock one."""
    is_plain = mask_function is causal_mask_function and kv_offset == 0 and kv_length == int(q_offset) + q_length
    if is_plain and (attention_mask is None or bool(attention_mask[:, -kv_length:].all())):
        return None
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, **kwargs,
    )  # fmt: skip
