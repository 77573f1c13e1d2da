"""Attention patterns that LongLoRA compares S2-Attn with, bound in its place: see train_pattern.py.

Each is causal attention within consecutive groups of tokens; those of the shifted heads may be reordered first.

Dimensions: B batch, H query heads, K key/value heads, S sequence, D head dim, G group size.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel, TrainerCallback

from longqlora.attention.binding import bind_dense_finish, set_attention
from longqlora.attention.model_internals import attention_name
from longqlora.attention.sdpa import repeat_heads
from longqlora.attention.shift_short import group_sizes, grouped_attention
from longqlora.attention.shift_short_binding import dense_forward
from longqlora.settings.config import AttentionConfig

PREFIX, DENSE_PERIOD = "pattern_", 4


def no_shift(query, key, value, group_size: int, *, layer: int, **options) -> torch.Tensor:
    """All heads in the same groups. Arguments and result as for all patterns: see `pattern_forward`."""
    return grouped_attention(query, key, value, group_sizes(query.shape[2], group_size, shifted=False), **options)


def shift_by_layer(query, key, value, group_size: int, *, layer: int, **options) -> torch.Tensor:
    """All heads of the layers with an odd number are shifted."""
    sizes = group_sizes(query.shape[2], group_size, shifted=layer % 2 == 1)
    return grouped_attention(query, key, value, sizes, **options)


def rolled_ends(query, key, value, group_size: int, *, layer: int, **options) -> torch.Tensor:
    """The shifted heads' tokens begin half a group later, and the first ones follow the last ones."""
    length = query.shape[2]
    order = torch.arange(length, device=query.device).roll(-(group_size // 2))
    return reordered(query, key, value, group_size, order, group_sizes(length, group_size, shifted=False), **options)


def swapped_ends(query, key, value, group_size: int, *, layer: int, **options) -> torch.Tensor:
    """The shifted heads' groups at both ends are one, the first one's tokens before the last one's."""
    length = query.shape[2]
    sizes, order = group_sizes(length, group_size, shifted=True), torch.arange(length, device=query.device)
    if len(sizes) > 1:
        first, *middle, last = order.split(sizes)
        order, sizes = torch.cat([first, last, *middle]), [len(first) + len(last), *map(len, middle)]
    return reordered(query, key, value, group_size, order, sizes, **options)


def reordered(query, key, value, group_size: int, order, sizes: list[int], *, segment_ids, **options) -> torch.Tensor:
    """Plain groups for the first half of the heads; for the second, groups of these sizes of the tokens in `order`."""
    key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    plain, shifted = zip(*(x.chunk(2, dim=1) for x in (query, key, value)), strict=True)
    plain_sizes = group_sizes(query.shape[2], group_size, shifted=False)
    ids = None if segment_ids is None else segment_ids[:, order]
    halves = (
        grouped_attention(*plain, plain_sizes, segment_ids=segment_ids, **options),
        grouped_attention(*(x[:, :, order] for x in shifted), sizes, segment_ids=ids, **options)[:, order.argsort()],
    )
    return torch.cat(halves, dim=2)


PATTERN_FUNCTIONS = {f.__name__: f for f in (no_shift, shift_by_layer, rolled_ends, swapped_ends)}


def pattern_forward(
    module, query, key, value, attention_mask, *, pattern: Callable, group_size: int, dropout=0.0, **kwargs
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface: `pattern` in training, else dense.

    query [B, H, S, D]; key and value [B, K, S, D]; attention_mask: None or segment ids [B, S], within which tokens
    attend, also where the order is another. Returns ([B, S, H, D], None).
    """
    if not module.training:
        return dense_forward(module, query, key, value, attention_mask, dropout=dropout, **kwargs)
    options = {"segment_ids": attention_mask, "dropout": dropout, "scaling": kwargs.get("scaling")}
    return pattern(query, key, value, group_size, layer=module.layer_idx, **options), None


def bind_pattern(
    bind_attention: Callable[..., str], name: str, model: PreTrainedModel, config: AttentionConfig,
    max_seq_length: int, *, sequence_parallel_size: int = 1, is_packed: bool = False,
) -> str:  # fmt: skip
    """The pattern `name` where `bind_attention` would bind S2-Attn, with its checks; a description for the log."""
    if config.attention != "s2" and not attention_name(model.config).startswith(PREFIX):
        raise ValueError(f"attention: --pattern takes the place of s2, got {config.attention}")
    if sequence_parallel_size > 1:
        raise ValueError("sequence_parallel_size: not with --pattern; leave it out")
    description = bind_attention(model, config, max_seq_length, is_packed=is_packed)
    if config.attention == "full":
        # The dense finish.
        return description
    group_size = config.group_size(max_seq_length)
    # A name that binding.attention_pattern does not know: the memory policies' layers then call the function.
    function = partial(pattern_forward, pattern=PATTERN_FUNCTIONS[name], group_size=group_size)
    set_attention(model, f"{PREFIX}{name}_g{group_size}", function)
    return f"{name} in place of {description}"


class EveryFourthDense(TrainerCallback):
    """In place of DenseFinish, with its arguments: full attention in every fourth step."""

    def __init__(
        self, model: PreTrainedModel, config: AttentionConfig, max_seq_length: int, *, note: Callable, **options
    ) -> None:
        if config.attention != "s2" or config.dense_finish:
            raise ValueError("--pattern every_fourth_dense: needs attention: s2 and no dense_finish")
        self.model, self.note, self.sparse = model, note, attention_name(model.config)
        self.switch = bind_dense_finish(model, config, max_seq_length, **options)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.note(first_dense_step=DENSE_PERIOD)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        is_dense = (state.global_step + 1) % DENSE_PERIOD == 0
        self.switch() if is_dense else self.model.set_attn_implementation(self.sparse)
