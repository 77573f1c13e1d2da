"""Predicted memory against bytes counted at the full shapes of Llama-2, on fake tensors, which hold no memory.

One decoder layer of the full width runs forward and backward, with the loss; the other layers add what it keeps, and
their gradients, which lie there from an earlier micro-batch. NF4 weights are a stand-in of the
same parts (packed values, scales, scales of scales), unpacked by bitsandbytes' own operation; layers as in
transformers have 16-bit weights instead. Optimizer state is not counted.
"""

from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import QuantState
from live_memory import LiveStorages
from random_nf4_model import shape_config
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from longqlora.attention.binding import bind_attention
from longqlora.memory.estimate import GIB, ModelShape, RunShape, predict
from longqlora.memory.layer_binding import bind_layers, decoder_layers
from longqlora.memory.policy import BALANCED, CHECKPOINTED, FAST, MAX_LENGTH, STOCK, ActivationPolicy
from longqlora.model.adapter import attach_adapter
from longqlora.model.loss import next_token_loss
from longqlora.settings.config import AdapterConfig, AttentionConfig

DTYPE = torch.bfloat16
slow = pytest.mark.slow
CASES = [
    *(("llama2-7b", 8192, policy, attention) for policy in (CHECKPOINTED, BALANCED) for attention in ("s2", "full")),
    *(pytest.param("llama2-7b", 8192, policy, attention, marks=slow) for policy in (STOCK, FAST, MAX_LENGTH)
      for attention in ("s2", "full")),
    pytest.param("llama2-7b", 100_000, BALANCED, "full", marks=slow),
    *(pytest.param("llama2-13b", length, BALANCED, "full", marks=slow) for length in (8192, 100_000)),
    *(pytest.param("llama2-70b", 32_768, policy, "full", marks=slow) for policy in (BALANCED, MAX_LENGTH)),
]  # fmt: skip


def pack(linear: torch.nn.Linear) -> None:
    """Replace a weight by what NF4 with double quantisation holds of it."""
    shape, num_blocks = linear.weight.shape, linear.weight.numel() // 64
    scales = QuantState(torch.empty(-(-num_blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    linear.weight = torch.nn.Parameter(torch.empty(shape.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    linear.weight.quant_state = QuantState(
        torch.empty(num_blocks, dtype=torch.uint8), shape=shape, code=torch.empty(16), blocksize=64, quant_type="nf4",
        dtype=DTYPE, offset=torch.empty(()), state2=scales,
    )  # fmt: skip


def one_layer_model(config, length: int, policy: ActivationPolicy, attention: str):
    """A model of fake tensors with adapter, attention and policy; to be used in the mode that is on."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa")
        model = attach_adapter(model, AdapterConfig("lora", lora_rank=64)).train()
    bind_attention(model.get_base_model(), AttentionConfig(attention=attention), length)
    if policy.layer_function:
        bind_layers(model, policy)
    elif policy.gradient_checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def fill(model: torch.nn.Module, *, is_quantised: bool) -> None:
    """Put fake tensors in place of those on the meta device."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    for module in model.modules() if is_quantised else ():
        if hasattr(module, "lora_A"):
            pack(module.get_base_layer())


def bytes_of(module: torch.nn.Module) -> int:
    states = [getattr(weight, "quant_state", None) for weight in module.parameters()]
    scales = [x for state in states if state for x in (state.absmax, state.state2.absmax)]
    return sum(x.nbytes for x in (*module.parameters(), *scales))


def counted(config, length: int, policy: ActivationPolicy, attention: str, monkeypatch) -> tuple[float, float]:
    """Bytes of weights and of a step, for all layers."""
    num_layers, config.num_hidden_layers = config.num_hidden_layers, 1
    model = one_layer_model(config, length, policy, attention)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(model, is_quantised=policy.layer_function)
        base, (layer,) = model.get_base_model(), decoder_layers(model)
        # Seeds of dropout: a fake tensor has no value.
        monkeypatch.setattr(torch, "randint", lambda *_: 0)
        with LiveStorages() as memory, torch.autocast("cpu", DTYPE):
            for weight in (weight for weight in model.parameters() if weight.requires_grad):
                weight.grad = torch.empty_like(weight)
            hidden = torch.empty(1, length, config.hidden_size, dtype=DTYPE).requires_grad_()
            rope = base.model.rotary_emb(hidden, torch.arange(length)[None])
            before = memory.live_bytes
            hidden = layer(hidden, position_embeddings=rope)
            added = memory.live_bytes - before
            loss = next_token_loss(base.model.norm(hidden), base.lm_head.weight, torch.zeros(1, length, dtype=int))
            del hidden
            loss.backward()
    added += sum(weight.nbytes for weight in layer.parameters() if weight.requires_grad)
    return bytes_of(model) + (num_layers - 1) * bytes_of(layer), memory.peak_bytes + (num_layers - 1) * added


@pytest.mark.parametrize("shape,length,policy,attention", CASES)
def test_prediction_is_within_a_tenth_at_full_width(shape, length, policy, attention, monkeypatch):
    policy = replace(policy, offload_activations=False, optim=None)
    run = RunShape(length, weights="nf4" if policy.layer_function else "plain", optimizer_bytes=0, is_gpu=False)
    predicted = predict(ModelShape.of(shape_config(shape)), run, policy)
    static, step = counted(shape_config(shape), length, policy, attention, monkeypatch)
    ratios = predicted.static / static, predicted.step / step
    print(f"{policy.describe()}, {attention}: {static / GIB:.2f} + {step / GIB:.2f} GiB, predicted / counted {ratios}")
    assert all(0.9 < ratio < 1.1 for ratio in ratios), ratios
