"""Bind the layer function to a transformers model: its decoder layers, in training, become single
nodes, and its last norm works in tiles.

Any model type of `decoder_layer.MODEL_TYPES`; with an adapter or trained in full. In evaluation, in generation
and with a filled key/value cache the layers are transformers' own. `unbind_layers` undoes it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from longqlora.attention.binding import attention_pattern, call_attention
from longqlora.attention.proof import prove_training
from longqlora.memory.decoder_layer import DecoderLayer, reason_unsupported
from longqlora.memory.host_offload import HostOffload
from longqlora.memory.layer_call import LayerCall, LayerOptions
from longqlora.memory.layer_function import LayerFunction
from longqlora.memory.policy import Mechanisms
from longqlora.memory.tiled_norm import tiled_norm
from longqlora.model.adapter import attach_adapter
from longqlora.settings.config import AdapterConfig

# Several tiles, the last one shorter, in the few tokens of a proof.
PROOF_TILE_SIZE = 5


def apply_mechanisms(model: nn.Module, mechanisms: Mechanisms, device: torch.device) -> None:
    """Bind the layer function as the memory plan says; gradient checkpointing is the trainer's to switch on.

    Raises ValueError where the function's outputs or gradients are not those of the model's layers.
    """
    if mechanisms.layer_function:
        options = LayerOptions(mechanisms.keep_activations, mechanisms.tile_size, mechanisms.num_head_chunks)
        few_tokens = replace(options, tile_size=PROOF_TILE_SIZE)
        prove_layers(model, partial(bind_layers, options=few_tokens), fix="set layer_function: false")
        bind_layers(model, options, store=HostOffload(device) if mechanisms.offload_activations else None)


def bind_layers(model: nn.Module, options: LayerOptions, *, store: Any = None) -> None:
    """Let every decoder layer of `model`, adapter attached, train through `LayerFunction`.

    store: keeps tensors between forward and backward (`put`, `get`), or None for autograd's own keeping.
    Raises ValueError where the model's layers are of another kind.
    """
    reason = reason_unsupported(model)
    if reason:
        raise ValueError(f"layer_function: not available, since {reason}; set layer_function: false")
    for layer in decoder_layers(model):
        layer.forward = partial(layer_forward, layer, DecoderLayer(layer), options, store)
    norm = final_norm(model)
    norm.forward = partial(norm_forward, norm, options.tile_size)


def unbind_layers(model: nn.Module) -> None:
    """Give the model its own layers back."""
    for module in (*decoder_layers(model), final_norm(model)):
        module.__dict__.pop("forward", None)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    return list(decoder(model).layers)


def final_norm(model: nn.Module) -> nn.Module:
    return decoder(model).norm


def decoder(model: nn.Module) -> nn.Module:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()


def norm_forward(norm: nn.Module, tile_size: int, hidden_states: torch.Tensor) -> torch.Tensor:
    """Forward pass of the norm behind the last layer."""
    stock = partial(type(norm).forward, norm)
    if not norm.training or not torch.is_grad_enabled():
        return stock(hidden_states)
    return tiled_norm(stock, hidden_states, [p for p in norm.parameters() if p.requires_grad], tile_size=tile_size)


def layer_forward(
    layer: nn.Module,
    parts: DecoderLayer,
    options: LayerOptions,
    store: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    past_key_values=None,
    **kwargs,
) -> torch.Tensor:
    """Forward pass of a decoder layer, with transformers' arguments."""
    # An empty cache is left empty, as gradient checkpointing does: transformers makes one in training as well.
    has_past = past_key_values is not None and past_key_values.get_seq_length() > 0
    if not layer.training or not torch.is_grad_enabled() or has_past:
        inputs = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        return type(layer).forward(layer, hidden_states, **inputs, past_key_values=past_key_values, **kwargs)
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    cos, sin = (x.to(dtype) for x in position_embeddings)
    call = LayerCall(
        parts, options, dtype, cos, sin,
        pattern=attention_pattern(parts.attention, attention_mask),
        attend=partial(call_attention, parts.attention, attention_mask, **kwargs),
        # From the CPU's generator: no wait for a GPU.
        seed=int(torch.randint(2**62, ())),
        store=store,
    )  # fmt: skip
    trained = [p for p in layer.parameters() if p.requires_grad]
    return LayerFunction.apply(hidden_states, call, *trained)


def prove_layers(model: PreTrainedModel | PeftModel, bind: Callable[[PreTrainedModel], None], *, fix: str) -> None:
    """Raise ValueError unless the first two layers, in a copy, have the stock logits and gradients after `bind(copy)`.

    Trained are all weights, or, where `model` has an adapter, norms and the random LoRA matrices of another.
    """
    if isinstance(model, PeftModel):
        prove_training(model.get_base_model(), "layer_function", bind, fix=fix, prepare=attach_random_adapter)
    else:
        prove_training(model, "layer_function", bind, fix=fix)


def attach_random_adapter(model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(0)
    model = attach_adapter(model, AdapterConfig("lora", lora_rank=2, lora_dropout=0.0, train_norm=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # Larger ones make attention sharp, and its gradients rounding.
            torch.nn.init.normal_(parameter, std=0.1)
    return model
