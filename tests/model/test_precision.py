"""16-bit training: what flows between layers stays in 16 bit, what is trained is fp32, and no twin is kept."""

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForCausalLM

from longqlora.attention.binding import bind_attention
from longqlora.memory.layer_binding import bind_layers
from longqlora.memory.policy import ActivationPolicy
from longqlora.model.adapter import attach_adapter
from longqlora.model.loss_binding import bind_chunked_loss
from longqlora.settings.config import AdapterConfig, AttentionConfig


def build(model_type="llama", dtype=torch.bfloat16, *, trains_rest=True, **overrides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), dtype=dtype)
    bind_attention(model, AttentionConfig(), 32)
    bind_chunked_loss(model)
    options = AdapterConfig(
        finetuning_type="lora", lora_rank=4, lora_dropout=0.0, train_embedding=trains_rest, train_norm=trains_rest
    )
    return attach_adapter(model, options).train()


def batch(length: int = 32) -> dict[str, torch.Tensor]:
    ids = torch.randint(320, (2, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("uses_layer_function", [False, True])
@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("trains_rest", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_stream_is_16_bit_and_trained_weights_are_fp32(model_type, trains_rest, is_autocast, uses_layer_function):
    model, seen = build(model_type, trains_rest=trains_rest), []
    if uses_layer_function:
        bind_layers(model, ActivationPolicy(tile_size=16))
    decoder = model.get_base_model().model
    decoder.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    # A stream that any layer widens stays wide.
    decoder.norm.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        loss = model(**batch()).loss
    loss.backward()
    assert seen == [torch.bfloat16] * 3 and loss.dtype == torch.float32
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained.values())
    assert any("embed_tokens" in name for name in trained) == any(".norm." in name for name in trained) == trains_rest


def test_weights_trained_in_full_are_fp32():
    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    model = attach_adapter(model, AdapterConfig(finetuning_type="full"))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("is_tied", [False, True])
def test_no_frozen_twin_is_held_and_the_model_still_works(is_tied):
    model = build(tie_word_embeddings=is_tied)
    twins = [p for name, p in model.named_parameters() if ".original_module." in name]
    assert twins and all(p.numel() == 0 for p in twins)
    model.to("cpu")(**batch()).loss.backward()
    head, embedding = model.get_base_model().get_output_embeddings(), model.get_base_model().get_input_embeddings()
    assert (head.weight is embedding.weight) == is_tied and embedding.weight.requires_grad
    model.eval().generate(batch()["input_ids"][:, :4], max_new_tokens=3)
    assert torch.isfinite(model(batch()["input_ids"]).logits).all(), "a trained head takes 16-bit states"
    with model.disable_adapter(), pytest.raises(RuntimeError, match="cannot switch its adapter off"):
        model(batch()["input_ids"])


@pytest.mark.parametrize("num_steps", [150, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("uses_layer_function", [False, True])
def test_fp16_with_loss_scaling(uses_layer_function, num_steps):
    """As the Trainer does it on a V100: autocast, a scaled loss, fp32 weights; scale and losses stay finite."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 320}
    model = build(dtype=torch.float16, num_attention_heads=2, num_key_value_heads=2, **sizes)
    if uses_layer_function:
        bind_layers(model, ActivationPolicy(tile_size=8))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.AdamW(trained, lr=2e-3), torch.amp.GradScaler("cpu")
    losses, skipped = [], 0
    for _ in range(num_steps):
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch(8)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses))) and all(torch.isfinite(p).all() for p in trained)
    assert losses[-1] < (0.2 if num_steps == 1000 else 0.8) * losses[0] and skipped < 10, (losses, skipped)
