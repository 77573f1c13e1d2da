"""Bind attention methods to transformers: the only file that registers with it.

transformers calls the function registered under the name that `set_attn_implementation` sets, in every attention layer
of every model type that uses its AttentionInterface, and makes the mask with the function of that name in
AttentionMaskInterface. A name carries the method's sizes; no forward method is copied or replaced.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from longqlora.attention import dual_chunk_binding as dca
from longqlora.attention.dual_chunk import DualChunkSizes
from longqlora.attention.inplace_attention import CausalPattern
from longqlora.attention.model_internals import (
    attends,
    attention_name,
    has_sliding_window,
    is_local,
    selects_keys,
    stock_attention,
    uses_attention_interface,
)
from longqlora.attention.proof import NUM_TOKENS, prove_attention, refusing, tiny_copy
from longqlora.attention.rotation import RotaryLayout
from longqlora.attention.sdpa import AttentionKernel, causal_attention
from longqlora.attention.segments import segment_lengths
from longqlora.attention.sequence_parallel import heads_forward, shared_forward
from longqlora.attention.shift_short import check_shift_short
from longqlora.attention.shift_short_binding import dense_forward, segment_mask_function, shift_short_forward
from longqlora.settings.config import MSCALES, AttentionConfig, check_limit, one_of

# Names with "sdpa" are checked by transformers for models that SDPA cannot serve.
DENSE = "sdpa_no_mask"
SHIFT_SHORT_PREFIX = "s2_sdpa_g"
# On the few tokens of a proof: one group, and chunks whose distances are all exact (the first two).
PROOF_GROUP_SIZE = 2 * NUM_TOKENS
PROOF_SIZES = DualChunkSizes(NUM_TOKENS, chunk_size=NUM_TOKENS, local_window=NUM_TOKENS // 2)
DCA_FIX = "use attention: full with a rope_type"


def bind_attention(
    model: PreTrainedModel, config: AttentionConfig, max_seq_length: int, *, sequence_parallel_size: int = 1,
    is_packed: bool = False,
) -> str:  # fmt: skip
    """Set the model's attention for training; returns a one-line description for the log.

    sequence_parallel_size: processes that share each row; is_packed: rows then hold several documents.
    Raises ValueError, naming the model type and what is wrong, where the method is not defined for the model
    (windows in every layer, an odd number of heads, a model that bypasses AttentionInterface) or differs from it.
    """
    size, group_size, description = sequence_parallel_size, None, "full causal attention"
    check_attention(model, config, max_seq_length, size)
    if config.attention == "dca":
        return bind_inference_attention(model, is_packed=is_packed)
    kernel, package = (flash_kernel(), "flash-attn") if config.use_flash_attn else (causal_attention, "SDPA")
    if config.attention == "full" and size == 1:
        bind_full_attention(model, is_packed=is_packed, use_flash_attn=config.use_flash_attn)
        if attention_name(model.config) == "eager":
            package = f"eager, all that {model.config.model_type} has: memory grows with the square of the length"
        return f"{description} ({package})"
    if config.attention == "s2":
        group_size = config.group_size(max_seq_length)
        description = f"S2-Attn, groups of {group_size} tokens, no wrap-around"
        if num_local := sum(is_local(model.config, index) for index in range(model.config.num_hidden_layers)):
            description += f", in all layers but {num_local} of {model.config.num_hidden_layers} with windows"
    # How groups are cut and rows shared by processes is the same for every model type, and not tried.
    in_one_group = partial(shift_short_forward, group_size=PROOF_GROUP_SIZE, kernel=causal_attention)
    bind = partial(set_attention, name=f"{SHIFT_SHORT_PREFIX}{PROOF_GROUP_SIZE}", function=in_one_group)
    prove_attention(model, "attention: S2-Attn", bind, fix="use attention: full", is_packed=is_packed)
    # transformers takes any name with "flash" in it for its own flash-attn integration.
    name = f"s2_fa_g{group_size}" if config.use_flash_attn else f"{SHIFT_SHORT_PREFIX}{group_size}"
    function = partial(shift_short_forward, group_size=group_size, kernel=kernel)
    if size > 1:
        name, description = f"shared_{name}", f"{description}, rows shared by {size} processes"
        attend = partial(heads_forward, group_size=group_size, size=size, is_packed=is_packed, kernel=kernel)
        function = partial(shared_forward, attend=attend, size=size)
    set_attention(model, name, function)
    return f"{description} ({package})"


def bind_dense_finish(
    model: PreTrainedModel, config: AttentionConfig, max_seq_length: int, **options
) -> Callable[[], str]:
    """Prepare full attention for the last steps of a run that `bind_attention` has bound S2-Attn for.

    Returns what switches to it, as `attention: full` binds it, and describes it. The options are those of
    `bind_attention`. All that can fail does so here.
    """
    sparse = attention_name(model.config)
    description = bind_attention(model, replace(config, attention="full"), max_seq_length, **options)
    dense = attention_name(model.config)
    model.set_attn_implementation(sparse)

    def switch() -> str:
        model.set_attn_implementation(dense)
        return description

    return switch


def set_attention(
    model: PreTrainedModel, name: str, function: Callable, mask_function: Callable = segment_mask_function
) -> None:
    """Let `model` call these two under `name`, which must say what they do: it is one for all models."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_function)
    use_attention(model, name)


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention registered under `name`, by us or by transformers, in place of what was bound before."""
    dca.remove_chunk_positions(model)
    model.set_attn_implementation(name)


def bind_full_attention(model: PreTrainedModel, *, is_packed: bool, use_flash_attn: bool) -> None:
    """Full attention without a mask [B, 1, S, S], which stock attention takes for padded and packed rows.

    Stock attention for a model with windows or chosen keys, and for padded rows where ours differs (sinks, own masks).
    """
    if use_flash_attn:
        return use_attention(model, "flash_attention_2")
    needs_mask = has_sliding_window(model.config) or selects_keys(model.config)
    is_ours = uses_attention_interface(model) and not needs_mask
    bind = set_dense_attention if is_ours else unbind_attention
    if is_packed:
        prove_attention(model, "pack", bind, fix="set pack: false", is_packed=True)
    elif is_ours and not suits(model, bind):
        bind = unbind_attention
    bind(model)


def suits(model: PreTrainedModel, bind: Callable[[PreTrainedModel], None]) -> bool:
    try:
        prove_attention(model, "attention: full", bind, fix="leave it stock")
    except ValueError:
        return False
    return True


def bind_inference_attention(model: PreTrainedModel, *, is_chunked: bool = False, is_packed: bool = False) -> str:
    """Set the attention that the model's config names, for use after training; returns a description.

    Dual chunk attention where the config carries its sizes, else dense. is_chunked: long inputs come in
    blocks against a KV cache, for which dense attention needs no mask then. is_packed: as for `bind_attention`.
    Raises ValueError, naming the model type, where the attention set differs from that of the model.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    sizes = dca.dual_chunk_sizes(model.config)
    if sizes is None:
        bind = set_dense_attention if is_chunked and not selects_keys(model.config) else unbind_attention
        if is_chunked:
            prove_attention(model, "prefill_chunk_size", bind, fix="leave prefill_chunk_size out", reads_blocks=True)
        bind(model)
    else:
        check_model_supports(model, "dual chunk attention")
        with torch.no_grad(), refusing(model, "attention: dca", DCA_FIX):
            layouts = dca.rotary_layouts(tiny_copy(model), set_attention)
        bind = partial(bind_dual_chunk, layouts=layouts, sizes=PROOF_SIZES)
        prove_attention(model, "attention: dca", bind, fix=DCA_FIX, is_packed=is_packed, reads_blocks=True)
        bind(model, sizes=sizes, mscale=dca.logit_scale(model.config))
    return describe_inference_attention(model.config)


def bind_dual_chunk_attention(
    model: PreTrainedModel,
    pretraining_length: int | None = None,
    *,
    chunk_size: int | None = None,
    local_window: int | None = None,
    context_size: int | None = None,
    mscale: str | None = None,
) -> str:
    """Let a loaded model of one's own script read with dual chunk attention from now on; returns a description.

    Sizes in tokens. pretraining_length: what RoPE covers, by default max_position_embeddings; chunk_size and
    local_window: by default 3/4 and 1/8 of it. context_size: the longest text, which is saved in the config, and for
    which `mscale` (a name of MSCALES) scales the logits. Raises ValueError for what is out of its limits, and for a
    model in which DCA is not defined, by its type.
    """
    config = (model.get_base_model() if isinstance(model, PeftModel) else model).config
    check_limit("mscale", mscale, one_of(tuple(MSCALES)))
    if mscale and not context_size:
        raise ValueError("context_size: missing; mscale scales the logits for the longest text, give its tokens")
    sizes = DualChunkSizes(pretraining_length or config.max_position_embeddings, chunk_size, local_window)
    before = vars(config).get(dca.CONFIG_KEY)
    dca.set_dual_chunk(config, sizes, context_size or sizes.pretraining_length, mscale)
    try:
        return bind_inference_attention(model)
    except ValueError:
        delattr(config, dca.CONFIG_KEY)
        if before is not None:
            setattr(config, dca.CONFIG_KEY, before)
        raise


def bind_dual_chunk(
    model: PreTrainedModel, *, sizes: DualChunkSizes, layouts: dict[int, RotaryLayout | None], mscale: float = 1.0
) -> None:
    name = f"dca_c{sizes.chunk_size}_w{sizes.local_window}{f'_m{mscale:.6f}' if mscale != 1 else ''}"
    set_attention(model, name, partial(dca.dual_chunk_forward, mscale=mscale), dca.dual_chunk_mask_function)
    dca.add_chunk_positions(model, sizes, layouts)


def describe_inference_attention(config: PretrainedConfig) -> str:
    """One line on the attention that `bind_inference_attention` sets for `config`."""
    sizes, mscale = dca.dual_chunk_sizes(config), dca.logit_scale(config)
    if sizes is None:
        return f"dense causal ({stock_attention(config)})"
    text = f"chunk {sizes.chunk_size}, local window {sizes.local_window}, pretraining length {sizes.pretraining_length}"
    return f"dual chunk attention ({text}{f', logits x {mscale:.4g}' if mscale != 1 else ''})"


def unbind_attention(model: PreTrainedModel) -> None:
    """Give the model stock dense attention back."""
    use_attention(model, stock_attention(model.config))


def set_dense_attention(model: PreTrainedModel) -> None:
    set_attention(model, DENSE, dense_forward)


def attention_pattern(module: torch.nn.Module, attention_mask: torch.Tensor | None) -> CausalPattern | None:
    """What inplace_attention.py computes in place of the attention bound to `module`, in training without dropout.

    None where it is something else: a mask, another attention or kernel package.
    """
    name, lengths, has_window = attention_name(module.config), None, is_local(module.config, module.layer_idx)
    is_sparse = name.startswith(SHIFT_SHORT_PREFIX)
    is_ours = is_sparse or name == DENSE
    if attention_mask is not None:
        lengths = segment_lengths(attention_mask) if is_ours and attention_mask.ndim == 2 else None
    # Ours makes a mask for a window that is shorter than the row.
    is_causal = is_ours or (name == "sdpa" and not has_window)
    if not is_causal or (attention_mask is not None and lengths is None):
        return None
    group_size = int(name.removeprefix(SHIFT_SHORT_PREFIX)) if is_sparse and not has_window else None
    return CausalPattern(group_size, module.config.num_attention_heads, lengths)


def call_attention(module: torch.nn.Module, attention_mask, query, key, value, **kwargs) -> torch.Tensor:
    """The attention bound to `module`, as its own forward pass would call it; returns [B, S, H, D]."""
    function, config = AttentionInterface()[attention_name(module.config)], module.config
    # To flash-attn it says the window, which others are told by the mask.
    window = config.sliding_window if is_local(config, module.layer_idx) else None
    options = {"dropout": 0.0, "scaling": module.scaling, "sliding_window": window, **kwargs}
    return function(module, query, key, value, attention_mask, **options)[0]


def check_attention(
    model: PreTrainedModel, config: AttentionConfig, max_seq_length: int, sequence_parallel_size: int
) -> None:
    """Raise ValueError where the attention of `config` is not defined for `model`, of which only the config is read."""
    if config.attention == "dca":
        check_model_supports(model, "dual chunk attention")
    if config.attention == "s2":
        check_model_supports(model, "S2-Attn", may_have_windows=True)
        check_shift_short(model.config.num_attention_heads, config.group_size(max_seq_length))
    if sequence_parallel_size > 1:
        fix = "leave out sequence_parallel_size"
        check_model_supports(model, "a row shared by processes", fix=fix)


def check_model_supports(
    model: PreTrainedModel, method: str, *, may_have_windows: bool = False, fix: str | None = None
) -> None:
    """Raise ValueError for a model whose attention `method` cannot take the place of: it bypasses AttentionInterface,
    does more than SDPA, or has layers with windows: all of them, or, where not `may_have_windows`, any."""
    config, reason = model.config, None
    windows = [is_local(config, index) for index in range(config.num_hidden_layers) if attends(config, index)]
    if not uses_attention_interface(model):
        reason = "does not use transformers' AttentionInterface"
    elif stock_attention(config) == "eager":
        reason = f"has attention that torch's SDPA does not compute (soft caps, sinks), and {method} neither"
    elif selects_keys(config):
        reason = f"has layers that choose the keys of each query (an indexer or dynamic mask), which {method} does not"
    elif windows and (all(windows) or (any(windows) and not may_have_windows)):
        size = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        has = f"has sliding-window layers{' alone' if all(windows) else ''} (of {size} tokens)"
        reason = f"{has}, for which {method} is not defined"
        fix = fix or (None if all(windows) else "use attention: s2 or full")
    if reason:
        raise ValueError(f"attention: {config.model_type} {reason}; {fix or 'use attention: full'}")


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
