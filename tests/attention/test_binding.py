"""The binding of S2-Attn to transformers: sparse in training, dense in evaluation, for each model type.

Tolerance: 1e-10 in fp64 where two ways compute the same thing.
"""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from transformers import AutoModelForCausalLM

from longqlora.attention.binding import bind_attention, unbind_attention
from longqlora.settings.config import AttentionConfig

MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3"]
S2 = AttentionConfig(attention="s2", group_size_ratio=0.25)


def make(model_type="llama", **overrides):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).double()


def sparse_mask(length, heads, group_size, segments=None):
    """Additive mask [B, H, S, S] of S2-Attn, from its definition."""
    position = torch.arange(length)
    allowed = torch.stack([
        (position[:, None] + shift) // group_size == (position[None] + shift) // group_size
        for shift in [0] * (heads // 2) + [group_size // 2] * (heads // 2)
    ])[None] & (position[:, None] >= position[None])  # fmt: skip
    if segments is not None:
        allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)


def reference_logits(model, ids, group_size, segments=None, **inputs):
    """Stock SDPA under an explicit mask for every pair of tokens (stock eager softmax rounds to fp32)."""
    model.set_attn_implementation("sdpa")
    mask = sparse_mask(ids.shape[1], model.config.num_attention_heads, group_size, segments)
    return model(input_ids=ids, attention_mask=mask.expand(ids.shape[0], -1, -1, -1), **inputs).logits


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("length", [7, 32, 45])
def test_training_forward_and_backward_equal_the_masked_model(model_type, length):
    model = make(model_type).train()
    ids = torch.randint(4, 320, (2, length), generator=torch.Generator().manual_seed(1))
    results = []
    for step in ("sparse", "reference"):
        model.zero_grad()
        if step == "sparse":
            assert "S2-Attn, groups of 16" in bind_attention(model, S2, 64)
            logits = model(input_ids=ids).logits
        else:
            logits = reference_logits(model, ids, 16)
        logits.pow(2).sum().backward()
        results.append([logits.detach(), *[p.grad.clone() for p in model.parameters()]])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_evaluation_is_dense(model_type):
    model = make(model_type).eval()
    ids = torch.randint(4, 320, (2, 40))
    stock = model(input_ids=ids).logits
    bind_attention(model, S2, 64)
    assert torch.allclose(model(input_ids=ids).logits, stock, rtol=0, atol=1e-10)
    model.train()
    assert not torch.allclose(model(input_ids=ids).logits, stock, rtol=0, atol=1e-6)


def test_unbinding_restores_stock_attention():
    model = make().train()
    ids = torch.randint(4, 320, (1, 40))
    stock = model(input_ids=ids).logits
    bind_attention(model, S2, 64)
    unbind_attention(model)
    assert torch.equal(model(input_ids=ids).logits, stock)


def test_two_models_keep_their_own_group_size():
    first, second = make().train(), make().train()
    ids = torch.randint(4, 320, (1, 48))
    bind_attention(first, S2, 64)
    alone = first(input_ids=ids).logits
    bind_attention(second, S2, 32)
    assert torch.equal(first(input_ids=ids).logits, alone)
    assert not torch.allclose(second(input_ids=ids).logits, alone)


def test_right_padding_changes_no_real_token():
    model = make().train()
    bind_attention(model, S2, 64)
    ids = torch.randint(4, 320, (2, 40))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 23:] = 0
    together = model(input_ids=ids.masked_fill(mask == 0, 3), attention_mask=mask).logits
    alone = model(input_ids=ids[1:, :23]).logits
    assert torch.allclose(together[1, :23], alone[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_left_padding(training):
    model = make()
    ids = torch.randint(4, 320, (2, 40))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    segments = torch.where(mask == 1, 0, torch.arange(40) + 1)
    bind_attention(model.train(training), S2, 64)
    ours = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert torch.isfinite(ours).all()
    expected = reference_logits(model, ids, 16 if training else 2**20, segments, position_ids=positions)
    assert torch.allclose(ours[mask == 1], expected[mask == 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_packed_rows(training):
    model = make()
    ids = torch.randint(4, 320, (2, 40))
    positions = torch.stack([torch.cat([torch.arange(11), torch.arange(20), torch.arange(9)]), torch.arange(40)])
    segments = torch.stack([torch.tensor([0] * 11 + [1] * 20 + [2] * 9), torch.zeros(40, dtype=torch.long)])
    bind_attention(model.train(training), S2, 64)
    ours = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    expected = reference_logits(model, ids, 16 if training else 2**20, segments, position_ids=positions)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["full", "s2"])
def test_packed_rows_need_no_mask(attention, training, monkeypatch):
    """Full attention equals stock SDPA under its own mask; with S2-Attn, evaluation does."""
    model = make(num_key_value_heads=2)
    ids = torch.randint(4, 320, (2, 40))
    positions = torch.stack([torch.arange(40) % 17, torch.arange(40)])
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    stock = model.eval()(**inputs).logits
    config = AttentionConfig(attention=attention)
    bind_attention(model.train(training), config, 64, is_packed=True)
    monkeypatch.setattr("longqlora.attention.shift_short_binding.segment_mask", None)
    ours = model(**inputs).logits
    assert torch.allclose(ours, stock, rtol=0, atol=1e-10) == (attention == "full" or not training)
    unbind_attention(model)
    assert torch.equal(model.eval()(**inputs).logits, stock)


def test_packed_rows_of_models_with_windows_keep_the_stock_attention():
    model = make("mistral", sliding_window=8)
    bind_attention(model, AttentionConfig(attention="full"), 64, is_packed=True)
    assert model.config._attn_implementation == "sdpa"


def test_generation_under_the_binding_equals_stock():
    model = make().eval()
    ids = torch.randint(4, 320, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 3,
        "eos_token_id": None,
    }
    stock = model.generate(ids, **options)
    bind_attention(model, S2, 64)
    assert torch.equal(model.generate(ids, **options), stock)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = make().train()
    bind_attention(model, S2, 64)
    ids = torch.randint(4, 320, (1, 50))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(input_ids=ids, use_cache=False).logits.pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, rtol=0, atol=1e-10)


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match="mistral has sliding-window layers"):
        bind_attention(make("mistral", sliding_window=16), S2, 64)
    with pytest.raises(ValueError, match="qwen2 has sliding-window layers"):
        bind_attention(make("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=0), S2, 64)
    with pytest.raises(ValueError, match="odd number"):
        bind_attention(make(num_attention_heads=1, num_key_value_heads=1), S2, 64)
    for ratio in (0, -1, 1.5):
        with pytest.raises(ValueError, match="group_size_ratio"):
            AttentionConfig(group_size_ratio=ratio).group_size(64)
    with pytest.raises(ValueError, match="group"):
        bind_attention(make(), S2, 4)


def test_full_attention_is_stock():
    model = make().train()
    ids = torch.randint(4, 320, (1, 40))
    stock = model(input_ids=ids).logits
    assert "full" in bind_attention(model, AttentionConfig(attention="full"), 64)
    assert torch.equal(model(input_ids=ids).logits, stock)


def test_flash_attn_is_imported_only_when_asked_for(monkeypatch):
    assert "flash_attn" not in sys.modules
    bind_attention(make(), S2, 64)
    assert "flash_attn" not in sys.modules
    with pytest.raises(ValueError, match="flash-attn package is not installed"):
        bind_attention(make(), AttentionConfig(use_flash_attn=True), 64)
    with pytest.raises(ValueError, match="flash-attn package is not installed"):
        bind_attention(make(), AttentionConfig(attention="full", use_flash_attn=True), 64)


def test_flash_attn_back_end_agrees(monkeypatch):
    """The package itself needs a GPU; a stand-in with its signature and layout checks how it is called."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert causal and dropout_p == 0.0 and softmax_scale is not None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=gqa).transpose(
            1, 2
        )

    stand_in = types.ModuleType("flash_attn")
    stand_in.__spec__ = types.SimpleNamespace(name="flash_attn")
    stand_in.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    model = make().train()
    ids = torch.randint(4, 320, (2, 45))
    bind_attention(model, S2, 64)
    expected = model(input_ids=ids).logits
    bind_attention(model, AttentionConfig(use_flash_attn=True), 64)
    assert model.config._attn_implementation == "s2_fa_g16"
    assert torch.allclose(model(input_ids=ids).logits, expected, rtol=0, atol=1e-10)
