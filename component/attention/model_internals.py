"""What this library reads of transformers models without transformers documenting it: each name in one function.

As in transformers 5.17 to 5.23; tests/attention/test_model_internals.py says what a later version has changed.
"""

import torch
from transformers import PretrainedConfig, PreTrainedModel


def attention_name(config: PretrainedConfig) -> str | None:
    """The name under which the model looks up its attention function; `set_attn_implementation` sets it."""
    return config._attn_implementation


def uses_attention_interface(model: PreTrainedModel) -> bool:
    """Whether all attention of the model goes through the function registered under `attention_name`."""
    return model._supports_attention_backend


def attention_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Modules of the decoder that call the attention function; they have `layer_idx`."""
    return [module for module in model.get_decoder().modules() if hasattr(module, "layer_idx")]


def rotary_embedding(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder's RoPE, called with position_ids, with `inv_freq` [R]; raises ValueError where there is none."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if not isinstance(getattr(rotary, "inv_freq", None), torch.Tensor):
        raise ValueError("it has no rotary position embeddings")
    return rotary
