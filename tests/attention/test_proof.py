"""What a binding shows before it is used: it equals stock transformers, or is refused by name, and leaves no trace."""

import copy

import pytest
import torch
from attention_reference import assert_close, logits_and_gradients
from conftest import save_tiny_model, tiny_config
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from longqlora.attention.binding import bind_attention, bind_inference_attention
from longqlora.attention.proof import tiny_copy
from longqlora.memory.layer_binding import apply_policy
from longqlora.memory.policy import POLICIES
from longqlora.model.adapter import attach_adapter
from longqlora.model.base import load_config, load_model
from longqlora.model.context import ContextRequest, apply_context
from longqlora.settings.config import AdapterConfig, AttentionConfig

CHUNK, CPU = 24, torch.device("cpu")
DCA = ContextRequest(64, None, None, "dca", pretraining_length=32, dca_chunk_size=CHUNK, dca_local_window=12)
ALL_FULL = {"layer_types": ["full_attention"] * 2}
CHOOSING = {
    "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 2, "layer_types": ["minimax_m3_sparse"] * 2,
}  # fmt: skip
MAMBA = {"hidden_size": 512, "num_attention_heads": 8, "mamba_n_heads": 16, "mamba_d_head": 64}


def make(model_type="llama", **overrides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from uniform attention.
            parameter.mul_(8) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize("model_type", ["llama", "ernie4_5", "glm4", "deepseek_v3", "cohere", "smollm3", "helium"])
def test_dual_chunk_attention_is_dense_up_to_the_chunk_size(model_type):
    """Within chunk_size all distances are exact, though the second chunk's queries are rotated once more."""
    model = make(model_type)
    apply_context(model.config, DCA)
    model.set_attn_implementation("eager")
    ids = torch.randint(4, 320, (2, CHUNK))
    expected = logits_and_gradients(model, ids)
    bind_inference_attention(model)
    for ours, stock in zip(logits_and_gradients(model, ids), expected, strict=True):
        assert_close(ours, stock, 1e-4)


@pytest.mark.parametrize("model_type,overrides", [("gpt_oss", ALL_FULL), ("minimax_m3_vl_text", CHOOSING)])
def test_full_attention_to_padded_rows_is_stock_where_ours_differs(monkeypatch, model_type, overrides):
    model = make(model_type, **overrides)
    monkeypatch.setattr(type(model), "_supports_sdpa", True)
    bind_attention(model, AttentionConfig("full"), 64)
    assert model.config._attn_implementation == "sdpa"


REFUSED = {
    "norm behind RoPE": ("hunyuan_v1_dense", {}, "dca", "positions enter its attention.*use attention: full"),
    "sinks": ("gpt_oss", ALL_FULL, "s2", "differs from the stock model by .*use attention: full"),
    "soft cap": ("gemma2", ALL_FULL, "s2", "softcap.*use attention: full"),
    "a convolution across documents": (
        "lfm2", {"layer_types": ["conv", "full_attention"]}, "pack", "differs from the stock model by .*set pack: false"
    ),
    "a choice of keys": ("minimax_m3_vl_text", CHOOSING, "pack", "differs from the stock model by .*set pack: false"),
    "a mask of its own": ("falcon", {}, "pack", "differs from the stock model by .*set pack: false"),
}  # fmt: skip


@pytest.mark.parametrize("model_type,overrides,attention,words", REFUSED.values(), ids=REFUSED)
def test_what_differs_is_refused_by_name(model_type, overrides, attention, words, monkeypatch):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides))
    # Two of these say themselves that SDPA does not do; the proof does not lean on it.
    monkeypatch.setattr(type(model), "_supports_sdpa", True)
    if attention == "dca":
        apply_context(model.config, DCA)
    config = AttentionConfig(attention="full" if attention == "pack" else attention)
    with pytest.raises(ValueError, match=f"does not suit {model_type}: .*{words}"):
        bind_attention(model, config, 64, is_packed=attention == "pack")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_layers_that_the_layer_function_does_not_know_are_refused(monkeypatch, kind):
    def bind():
        apply_policy(attach_adapter(make(), AdapterConfig(kind, lora_rank=4)), POLICIES["balanced"], CPU)

    bind()
    stock = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 0.9 * stock(self, x))
    with pytest.raises(ValueError, match="layer_function does not suit llama: .*set layer_function: false"):
        bind()


@pytest.mark.parametrize("num_heads", [1, 2])
def test_a_few_large_heads_are_not_refused_for_rounding(num_heads):
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": 1, "hidden_size": 64 * num_heads}
    model = attach_adapter(make(num_hidden_layers=4, **heads), AdapterConfig("lora", train_norm=True))
    apply_policy(model, POLICIES["max_length"], CPU)


ENCODER = {"hidden_size": 64, "num_attention_heads": 2, "nemo_conv_channels": 16, "image_size": 56}
UNUSUAL = [
    ("dbrx", {"d_model": 512, "attn_config": {"kv_n_heads": 8, "rope_theta": 1e4, "clip_qkv": 8.0}}),
    ("phi4_multimodal", {"vision_config": {**ENCODER, "crop_size": 56}, "audio_config": ENCODER}),
    ("falcon", {"num_attention_heads": 16, "num_kv_heads": 8, "new_decoder_architecture": True}),
    ("falcon", {"num_attention_heads": 16, "multi_query": False, "alibi": True}),
    ("bamba", MAMBA),
    ("granitemoehybrid", {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0}),
    ("gemma3n_text", {"vocab_size_per_layer_input": 2**18, "num_kv_shared_layers": 0}),
]


@pytest.mark.parametrize("model_type,overrides", UNUSUAL)
def test_the_copy_of_a_model_is_small_and_computes(model_type, overrides):
    with torch.device("meta"):
        small = tiny_copy(AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)))
    assert small(torch.arange(3, 9)[None], use_cache=False).logits.isfinite().all()
    sizes = [p.numel() for p in small.parameters()]
    assert max(sizes) < 2**20 and sum(sizes) < 2**22


def test_a_model_without_a_copy_is_refused_by_name(monkeypatch):
    model = make()
    monkeypatch.setattr(type(model), "__init__", lambda self, config: 1 / 0)
    with pytest.raises(ValueError, match="model_name_or_path: .* llama: ZeroDivisionError: .*another model"):
        tiny_copy(model)


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["plain", "nf4"])
def test_a_proof_leaves_no_trace(load_in_4bit, tmp_path, tiny_tokenizer):
    folder = str(save_tiny_model(tmp_path / "model", tiny_tokenizer))
    config = load_config(folder)
    apply_context(config, DCA)
    model = load_model(folder, config, dtype=torch.float32, load_in_4bit=load_in_4bit, device=CPU).train()
    model = attach_adapter(model, AdapterConfig("qlora" if load_in_4bit else "lora", lora_rank=4))
    before, random_state = copy.deepcopy(model), torch.get_rng_state()
    for attention in ("s2", "full", "dca"):
        bind_attention(model.get_base_model(), AttentionConfig(attention=attention), 64, is_packed=True)
    apply_policy(model, POLICIES["balanced"], CPU)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [x.training for x in model.modules()] == [x.training for x in before.modules()]
    tensors, same = ({**x.state_dict(keep_vars=True), **dict(x.named_buffers())} for x in (model, before))
    assert tensors.keys() == same.keys()
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, same[name]) and x.requires_grad == same[name].requires_grad and x.grad is None
    # The matrices B are 0 still, so the loss through all that was bound is the plain model's.
    ids = torch.randint(4, 320, (1, CHUNK))
    ours, plain = (x(input_ids=ids, use_cache=False).logits for x in (model, before))
    assert_close(ours, plain, 1e-4)
