"""The binding of S2-Attn and dense attention to transformers: sparse in training, dense in evaluation.

Tolerance: 1e-10 in fp64 where two ways compute the same thing.
"""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from attention_reference import shift_short_allowed
from conftest import tiny_config
from transformers import AutoModelForCausalLM

from longqlora.attention.binding import bind_attention, bind_inference_attention, unbind_attention
from longqlora.settings.config import AttentionConfig

MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3"]
S2 = AttentionConfig(attention="s2", group_size_ratio=0.25)
FULL = AttentionConfig(attention="full")
IDS = torch.randint(4, 320, (2, 40), generator=torch.Generator().manual_seed(1))


def make(model_type="llama", **overrides):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).double()


def is_close(ours, expected, tolerance=1e-10):
    return torch.allclose(ours, expected, rtol=tolerance, atol=tolerance)


def reference_logits(model, ids, group_size=2**20, segments=None, **inputs):
    """Stock SDPA under an explicit mask for every pair of tokens (stock eager softmax rounds to fp32)."""
    model.set_attn_implementation("sdpa")
    allowed = shift_short_allowed(ids.shape[1], model.config.num_attention_heads, group_size, segments)
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    return model(input_ids=ids, attention_mask=mask.expand(ids.shape[0], -1, -1, -1), **inputs).logits


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_training_equals_the_masked_model_and_evaluation_is_dense(model_type):
    model = make(model_type)
    for length in (7, 32, 45):
        ids = torch.randint(4, 320, (2, length), generator=torch.Generator().manual_seed(1))
        results = []
        for is_ours in (True, False):
            model.zero_grad()
            if is_ours:
                assert "S2-Attn, groups of 16" in bind_attention(model.train(), S2, 64)
            logits = model(input_ids=ids).logits if is_ours else reference_logits(model, ids, 16)
            logits.pow(2).sum().backward()
            results.append([logits.detach(), *[p.grad.clone() for p in model.parameters()]])
        assert all(is_close(ours, expected, 1e-9) for ours, expected in zip(*results, strict=True))
    stock = model.eval()(input_ids=ids).logits
    bind_attention(model, S2, 64)
    assert is_close(model(input_ids=ids).logits, stock)
    assert not is_close(model.train()(input_ids=ids).logits, stock, 1e-6)


MASK = torch.ones(2, 40, dtype=torch.long)
LEFT, RIGHT, HOLE = MASK.clone(), MASK.clone(), MASK.clone()
LEFT[1, :9] = RIGHT[1, 23:] = HOLE[1, 12:17] = 0
COUNTED = (LEFT.cumsum(1) - 1).clamp_min(0)
DOCUMENTS = torch.tensor([[0] * 11 + [1] * 20 + [2] * 9, [0] * 40])
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in (11, 20, 9)]), torch.arange(40)])
# Inputs, and the segments that the reference's mask keeps apart.
ROWS = {
    "right padding": ({"attention_mask": RIGHT}, torch.where(RIGHT == 1, 0, 1)),
    "left padding": (
        {"attention_mask": LEFT, "position_ids": COUNTED},
        torch.where(LEFT == 1, 0, torch.arange(40) + 1),
    ),
    "a hole": ({"attention_mask": HOLE}, torch.where(HOLE == 1, 0, 1)),
    "packed": ({"position_ids": POSITIONS}, DOCUMENTS),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["s2", "full"])
@pytest.mark.parametrize("rows", ROWS)
def test_padded_and_packed_rows(rows, attention, training, monkeypatch):
    """No mask [S, S] is made of them but for a hole; full attention to packed rows is stock's under its own."""
    inputs, segments = ROWS[rows]
    model, is_packed = make().train(training), rows == "packed"
    bind_attention(model, AttentionConfig(attention, group_size_ratio=0.25), 64, is_packed=is_packed)
    if is_packed and attention == "full":
        assert model.config._attn_implementation == "sdpa_no_mask"
    if rows != "a hole":
        monkeypatch.setattr("longqlora.attention.shift_short.segment_mask", None)
    ours = model(input_ids=IDS, use_cache=False, **inputs).logits
    positions = {"position_ids": inputs["position_ids"]} if "position_ids" in inputs else {}
    is_sparse = attention == "s2" and training
    expected = reference_logits(model, IDS, 16 if is_sparse else 2**20, segments, **positions)
    real = inputs.get("attention_mask", MASK) == 1
    assert torch.isfinite(ours).all() and is_close(ours[real], expected[real])
    unbind_attention(model)
    assert is_close(model(input_ids=IDS, use_cache=False, **inputs).logits[real], ours[real]) == (not is_sparse)


@pytest.mark.parametrize("window", [None, 8])
def test_dense_blocks_against_the_cache_equal_stock(window):
    """Plain, padded and windowed: no mask where none is needed, the stock one elsewhere."""
    model = make("mistral", sliding_window=window).eval()
    for mask in (None, LEFT):
        results = []
        for is_chunked in (False, True):
            bind_inference_attention(model, is_chunked=is_chunked)
            cache, blocks = None, []
            for first, end in ((0, 17), (17, 18), (18, 40)):
                given = None if mask is None else mask[:, :end]
                with torch.no_grad():
                    out = model(IDS[:, first:end], attention_mask=given, past_key_values=cache, use_cache=True)
                cache, blocks = out.past_key_values, [*blocks, out.logits]
            results.append(torch.cat(blocks, dim=1))
        assert model.config._attn_implementation == "sdpa_no_mask"
        real = (MASK if mask is None else mask) == 1
        assert is_close(results[1][real], results[0][real])


def test_packed_rows_of_models_with_windows_keep_the_stock_attention():
    model = make("mistral", sliding_window=8)
    bind_attention(model, FULL, 64, is_packed=True)
    assert model.config._attn_implementation == "sdpa"


def test_unbinding_restores_stock_attention_and_full_is_stock():
    model = make().train()
    stock = model(input_ids=IDS).logits
    bind_attention(model, S2, 64)
    unbind_attention(model)
    assert torch.equal(model(input_ids=IDS).logits, stock)
    assert "full" in bind_attention(model, FULL, 64)
    assert torch.equal(model(input_ids=IDS).logits, stock)


def test_two_models_keep_their_own_group_size():
    first, second = make().train(), make().train()
    bind_attention(first, S2, 64)
    alone = first(input_ids=IDS).logits
    bind_attention(second, S2, 32)
    assert torch.equal(first(input_ids=IDS).logits, alone)
    assert not torch.allclose(second(input_ids=IDS).logits, alone)


def test_generation_under_the_binding_equals_stock():
    model = make().eval()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 3, "eos_token_id": None}
    stock = model.generate(IDS, attention_mask=LEFT.flip(0), **options)
    bind_attention(model, S2, 64)
    assert torch.equal(model.generate(IDS, attention_mask=LEFT.flip(0), **options), stock)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = make().train()
    bind_attention(model, S2, 64)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(input_ids=IDS, use_cache=False).logits.pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(is_close(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


REFUSED = [
    ("mistral", {"sliding_window": 16}, 64, "mistral has sliding-window layers"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        64,
        "qwen2 has sliding-window",
    ),
    ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}, 64, "odd number"),
    ("llama", {}, 4, "group"),
]


@pytest.mark.parametrize("model_type,shape,length,message", REFUSED)
def test_refusals_name_what_is_wrong(model_type, shape, length, message):
    with pytest.raises(ValueError, match=message):
        bind_attention(make(model_type, **shape), S2, length)
    for ratio in (0, -1, 1.5):
        with pytest.raises(ValueError, match="group_size_ratio"):
            AttentionConfig(group_size_ratio=ratio).group_size(64)


def test_flash_attn_is_imported_only_when_asked_for():
    bind_attention(make(), S2, 64)
    assert "flash_attn" not in sys.modules
    for attention in ("s2", "full"):
        with pytest.raises(ValueError, match="flash-attn package is not installed"):
            bind_attention(make(), AttentionConfig(attention, use_flash_attn=True), 64)


def test_flash_attn_back_end_agrees(monkeypatch):
    """The package itself needs a GPU; a stand-in with its signature and layout checks how it is called."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert causal and dropout_p == 0.0 and softmax_scale is not None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)

    stand_in = types.ModuleType("flash_attn")
    stand_in.__spec__, stand_in.flash_attn_func = types.SimpleNamespace(name="flash_attn"), flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    model = make().train()
    bind_attention(model, S2, 64)
    expected = model(input_ids=IDS).logits
    bind_attention(model, AttentionConfig(use_flash_attn=True), 64)
    assert model.config._attn_implementation == "s2_fa_g16"
    assert is_close(model(input_ids=IDS).logits, expected)
