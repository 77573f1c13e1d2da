"""What this library reads of transformers models without transformers documenting it: each name in one function.

As in transformers 5.17 to 5.23; tests/attention/test_model_internals.py says what a later version has changed.
"""

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel


def attention_name(config: PretrainedConfig) -> str | None:
    """The name under which the model looks up its attention function; `set_attn_implementation` sets it."""
    return config._attn_implementation


def uses_attention_interface(model: PreTrainedModel) -> bool:
    """Whether all attention of the model goes through the function registered under `attention_name`."""
    return model._supports_attention_backend


def is_local(config: PretrainedConfig, layer_idx: int) -> bool:
    """Whether a layer sees a window or chunk of its row only, as its config's `layer_types` or `sliding_window` say."""
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return getattr(config, "sliding_window", None) is not None
    return "sliding" in kinds[layer_idx] or "chunked" in kinds[layer_idx]


def check_heads(config: PretrainedConfig) -> None:
    """Raise ValueError where layers differ in their number of heads (dots3's windows), which nothing here expects."""
    if "num_attention_heads" in (getattr(config, "per_layer_attributes", None) or ()):
        text = f"{config.model_type} has other numbers of heads in some layers, which is not supported"
        raise ValueError(f"model_name_or_path: {text}; give another model")


def selects_keys(config: PretrainedConfig) -> bool:
    """Whether layers choose by their content the keys that a query sees: indexers (DeepSeek-V3.2, GLM-5, MiniMax-M3),
    Doge's dynamic mask."""
    choosing = {"indexed_attention", "compressed_sparse_attention", "minimax_m3_sparse"}
    is_sparse = not choosing.isdisjoint(getattr(config, "layer_types", None) or ())
    return is_sparse or any(getattr(config, name, None) for name in ("index_topk", "keep_window_size"))


def config_of_full_layers(config: PretrainedConfig) -> PretrainedConfig:
    """What holds for full-attention layers, where kinds of layers differ in more than the window (Gemma 4's heads)."""
    return config.per_layer_config["full_attention"] if getattr(config, "is_heterogeneous", False) else config


def attends(config: PretrainedConfig, layer_idx: int) -> bool:
    """Whether a layer has attention over tokens, where others are recurrent or convolutions."""
    kinds = getattr(config, "layer_types", None)
    return not kinds or kinds[layer_idx] not in ("linear_attention", "conv", "moe")


def has_sliding_window(config: PretrainedConfig) -> bool:
    kinds = getattr(config, "layer_types", None)
    return any("sliding" in kind for kind in kinds) if kinds else is_local(config, 0)


def stock_attention(config: PretrainedConfig) -> str:
    """The name of transformers' attention for a model: SDPA, or eager where SDPA does not do (soft caps, sinks)."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"


def takes_checkpointing(config: PretrainedConfig) -> bool:
    return getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "supports_gradient_checkpointing", True)


def attention_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Modules of the decoder that call the attention function; they have `layer_idx`."""
    return [module for module in model.get_decoder().modules() if hasattr(module, "layer_idx")]


def rotary_embedding(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder's RoPE, called with position_ids, with `inv_freq` [R]; ValueError where there is no such one."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if not isinstance(getattr(rotary, "inv_freq", None), torch.Tensor):
        has = "no rotary position embeddings" if rotary is None else "other rotary position embeddings by kind of layer"
        raise ValueError(f"it has {has}")
    return rotary
