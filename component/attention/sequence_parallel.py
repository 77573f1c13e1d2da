"""Sequence parallelism: several GPUs share each row, through DeepSpeed's Ulysses.

    deepspeed --num_gpus 2 train.py --train_args_file F --sequence_parallel_size 2

Between the layers a process holds its part of the row's tokens; for attention the processes trade, and each has
all tokens of its part of the heads (DeepSpeed-Ulysses, arXiv 2309.14509; ALST, arXiv 2506.13996). The trade is
`deepspeed.runtime.sequence_parallel.ulysses_sp.UlyssesSPAttentionHF`. Its rows come from the trainer's own loader
(`get_train_dataloader`), not from DeepSpeed's: that one cannot be resumed, wants rows of one length without NCCL, and
its loss is a mean of means. A part is then to the trainer and to ZeRO what a row of its own would be: losses are
summed over all tokens of a step, whoever holds them.

Which heads S2-Attn shifts is a matter of the head's place among ALL heads, and documents packed into one
row are told apart by their positions, since no process has the whole mask.

Dimensions: B batch, H query heads of this process, K its key/value heads, S all tokens of the row, D head dim.
"""

from collections.abc import Callable
from functools import cache

import torch

from longqlora.attention.segments import document_lengths
from longqlora.attention.shift_short import AttentionKernel, grouped_attention, shift_short_attention
from longqlora.distributed import rank


def trade_heads_for_tokens(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, attend: Callable,
    size: int, **kwargs,
) -> torch.Tensor:  # fmt: skip
    """Attention [B, S / size, all heads * D] of a row that `size` processes share.

    query, key and value hold all heads of this process's tokens; attend(module, query, key, value, mask, **kwargs)
    gets all tokens of some heads and their position_ids.
    """
    exchange = ulysses(attend, size, query.shape[0], query.shape[1], key.shape[1], query.shape[3])
    groups = getattr(module, "num_key_value_groups", None)
    output = exchange(module, query, key, value, None, **kwargs)[0]
    # Where processes outnumber key/value heads it changes this for good, and evaluation reads it.
    if groups is not None:
        module.num_key_value_groups = groups
    return output


@cache
def ulysses(attend: Callable, size: int, batch_size: int, num_heads: int, num_kv_heads: int, head_dim: int):
    """DeepSpeed's exchange, which is made for one batch size."""
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


def sharded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    position_ids: torch.Tensor | None,
    group_size: int | None,
    size: int,
    kernel: AttentionKernel,
    **kernel_args,
) -> torch.Tensor:
    """S2-Attn (full attention for group_size None) of this process's heads over the whole row.

    query [B, H, S, D]; key and value [B, K, S, D]; the process has the heads [r H, (r + 1) H) of size * H, r its
    place among the `size` that share the row. position_ids int [B, S]: given where rows hold several documents,
    each counted from 0. Returns [B, S, H, D].
    """
    # The positions come with each layer's exchange, so packed rows wait for the device once a layer.
    documents = None if position_ids is None else document_lengths(segments_of(position_ids))
    kernel_args |= {"documents": documents, "kernel": kernel}
    if group_size is None:
        return grouped_attention(query, key, value, [query.shape[2]], **kernel_args)
    num_heads = query.shape[1]
    first = rank() % size * num_heads
    num_shifted = min(max(first + num_heads - size * num_heads // 2, 0), num_heads)
    output = shift_short_attention(query, key, value, group_size, num_shifted=num_shifted, **kernel_args)
    return output.transpose(1, 2)


def segments_of(position_ids: torch.Tensor) -> torch.Tensor:
    """Segment ids int64 [B, S]: a segment starts where the positions do not go on."""
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.nn.functional.pad(starts.long().cumsum(dim=1), (1, 0))
