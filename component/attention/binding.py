"""Bind attention methods to transformers: the only file that knows both sides.

transformers calls the function registered under `config._attn_implementation` in every attention
layer of every model type that uses its AttentionInterface, and builds the mask with the function of
the same name in AttentionMaskInterface. What is registered here carries its sizes in its name; no
forward method is copied or replaced, and `unbind_attention` undoes it.

`bind_attention` is for training: S2-Attn, full, or dual chunk attention. `bind_inference_attention` is
for use afterwards: dense, or dual chunk attention where the config names it.

Dimensions: B batch, S sequence, H query heads, D head dim.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from longqlora.attention.dense_with_past import dense_with_past_forward, dense_with_past_mask
from longqlora.attention.dual_chunk import DualChunkSizes, RotaryLayout
from longqlora.attention.dual_chunk_binding import (
    add_chunk_positions,
    dual_chunk_forward,
    dual_chunk_mask,
    dual_chunk_sizes,
    logit_scale,
    recording_forward,
    remove_chunk_positions,
    rotary_layouts,
)
from longqlora.attention.lse_kernels import CausalPattern
from longqlora.attention.proof import NUM_TOKENS, prove_attention, refusing
from longqlora.attention.shift_short import AttentionKernel, causal_attention, check_shift_short
from longqlora.attention.shift_short_binding import (
    documents_of,
    heads_forward,
    shared_forward,
    shift_short_forward,
    shift_short_mask,
)
from longqlora.attention.tiny_copy import tiny_copy
from longqlora.settings.config import AttentionConfig

DENSE = "sdpa"
SHIFT_SHORT_PREFIX = "s2_sdpa_g"
DENSE_CHUNKED = "sdpa_with_past"
DENSE_PACKED = "sdpa_packed"
DENSE_DESCRIPTION = "dense causal (sdpa)"
# On the few tokens of a proof: one group, and chunks whose distances are all exact (the first two).
PROOF_GROUP_SIZE = 2 * NUM_TOKENS
PROOF_SIZES = DualChunkSizes(NUM_TOKENS, chunk_size=NUM_TOKENS, local_window=NUM_TOKENS // 2)
DCA_FIX = "use attention: full with a rope_type"


def bind_attention(
    model: PreTrainedModel,
    config: AttentionConfig,
    max_seq_length: int,
    *,
    sequence_parallel_size: int = 1,
    is_packed: bool = False,
) -> str:
    """Set the model's attention for training; returns a one-line description for the log.

    sequence_parallel_size: processes that share each row; is_packed: rows then hold several documents.
    Raises ValueError, naming the model type and what is wrong, where S2-Attn is not defined:
    sliding-window layers, an odd number of heads, or a model that bypasses AttentionInterface.
    """
    if config.attention == "dca":
        return bind_inference_attention(model, is_packed=is_packed)
    kernel, package = causal_attention, "SDPA"
    if config.use_flash_attn:
        kernel, package = flash_kernel(), "flash-attn"
    is_full, size = config.attention == "full", sequence_parallel_size
    if is_full and size == 1:
        return bind_full_attention(model, is_packed=is_packed, use_flash_attn=config.use_flash_attn)
    group_size = None if is_full else config.group_size(max_seq_length)
    if is_full:
        check_model_supports(model, "sequence parallelism", fix="leave out sequence_parallel_size")
        description = "full causal attention"
    else:
        check_model_supports_shift_short(model, group_size)
        description = f"S2-Attn, groups of {group_size} tokens, no wrap-around"
    # transformers takes any name with "flash" in it for its own flash-attn integration.
    prove_shift_short(model, is_packed=is_packed)
    name = f"s2_fa_g{group_size}" if config.use_flash_attn else f"{SHIFT_SHORT_PREFIX}{group_size}"
    function = partial(shift_short_forward, group_size=group_size, kernel=kernel)
    if size > 1:
        name, description = f"shared_{name}", f"{description}, rows shared by {size} processes"
        attend = partial(heads_forward, group_size=group_size, size=size, is_packed=is_packed, kernel=kernel)
        function = partial(shared_forward, attend=attend, size=size)
    set_attention(model, name, function, shift_short_mask)
    return f"{description} ({package})"


def set_attention(model: PreTrainedModel, name: str, function: Callable, mask_function: Callable) -> None:
    """Let `model` call these two under `name`, which must say what they do: it is one for all models."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_function)
    model.set_attn_implementation(name)


def prove_shift_short(model: PreTrainedModel, *, is_packed: bool) -> None:
    """Raise ValueError unless attention by groups is that of `model` where a row fits into half a group.

    How groups are cut and rows shared by processes is the same for every model type, and not tried here.
    """
    function = partial(shift_short_forward, group_size=PROOF_GROUP_SIZE, kernel=causal_attention)
    name = f"{SHIFT_SHORT_PREFIX}{PROOF_GROUP_SIZE}"
    prove_attention(
        model, "attention: S2-Attn", lambda small: set_attention(small, name, function, shift_short_mask),
        fix="use attention: full", is_packed=is_packed,
    )  # fmt: skip


def bind_full_attention(model: PreTrainedModel, *, is_packed: bool, use_flash_attn: bool) -> str:
    """Stock full attention; ours for packed rows, whose documents SDPA would be told by a mask [B, 1, S, S]."""
    if use_flash_attn:
        model.set_attn_implementation("flash_attention_2")
        return "full causal attention (flash-attn)"
    is_ours = is_packed and model._supports_attention_backend and not has_sliding_window(model.config)
    function = partial(shift_short_forward, group_size=None, kernel=causal_attention)

    def bind(model: PreTrainedModel) -> None:
        if is_ours:
            set_attention(model, DENSE_PACKED, function, shift_short_mask)
        else:
            model.set_attn_implementation(DENSE)

    if is_packed:
        prove_attention(model, "pack", bind, fix="set pack: false", is_packed=True)
    bind(model)
    return "full causal attention (SDPA)"


def bind_inference_attention(model: PreTrainedModel, *, is_chunked: bool = False, is_packed: bool = False) -> str:
    """Set the attention that the model's config names, for use after training; returns a description.

    Dual chunk attention where the config carries its sizes, else dense. is_chunked: long inputs come in
    blocks against a KV cache, for which dense attention needs no mask then. is_packed: as for `bind_attention`.
    Raises ValueError, naming the model type, where ours is not that of the model.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    sizes = dual_chunk_sizes(model.config)
    description = describe_inference_attention(model.config)
    if sizes is None:
        unbind_attention(model)
        if is_chunked:

            def bind(model: PreTrainedModel) -> None:
                set_attention(model, DENSE_CHUNKED, dense_with_past_forward, dense_with_past_mask)

            prove_attention(model, "prefill_chunk_size", bind, fix="leave prefill_chunk_size out", reads_blocks=True)
            bind(model)
        return description
    check_model_supports(model, "dual chunk attention")
    layouts = find_rotary_layouts(model)
    prove_attention(
        model, "attention: dca", partial(bind_dual_chunk, sizes=PROOF_SIZES, layouts=layouts, mscale=1.0),
        fix=DCA_FIX, is_packed=is_packed, reads_blocks=True,
    )  # fmt: skip
    bind_dual_chunk(model, sizes=sizes, layouts=layouts, mscale=logit_scale(model.config))
    return description


def bind_dual_chunk(
    model: PreTrainedModel, *, sizes: DualChunkSizes, layouts: dict[int, RotaryLayout | None], mscale: float
) -> None:
    add_chunk_positions(model, sizes, layouts)
    name = f"dca_c{sizes.chunk_size}_w{sizes.local_window}{f'_m{mscale:.6f}' if mscale != 1 else ''}"
    set_attention(model, name, partial(dual_chunk_forward, mscale=mscale), dual_chunk_mask)


def find_rotary_layouts(model: PreTrainedModel) -> dict[int, RotaryLayout | None]:
    """`rotary_layouts` of a small copy of `model`."""
    small, queries = tiny_copy(model), {}
    with torch.no_grad(), refusing(model, "attention: dca", DCA_FIX):
        set_attention(small, "recording", partial(recording_forward, queries=queries), lambda *args, **kwargs: None)
        return rotary_layouts(small, queries)


def describe_inference_attention(config: PretrainedConfig) -> str:
    """One line on the attention that `bind_inference_attention` sets for `config`."""
    sizes = dual_chunk_sizes(config)
    if sizes is None:
        return DENSE_DESCRIPTION
    mscale = logit_scale(config)
    return (
        f"dual chunk attention (chunk {sizes.chunk_size}, local window {sizes.local_window}, pretraining length "
        f"{sizes.pretraining_length}{f', logits x {mscale:.4g}' if mscale != 1 else ''})"
    )


def unbind_attention(model: PreTrainedModel) -> None:
    """Give the model stock dense attention back."""
    remove_chunk_positions(model)
    model.set_attn_implementation(DENSE)


def attention_pattern(module: torch.nn.Module, attention_mask: torch.Tensor | None) -> CausalPattern | None:
    """What the kernels of attention_pieces.py compute in place of the attention bound to `module`, in training.

    None where it is something else: a mask, a dropout, another attention or kernel package.
    """
    name, num_heads = module.config._attn_implementation, module.config.num_attention_heads
    group_size = name.removeprefix(SHIFT_SHORT_PREFIX)
    is_sparse, documents = group_size != name, None
    if is_sparse or name == DENSE_PACKED:
        documents = documents_of(attention_mask)
    if (attention_mask is not None and documents is None) or getattr(module, "attention_dropout", 0):
        return None
    if is_sparse:
        return CausalPattern(int(group_size), num_heads, documents)
    is_dense = name == DENSE_PACKED or (name == DENSE and not has_sliding_window(module.config))
    return CausalPattern(None, num_heads, documents) if is_dense else None


def call_attention(
    module: torch.nn.Module,
    attention_mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **kwargs,
) -> torch.Tensor:
    """The attention bound to `module`, as its own forward pass would call it; returns [B, S, H, D]."""
    function = AttentionInterface()[module.config._attn_implementation]
    return function(module, query, key, value, attention_mask, dropout=0.0, scaling=module.scaling, **kwargs)[0]


def check_model_supports_shift_short(model: PreTrainedModel, group_size: int) -> None:
    """Raise ValueError where S2-Attn is not defined for `model`."""
    check_model_supports(model, "S2-Attn")
    check_shift_short(model.config.num_attention_heads, group_size)


def check_model_supports(model: PreTrainedModel, method: str, *, fix: str = "use attention: full") -> None:
    """Raise ValueError for a model that bypasses AttentionInterface or has sliding-window layers."""
    config = model.config
    if not model._supports_attention_backend:
        raise ValueError(f"attention: {config.model_type} does not use transformers' AttentionInterface; {fix}")
    if has_sliding_window(config):
        raise ValueError(
            f"attention: {config.model_type} has sliding-window layers (sliding_window={config.sliding_window}), which "
            f"{method} does not define; set sliding_window to null in its config.json, or {fix}"
        )


def has_sliding_window(config: PretrainedConfig) -> bool:
    layer_types = getattr(config, "layer_types", None) or []
    return any("sliding" in kind for kind in layer_types) or (
        not layer_types and getattr(config, "sliding_window", None) is not None
    )


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
