"""Sequence parallelism: several GPUs share each row, through DeepSpeed's Ulysses.

    deepspeed --num_gpus 2 train.py --train_args_file F --sequence_parallel_size 2

Between the layers a process holds its part of the row's tokens; for attention the processes trade, and each has
all tokens of its part of the heads (DeepSpeed-Ulysses, arXiv 2309.14509; ALST, arXiv 2506.13996). The trade is
`deepspeed.runtime.sequence_parallel.ulysses_sp.UlyssesSPAttentionHF`. Its rows come from the trainer's own loader
(`share_rows`), not from DeepSpeed's: that one cannot be resumed, wants rows of one length without NCCL, and its
loss is a mean of means. A part is then to the trainer and to ZeRO what a row of its own would be: losses are
summed over all tokens of a step, whoever holds them.

Which heads S2-Attn shifts is a matter of the head's place among ALL heads, and documents packed into one
row are told apart by their positions, since no process has the whole mask.

Dimensions: B batch, H query heads of this process, K its key/value heads, S all tokens of the row, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PretrainedConfig

from component.distributed import rank
from component.memory_shape import ModelShape
from component.prompt import IGNORE_INDEX
from component.segments import document_lengths
from component.shift_short_attention import AttentionKernel, grouped_attention, shift_short_attention


@dataclass
class SequenceParallelConfig:
    """How many processes share one row."""

    sequence_parallel_size: int = field(
        default=1,
        metadata={"help": "processes that share each row (Ulysses); divides their number and the attention heads"},
    )

    def __post_init__(self) -> None:
        if self.sequence_parallel_size < 1:
            raise ValueError(f"sequence_parallel_size: must be at least 1, got {self.sequence_parallel_size}")


def check_sequence_parallel(size: int, config: PretrainedConfig, *, attention: str, num_processes: int) -> None:
    """Raise ValueError where `size` processes cannot share the rows of a model of `config`."""
    if size == 1:
        return
    if attention == "dca":
        raise ValueError("sequence_parallel_size: dual chunk attention needs whole rows; use attention: s2 or full")
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic":
        raise ValueError(
            "sequence_parallel_size: dynamic RoPE follows the length of whole rows, which no process sees; use another "
            "rope_type"
        )
    if num_processes % size:
        raise ValueError(
            f"sequence_parallel_size: {size} does not divide the {num_processes} process(es) of this run; start it "
            f"with deepspeed --num_gpus {size} or torchrun --nproc_per_node {size}"
        )
    shape = ModelShape.of(config)
    num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError(
            f"sequence_parallel_size: {size} does not divide the model's {num_heads} heads "
            f"({num_kv_heads} key/value heads); choose a divisor of both"
        )


def share_rows(loader: DataLoader, size: int) -> DataLoader:
    """Give the processes that share a row the same rows; `loader` is accelerate's, split among all processes."""
    sampler = loader.batch_sampler
    sampler.num_processes, sampler.process_index = sampler.num_processes // size, sampler.process_index // size
    return loader


class PartCollator:
    """Collates whole rows, then keeps this process's part of each."""

    def __init__(self, collator: Callable[[Any], dict[str, torch.Tensor]], size: int) -> None:
        self.collator, self.size, self.part = collator, size, rank() % size

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        """int64 [B, S / size] input_ids, position_ids and shift_labels (each token's next).

        Also labels [B, S / size + 1] for those who shift or count them, the first, which no token here predicts, empty.
        """
        batch = self.collator(rows)
        length = batch["input_ids"].shape[1] // self.size
        here = slice(self.part * length, (self.part + 1) * length)
        labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)
        labels = labels[:, here.start : here.stop + 1].clone()
        labels[:, 0] = IGNORE_INDEX
        parts = {name: batch[name][:, here] for name in ("input_ids", "position_ids")}
        return {**parts, "labels": labels, "shift_labels": labels[:, 1:]}


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
