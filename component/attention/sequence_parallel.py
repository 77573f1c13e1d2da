"""Sequence parallelism: several GPUs share each row, through DeepSpeed's Ulysses.

Between the layers a process holds its part of the row's tokens; for attention an all-to-all gives it all tokens of
its part of the heads (DeepSpeed-Ulysses, arXiv 2309.14509; ALST, arXiv 2506.13996). Which heads S2-Attn shifts depends
on a head's place among ALL heads, and packed documents are told apart by their positions, since no process has the
whole mask.

Rows come from the trainer's own loader (data/collator.py), not from DeepSpeed's: that one cannot be resumed, wants
rows of one length without NCCL, and its loss is a mean of means.

Dimensions: B batch, H query heads of this process, K its key/value heads, S all tokens of the row, D head dim.
"""

from collections.abc import Callable
from functools import cache

import torch

from longqlora.attention.segments import segments_of
from longqlora.attention.shift_short import grouped_attention, shift_short_attention
from longqlora.attention.shift_short_binding import dense_forward
from longqlora.distributed import rank


def shared_forward(
    module, query, key, value, attention_mask, *, attend: Callable, size: int, dropout=0.0, scaling=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface: `size` processes share a row in training, else `dense_forward`.

    query [B, all heads, S / size, D]; attend: `heads_forward` with its settings. Returns [B, S / size, all heads, D].
    """
    options = {"dropout": dropout, "scaling": scaling}
    if not module.training:
        return dense_forward(module, query, key, value, attention_mask, **options, **kwargs)
    exchange = all_to_all_heads(attend, size, query.shape[0], query.shape[1], key.shape[1], query.shape[3])
    groups = getattr(module, "num_key_value_groups", None)
    output = exchange(module, query, key, value, None, position_ids=kwargs["position_ids"], **options)[0]
    # Where processes outnumber key/value heads DeepSpeed changes it for good, and evaluation reads it.
    if groups is not None:
        module.num_key_value_groups = groups
    return output.unflatten(2, (query.shape[1], -1)), None


@cache
def all_to_all_heads(attend: Callable, size: int, batch_size: int, num_heads: int, num_kv_heads: int, head_dim: int):
    """DeepSpeed's exchange: from all heads of this process's tokens to all tokens of some heads, `attend` on those, and
    back to [B, S / size, all heads * D]."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF(
        attn=attend, batch_size=batch_size, attn_head_count=num_heads, kv_head_count=num_kv_heads,
        attn_head_size=head_dim, process_group=sharing_group(size), seq_length_is_variable=True,
        # Read in a debugging mode only.
        num_hidden_layers=1,
    )  # fmt: skip


@cache
def sharing_group(size: int):
    """The processes that share a row with this one: consecutive ranks."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    # Without a GPU only torch's process group exists by now; DeepSpeed takes it over.
    deepspeed.init_distributed()
    parallel_state_sp.initialize_sequence_parallel(size)
    return parallel_state_sp.get_sequence_parallel_group()


def heads_forward(
    module, query, key, value, attention_mask, *, position_ids, is_packed: bool, group_size: int | None, size: int,
    **options,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """S2-Attn (full attention for group_size None) of this process's heads over the whole row.

    query [B, H, S, D]; key and value [B, K, S, D]; the process has the heads [r H, (r + 1) H) of size * H, r its
    place among the `size` that share the row. position_ids int [B, S]: where is_packed, each document's from 0.
    options: kernel, scaling and dropout. Returns ([B, S, H, D], None).
    """
    # The positions come with each layer's exchange, so packed rows wait for the device once a layer.
    options["segment_ids"] = segments_of(position_ids) if is_packed else None
    if group_size is None:
        return grouped_attention(query, key, value, [query.shape[2]], **options), None
    num_heads = query.shape[1]
    num_shifted = min(max((rank() % size + 1) * num_heads - size * num_heads // 2, 0), num_heads)
    output = shift_short_attention(query, key, value, group_size, num_shifted=num_shifted, **options)
    return output.transpose(1, 2), None
