"""Every model family that the README names through the whole path: train, sparse and dense, merge, reload."""

import pytest
import torch
from conftest import save_tiny_model, tiny_config
from transformers import AutoModelForCausalLM

from component.adapter import AdapterConfig, attach_adapter
from component.adapter_folder import save_adapter
from component.attention import AttentionConfig, bind_attention, unbind_attention
from component.context import ContextRequest, apply_context
from component.inference import load_for_inference
from component.loss_binding import bind_chunked_loss
from component.merge import merge
from component.model import load_config, load_model

MODEL_TYPES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gpt_neox"]
LENGTH, TARGET = 32, 128


@pytest.fixture(scope="module", params=MODEL_TYPES)
def base(request, tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return save_tiny_model(folder, tiny_tokenizer, tiny_config(request.param, max_position_embeddings=LENGTH))


def training_model(base, *, attention="s2", load_in_4bit=False, **adapter):
    config = load_config(str(base))
    kind = "dca" if attention == "dca" else "auto"
    apply_context(config, ContextRequest(context_size=TARGET, attention=kind))
    model = load_model(str(base), config, dtype=torch.float32, load_in_4bit=load_in_4bit, device=torch.device("cpu"))
    bind_attention(model, AttentionConfig(attention=attention), TARGET)
    bind_chunked_loss(model)
    finetuning_type = "qlora" if load_in_4bit else "lora"
    torch.manual_seed(0)
    return attach_adapter(
        model, AdapterConfig(finetuning_type=finetuning_type, lora_rank=4, lora_dropout=0.0, **adapter)
    )


def ids_of(num_tokens, seed=0):
    return torch.randint(4, 320, (2, num_tokens), generator=torch.Generator().manual_seed(seed))


def train(model, num_steps=4):
    """Adam steps on one batch; returns the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = ids_of(TARGET), []
    model.train()
    for _ in range(num_steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_trains_sparse_and_reads_dense(base):
    model = training_model(base, train_embedding=True, train_norm=True)
    assert model.config._attn_implementation == "s2_sdpa_g32"
    ids = ids_of(TARGET, seed=1)
    with torch.no_grad():
        sparse = model.train()(input_ids=ids).logits
        dense = model.eval()(input_ids=ids).logits
        unbind_attention(model.get_base_model())
        assert torch.equal(model(input_ids=ids).logits, dense), "evaluation is stock dense attention"
    assert torch.allclose(sparse[:, :16], dense[:, :16], atol=1e-5), "the first half group sees all there is"
    assert not torch.allclose(sparse[:, 64:], dense[:, 64:], atol=1e-4)
    bind_attention(model.get_base_model(), AttentionConfig(), TARGET)
    changed = ids.clone()
    changed[:, 100:] = (changed[:, 100:] + 1) % 316 + 4
    with torch.no_grad():
        again = model.train()(input_ids=changed).logits
    assert torch.allclose(again[:, :100], sparse[:, :100], atol=1e-5), "no token sees a later one"


def test_qlora_step_learns(base):
    losses = train(training_model(base, load_in_4bit=True))
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("attention", ["s2", "dca"])
def test_merged_model_reloads_in_stock_transformers(base, attention, tmp_path, tiny_tokenizer):
    model = training_model(base, attention=attention, train_embedding=True, train_norm=True)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    save_adapter(model, adapter)
    merge(None, str(adapter), merged)
    short, long = ids_of(16, seed=2), ids_of(100, seed=3)
    stock = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=long).logits
        for source in ({"adapter_name_or_path": str(adapter)}, {"model_name_or_path": str(merged)}):
            loaded = load_for_inference(**{"model_name_or_path": None, **source}, dtype=torch.float32)
            assert torch.allclose(loaded.model(input_ids=long).logits, expected, atol=1e-4), source
            assert loaded.context_size == TARGET and ("dual chunk" in loaded.attention) == (attention == "dca")
        # Stock transformers knows no dual chunk attention; within one chunk there is nothing to know.
        assert torch.allclose(stock(input_ids=short).logits, model(input_ids=short).logits, atol=1e-4)
        same = torch.allclose(stock(input_ids=long).logits, expected, atol=1e-4)
        assert same == (attention == "s2")
