"""Bind the layer function to a transformers model: its decoder layers, in training, become single nodes of the
graph, and its last norm works in tiles.

The layers are transformers' own. Each is a `GradientCheckpointingLayer`, which in training mode hands its forward pass
to the checkpointing function set on it (5.17 and later); ours is set there, and leaves a key/value cache out, as
transformers' does. In evaluation and generation nothing of ours is called. What is read of a layer and of its
arguments stands here and in decoder_layer.py, for `decoder_layer.MODEL_TYPES`, with an adapter or trained in full.
"""

from dataclasses import replace
from functools import partial

import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from longqlora.attention.binding import attention_pattern, call_attention
from longqlora.attention.model_internals import is_local
from longqlora.attention.proof import check_equal, outputs_and_gradients, refusing, tiny_copy, trial_inputs
from longqlora.device import reuse_freed_memory
from longqlora.memory.decoder_layer import DecoderLayer, reason_unsupported
from longqlora.memory.host_offload import HostOffload
from longqlora.memory.layer_function import LayerCall, LayerFunction
from longqlora.memory.policy import ActivationPolicy
from longqlora.model.adapter import attach_adapter
from longqlora.settings.config import AdapterConfig


def apply_policy(model: nn.Module, policy: ActivationPolicy, device: torch.device) -> None:
    """Bind the layer function as the memory plan says; gradient checkpointing is the trainer's to switch on.

    Raises ValueError where the function's outputs or gradients are not those of the model's layers.
    """
    if device.type == "cpu":
        reuse_freed_memory()
    if policy.layer_function:
        # Several tiles, the last one shorter, in the few tokens of a proof.
        prove_layers(model, replace(policy, tile_size=5))
        # On a CPU, host memory is where tensors are anyway.
        is_offloaded = policy.offload_activations and device.type == "cuda"
        bind_layers(model, policy, store=HostOffload(device) if is_offloaded else None)


def bind_layers(model: nn.Module, policy: ActivationPolicy, *, store: HostOffload | None = None) -> None:
    """Let every decoder layer of `model`, adapter attached, train through `LayerFunction`.

    store: keeps tensors between forward and backward pass; None for autograd's own keeping.
    Raises ValueError where the model's layers are of another kind.
    """
    if reason := reason_unsupported(model.config, model.modules()):
        raise ValueError(f"layer_function: not available, since {reason}; set layer_function: false")
    for layer in decoder_layers(model):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = LayerCheckpoint(layer, policy, store)
    norm = model.get_decoder().norm
    # No hook of a module can take the place of its forward pass.
    norm.forward = partial(tiled_norm, norm, policy.tile_size)


def decoder_layers(model: PreTrainedModel | PeftModel) -> list[GradientCheckpointingLayer]:
    return list(model.get_decoder().layers)


class LayerCheckpoint:
    """The checkpointing function of one decoder layer, as transformers calls it in training mode."""

    def __init__(self, layer: nn.Module, policy: ActivationPolicy, store: HostOffload | None):
        self.layer, self.parts, self.policy, self.store = layer, DecoderLayer(layer), policy, store
        self.was_called = False

    def __call__(self, forward: partial, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output [B, S, C] of the layer; `forward` is its stock forward pass, with all arguments but the first."""
        self.was_called = True
        if not torch.is_grad_enabled():
            return forward(hidden_states)
        inputs, device = dict(forward.keywords), hidden_states.device.type
        rope, _ = inputs.pop("position_embeddings"), inputs.pop("past_key_values", None)
        attention = self.parts.attention, inputs.pop("attention_mask", None)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        rope = [x if self.parts.kind.turns_in_fp32 else x.to(dtype) for x in rope]
        call = LayerCall(
            self.parts, self.policy, dtype, rope,
            pattern=attention_pattern(*attention), attend=partial(call_attention, *attention, **inputs),
            # From the CPU's generator: no wait for a GPU.
            seed=int(torch.randint(2**62, ())),
            store=self.store,
        )  # fmt: skip
        return LayerFunction.apply(hidden_states, call, *(p for p in self.layer.parameters() if p.requires_grad))


def tiled_norm(norm: nn.Module, tile_size: int, x: torch.Tensor) -> torch.Tensor:
    """norm(x) for x [B, S, C], in the dtype of x; in training nothing but x is kept, and no fp32 copy of all tokens."""
    stock = partial(type(norm).forward, norm)
    if not norm.training or not torch.is_grad_enabled():
        return stock(x)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(stock, tile, **options).to(x.dtype) for tile in x.split(tile_size, dim=1)], dim=1)


def prove_layers(model: PreTrainedModel | PeftModel, policy: ActivationPolicy) -> None:
    """Raise ValueError unless the first layers, bound in a copy, have the stock logits and gradients.

    Trained are all weights, or, where `model` has an adapter, norms and the random LoRA matrices of another.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config, inputs, fix = base.config, trial_inputs(), "set layer_function: false"
    # Each kind of layers: with RoPE and without (SmolLM3), with a window and without (Qwen2).
    turned = getattr(config, "no_rope_layers", None)
    kinds = [(turned and turned[index], is_local(config, index)) for index in range(config.num_hidden_layers)]
    num_layers = max(kinds.index(kind) + 1 for kind in kinds)
    small = tiny_copy(base, num_layers=min(max(2, num_layers), len(kinds)))
    small.set_attn_implementation("sdpa")
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), refusing(base, "layer_function", fix):
        small = (small if base is model else attach_random_adapter(small)).train()
        expected = outputs_and_gradients(small, **inputs)
        bind_layers(small, policy)
        check_equal(zip(outputs_and_gradients(small, **inputs), expected, strict=True))
    if not all(layer._gradient_checkpointing_func.was_called for layer in decoder_layers(small)):
        cause = f"transformers {transformers.__version__} does not call its layers' checkpointing function"
        raise ValueError(f"layer_function: {cause}; {fix}")


def attach_random_adapter(model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(0)
    model = attach_adapter(model, AdapterConfig("lora", lora_rank=2, lora_dropout=0.0, train_norm=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # Larger ones make attention sharp, and its gradients rounding.
            torch.nn.init.normal_(parameter, std=0.1)
    return model
