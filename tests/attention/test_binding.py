"""The binding of S2-Attn and dense attention to transformers: sparse in training, dense in evaluation."""

import copy
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from attention_reference import assert_close, logits_and_gradients, logits_in_blocks, shift_short_allowed
from conftest import tiny_config
from transformers import AutoModelForCausalLM

from longqlora.attention.binding import attention_pattern, bind_attention, bind_inference_attention, unbind_attention
from longqlora.attention.sdpa import causal_attention
from longqlora.settings.config import AttentionConfig

MODEL_TYPES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gpt_neox"]
S2 = AttentionConfig(attention="s2", group_size_ratio=0.25)
IDS = torch.randint(4, 320, (2, 40), generator=torch.Generator().manual_seed(1))


def make(model_type="llama", **overrides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).double()
    if model_type == "mixtral":
        model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


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
        expected = logits_and_gradients(model, ids, partial(reference_logits, model, group_size=16))
        assert "S2-Attn, groups of 16" in bind_attention(model.train(), S2, 64)
        for is_checkpointed in (False, True):
            if is_checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            for ours, theirs in zip(logits_and_gradients(model, ids), expected, strict=True):
                assert_close(ours, theirs)
        model.gradient_checkpointing_disable()
    dense = reference_logits(copy.deepcopy(model), ids)
    assert_close(model.eval()(input_ids=ids).logits, dense)
    assert not torch.allclose(model.train()(input_ids=ids).logits, dense, atol=1e-6)


MASK = torch.ones(2, 40, dtype=torch.long)
LEFT, RIGHT, HOLE = MASK.clone(), MASK.clone(), MASK.clone()
LEFT[1, :9] = RIGHT[1, 23:] = HOLE[1, 12:17] = 0
COUNTED = (LEFT.cumsum(1) - 1).clamp_min(0)
DOCUMENTS = torch.tensor([[0] * 11 + [1] * 20 + [2] * 9, [0] * 40])
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in (11, 20, 9)]), torch.arange(40)])
# Inputs, and the segments that the reference's mask keeps apart.
ROWS = {
    "right padding": ({"attention_mask": RIGHT}, 1 - RIGHT),
    "left padding": ({"attention_mask": LEFT, "position_ids": COUNTED}, 1 - LEFT),
    "a hole": ({"attention_mask": HOLE}, 1 - HOLE),
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
    assert_close(ours[real], expected[real])
    unbind_attention(model)
    stock = model(input_ids=IDS, use_cache=False, **inputs).logits
    assert torch.allclose(stock[real], ours[real], atol=1e-10) == (not is_sparse)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["plain", "padded"])
@torch.no_grad()
def test_dense_blocks_against_the_cache_equal_stock(window, mask):
    """No mask where none is needed, the stock one elsewhere."""
    model, results = make("mistral", sliding_window=window).eval(), []
    for is_chunked in (False, True):
        bind_inference_attention(model, is_chunked=is_chunked)
        results.append(logits_in_blocks(model, IDS, [17, 18], mask))
    assert model.config._attn_implementation == "sdpa_no_mask"
    real = (MASK if mask is None else mask) == 1
    assert_close(results[1][real], results[0][real])


WINDOW = 8
MIXED = {"sliding_window": WINDOW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "cohere2", "ministral", "olmo3", "exaone4"])
def test_layers_with_windows_keep_them_and_the_others_are_sparse(model_type, is_packed):
    """Logits and gradients in training are stock's under two explicit masks; evaluation is stock's."""
    model = make(model_type, num_hidden_layers=4, **MIXED).train()
    ids, inputs = (IDS[:1], {"position_ids": POSITIONS[:1]}) if is_packed else (IDS, {})
    segments = DOCUMENTS[:1] if is_packed else None
    window = torch.ones(40, 40, dtype=torch.bool).triu(1 - WINDOW)

    def under_masks(ids, group_size=16):
        model.set_attn_implementation("sdpa")
        allowed = shift_short_allowed(40, 4, group_size, segments), shift_short_allowed(40, 4, 2**20, segments) & window
        masks = dict(zip(("full_attention", "sliding_attention"), allowed, strict=True))
        return model(input_ids=ids, attention_mask=masks, use_cache=False, **inputs).logits

    expected, dense = logits_and_gradients(model, ids, under_masks), under_masks(ids, 2**20)
    assert "in all layers but 2 of 4 with windows" in bind_attention(model, S2, 64, is_packed=is_packed)
    ours = logits_and_gradients(model, ids, lambda ids: model(input_ids=ids, use_cache=False, **inputs).logits)
    for found, reference in zip(ours, expected, strict=True):
        assert_close(found, reference)
    assert not torch.allclose(ours[0], dense, atol=1e-6)
    for attention in ("s2", "full"):
        bind_attention(model.eval(), AttentionConfig(attention, group_size_ratio=0.25), 64, is_packed=is_packed)
        assert_close(model(input_ids=ids, use_cache=False, **inputs).logits, dense)


def test_a_short_row_has_a_window_without_a_mask():
    """Rows within the window need no mask; that a layer has one is known without it."""
    model = make("ministral", num_hidden_layers=4, **{**MIXED, "sliding_window": 64}).train()
    bind_attention(model, S2, 64)
    groups = [attention_pattern(layer.self_attn, None).group_size for layer in model.model.layers]
    assert groups == [None, 16, None, 16]
    bind_attention(model, AttentionConfig("full"), 64)
    patterns = [attention_pattern(layer.self_attn, None) for layer in model.model.layers]
    assert [pattern is None for pattern in patterns] == [True, False, True, False]


def test_attention_that_sdpa_does_not_compute_stays_eager():
    """Sinks and soft caps: with stock SDPA transformers would refuse them, or compute something else."""
    for model_type in ("gpt_oss", "gemma2"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **{**MIXED, "num_hidden_layers": 4}))
        assert f"eager, all that {model_type} has" in bind_attention(model.train(), AttentionConfig("full"), 64)
        assert bind_inference_attention(model) == "dense causal (eager)" and model(IDS).logits.isfinite().all()


def test_a_binding_is_of_its_model_alone_and_unbinding_restores_stock():
    model, other = make().train(), make().train()
    stock = model(input_ids=IDS).logits
    bind_attention(model, S2, 64)
    ours = model(input_ids=IDS).logits
    bind_attention(other, S2, 32)
    assert torch.equal(model(input_ids=IDS).logits, ours)
    assert not torch.allclose(other(input_ids=IDS).logits, ours)
    unbind_attention(model)
    assert torch.equal(model(input_ids=IDS).logits, stock)
    assert "full" in bind_attention(model, AttentionConfig("full"), 64)
    assert torch.equal(model(input_ids=IDS).logits, stock)
    windowed = make("mistral", sliding_window=8)
    bind_attention(windowed, AttentionConfig("full"), 64, is_packed=True)
    assert windowed.config._attn_implementation == "sdpa", "packed rows under windows keep the stock attention"


def test_generation_under_the_binding_equals_stock():
    model = make().eval()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 3, "eos_token_id": None}
    stock = model.generate(IDS, attention_mask=LEFT.flip(0), **options)
    bind_attention(model, S2, 64)
    assert torch.equal(model.generate(IDS, attention_mask=LEFT.flip(0), **options), stock)


USES_WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
REFUSED = [
    (
        "mistral",
        {"sliding_window": 16},
        64,
        r"mistral has sliding-window layers alone \(of 16 tokens\).*attention: full",
    ),
    ("qwen2", USES_WINDOWS, 64, "qwen2 has sliding-window layers alone"),
    ("gemma2", {}, 64, "gemma2 has attention that torch's SDPA does not compute"),
    ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}, 64, "odd number"),
    ("llama", {}, 4, "group"),
]


@pytest.mark.parametrize("model_type,shape,length,message", REFUSED)
def test_refusals_name_what_is_wrong(model_type, shape, length, message):
    with pytest.raises(ValueError, match=message):
        bind_attention(make(model_type, **shape), S2, length)


def test_flash_attn_is_imported_when_asked_for_and_agrees(monkeypatch):
    """The package itself needs a GPU; a stand-in with its signature and layout checks how it is called."""

    def flash_attn_func(*inputs, dropout_p, softmax_scale, causal):
        assert causal and dropout_p == 0.0
        return causal_attention(*(x.transpose(1, 2) for x in inputs), scaling=softmax_scale).transpose(1, 2)

    model = make().train()
    bind_attention(model, S2, 64)
    expected = model(input_ids=IDS).logits
    assert "flash_attn" not in sys.modules
    for attention in ("s2", "full"):
        with pytest.raises(ValueError, match="flash-attn package is not installed"):
            bind_attention(model, AttentionConfig(attention, use_flash_attn=True), 64)
    stand_in = SimpleNamespace(__spec__=SimpleNamespace(name="flash_attn"), flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    bind_attention(model, AttentionConfig(use_flash_attn=True), 64)
    assert model.config._attn_implementation == "s2_fa_g16"
    assert_close(model(input_ids=IDS).logits, expected)
