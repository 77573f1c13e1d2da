"""RoPE scaling: the formula, idempotence, and stock transformers reading what we write."""

import math

import pytest
import torch
from conftest import tiny_config
from model_folders import extended
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longqlora.model.context import ContextRequest, context_length, extend_rope, rope_of
from longqlora.model.rope_scaling import ROPE_METHODS, Rope, scale_rope
from longqlora.model.saved_folder import save_config

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
every_method = pytest.mark.parametrize("rope_type", list(ROPE_METHODS))


def decide(target, parameters=DEFAULT, length=64, original=None, **options):
    return scale_rope(Rope(parameters, length, original), target, rotary_dim=16, **options)


def cos_sin(config, positions):
    return LlamaRotaryEmbedding(config)(torch.zeros(1, 1, 1), positions[None])


def facts(config):
    return dict(config.rope_parameters), config.max_position_embeddings, context_length(config)


LINEAR_X2 = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LINEAR_X8 = {**LINEAR_X2, "factor": 8.0}  # of LongLoRA's models, whose max_position_embeddings stayed 4096
YARN_X4 = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA_31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
LISTS = {"short_factor": [1.0] * 8, "long_factor": [1.0, 1.1, 1.5, 2.0, 4.0, 9.0, 20.0, 40.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, **LISTS}  # Phi-3's
OLMO_3 = {**YARN_X4, "factor": 8.0, "attention_factor": 1.2079441541679836, "original_max_position_embeddings": 8192}
PARTIAL = {**DEFAULT, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("parameters", "length", "original", "targets"),
    [
        (PARTIAL, 64, 64, {1: {}, 63: {}, 64: {}}),
        (PARTIAL, 64, 64, {n: {"rope_type": "linear", "factor": -(-n // 64)} for n in (65, 128, 129, 256, 1000)}),
        (LINEAR_X8, 4096, 4096, {8192: {}, 32768: {}, 65536: {"factor": 16}}),
        ({**YARN_X4, "beta_fast": 16}, 131072, 32768, {262144: {"factor": 8.0}}),
        (LLAMA_31, 131072, 8192, {262144: {"factor": 32.0}}),
        (LONGROPE, 131072, 4096, {131072: {}, 262144: {"factor": 64.0}}),
        ({**PARTIAL, "rope_type": "proportional"}, 64, 64, {128: {"factor": 2.0}}),
        ({**YARN_X4, "attention_factor": 1.5}, 131072, 32768, {262144: {"factor": 8.0}}),
    ],
)
def test_what_a_target_changes(parameters, length, original, targets):
    """Nothing within the present context; further by the present method, from the original length, in whole factors."""
    for target, changes in targets.items():
        scaled = decide(target, parameters, length=length)
        assert scaled.rope_parameters == {**parameters, **changes} and scaled.original_length == original
        assert scaled.context_length == max(target, Rope(parameters, length).context_length)
        assert (scaled.max_position_embeddings == length) == (not changes)


def test_yarns_attention_factor_follows_the_factor_where_it_did():
    scaled = decide(131072, OLMO_3, length=65536).rope_parameters
    assert scaled["factor"] == 16.0 and "attention_factor" not in scaled


BY_KIND = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16, "sliding_window": 8}


@pytest.mark.parametrize("rope_type", [None, "yarn", "ntk"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo3"])
def test_only_full_attention_is_scaled_where_rope_differs_by_kind_of_layer(model_type, rope_type, tmp_path):
    config = tiny_config(model_type, **BY_KIND)
    plain, theta = (
        AutoModelForCausalLM.from_config(config).model.rotary_emb,
        rope_of(config).rope_parameters["rope_theta"],
    )
    extended(config, 256, rope_type)
    save_config(config, tmp_path)
    for read in (config, AutoConfig.from_pretrained(tmp_path)):
        rotary = AutoModelForCausalLM.from_config(read).model.rotary_emb
        assert context_length(read) == 256 and rope_of(read).original_length == 64
        assert torch.equal(rotary.sliding_attention_inv_freq, plain.sliding_attention_inv_freq)
        expected, _ = expected_inv_freq(rope_type or "linear", 4.0, theta=theta, dim=16, original=64, num_tokens=256)
        assert rotary.full_attention_inv_freq.tolist() == pytest.approx(expected, rel=1e-4)
        assert rope_of(extended(read, 512, rope_type)).original_length == 64


@pytest.mark.parametrize("model_type", ["cohere2", "exaone4"])
def test_rope_that_windows_alone_have_stays(model_type):
    config = tiny_config(model_type, **BY_KIND)
    before = dict(config.rope_parameters)
    assert "sliding windows only" in extend_rope(config, 256)
    assert config.rope_parameters == before and context_length(config) == 256
    assert context_length(extended(tiny_config(model_type, **BY_KIND), 256, "yarn")) == 256


def test_longrope_goes_on_with_its_lists(tmp_path):
    config = tiny_config("phi3", rope_parameters=dict(LONGROPE), max_position_embeddings=131072)
    extended(config, 262144)
    save_config(config, tmp_path)
    for read in (config, AutoConfig.from_pretrained(tmp_path)):
        rotary = AutoModelForCausalLM.from_config(read).model.rotary_emb
        assert context_length(read) == 262144
        assert rotary.attention_scaling == pytest.approx(math.sqrt(1 + math.log(64) / math.log(4096)))


def test_a_base_of_the_users_choice_holds_within_the_context_too():
    config = extended(tiny_config(), 64, "theta")
    assert config.rope_parameters["rope_theta"] == 5e5 and context_length(config) == 64


def expected_inv_freq(rope_type, s, *, theta, dim, original, num_tokens):
    """Frequencies and cos/sin factor by the published formulas, in float64, dimension by dimension."""
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if rope_type == "linear":
        return [f / s for f in plain], 1.0
    if rope_type in ("ntk", "dynamic"):
        grown = s if rope_type == "ntk" else s * num_tokens / original - (s - 1)
        return [(theta * grown ** (dim / (dim - 2))) ** (-2 * i / dim) for i in range(dim // 2)], 1.0
    if rope_type == "theta":
        return [5e5 ** (-2 * i / dim) for i in range(dim // 2)], 1.0
    if rope_type == "yarn":
        # YaRN, section 3.2: ramp between the dimensions that turn 32 times and once within the original length.
        def dimension(turns):
            return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

        low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), dim - 1)
        kept = [1 - min(max((i - low) / (high - low), 0), 1) for i in range(dim // 2)]
        mixed = [k * f + (1 - k) * f / s for k, f in zip(kept, plain, strict=True)]
        return mixed, 0.1 * math.log(s) + 1
    out = []
    for f in plain:
        wavelength = 2 * math.pi / f
        smooth = min(max((original / wavelength - 1) / (4 - 1), 0), 1)
        out.append((1 - smooth) * f / s + smooth * f)
    return out, 1.0


@pytest.mark.parametrize("target", [128, 200, 512])
@every_method
def test_stock_cos_sin_follow_the_formula(rope_type, target):
    config = extended(tiny_config(head_dim=32), target, rope_type)
    s = float(-(-target // 64)) if rope_type == "linear" else target / 64
    frequencies, factor = expected_inv_freq(rope_type, s, theta=1e4, dim=32, original=64, num_tokens=target)
    positions = torch.arange(target)
    angles = positions[:, None].double() * torch.tensor(frequencies, dtype=torch.float64)
    angles = torch.cat((angles, angles), dim=-1)
    # float32 angles of up to 500 radians carry errors of some 3e-5.
    for found, expected in zip(cos_sin(config, positions), (angles.cos(), angles.sin()), strict=True):
        assert torch.allclose(found[0].double(), expected * factor, atol=2e-4)


def test_dynamic_leaves_short_inputs_alone():
    config = extended(tiny_config(), 256, "dynamic")
    assert config.max_position_embeddings == 64 and context_length(config) == 256
    pairs = zip(cos_sin(config, torch.arange(64)), cos_sin(tiny_config(), torch.arange(64)), strict=True)
    assert all(torch.equal(found, expected) for found, expected in pairs)


def test_ntk_interpolates_the_slowest_pair_by_s_and_keeps_the_fastest():
    """Of a head of which a quarter is rotated."""
    config = tiny_config("gpt_neox", hidden_size=128)
    plain = GPTNeoXRotaryEmbedding(config).inv_freq
    ratio = plain / GPTNeoXRotaryEmbedding(extended(config, 4 * 64, "ntk")).inv_freq
    assert len(ratio) == 4 and ratio[0] == 1 and ratio[-1].item() == pytest.approx(4, rel=1e-5)


@every_method
def test_extending_further_starts_from_the_original(rope_type):
    twice, once = extended(extended(tiny_config(), 128, rope_type), 512, rope_type), tiny_config()
    assert facts(twice) == facts(extended(once, 512, rope_type)) and context_length(twice) == 512
    assert facts(extended(once, 512, rope_type)) == facts(twice), "twice is once"
    assert (twice.original_max_position_embeddings, twice.original_rope_theta) == (64, 10000.0)


def test_a_method_on_top_of_another_is_refused():
    for first, second in [("ntk", "linear"), ("linear", "yarn"), ("theta", "dynamic"), ("yarn", "ntk")]:
        config = extended(tiny_config(), 128, first)
        for target in (128, 256):
            with pytest.raises(ValueError, match="already scaled .* not go on top; .*, or use attention: dca"):
                extend_rope(config, target, second)
    for rope_type in ("llama3", "yarn", "dynamic", "longrope"):
        with pytest.raises(ValueError, match=rope_type):
            decide(256, {**LINEAR_X2, "rope_type": rope_type}, rope_type="linear")
    with pytest.raises(ValueError, match="already interpolated"):
        decide(16384, LINEAR_X8, length=8192, original=4096)


def test_requests_that_are_refused():
    """tests/script/test_bad_inputs.py has what a YAML can get wrong."""
    for values, text in (
        ({"rope_type": "theta", "rope_theta": float("nan")}, "finite"),
        ({"rope_type": "linear", "rope_theta": 5e5}, "rope_type: theta"),
        ({"context_size": 0}, "context_size"),
    ):
        with pytest.raises(ValueError, match=text):
            ContextRequest(**values)


CONFIGS = {
    "unscaled": ({}, 4096, 4096),
    "LongLoRA, LongChat, LongQLoRA's releases": ({"rope_parameters": LINEAR_X2}, 4096, 8192),
    "saved here": ({"rope_parameters": LINEAR_X2, "original_max_position_embeddings": 4096}, 8192, 8192),
    "dynamic": ({"rope_parameters": {**LINEAR_X2, "rope_type": "dynamic"}}, 4096, 8192),
    "Qwen2.5 with YaRN": ({"rope_parameters": YARN_X4}, 32768, 131072),
    "Qwen3 with YaRN": ({"rope_parameters": YARN_X4}, 40960, 131072),
    "YaRN, the length reached": ({"rope_parameters": YARN_X4}, 131072, 131072),
    "Llama 3.1": ({"rope_parameters": LLAMA_31}, 131072, 131072),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_how_far_a_config_reads(name):
    values, length, expected = CONFIGS[name]
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    config = tiny_config(max_position_embeddings=length, **values)
    assert context_length(config) == expected
    assert "unchanged" in extend_rope(config, expected) and config.max_position_embeddings == length


@pytest.mark.parametrize("rope_type", ["yarn", "dynamic"])
def test_a_config_without_head_dim_makes_a_model(rope_type):
    config = extended(tiny_config("mixtral", head_dim=None), 128, rope_type)
    assert len(LlamaRotaryEmbedding(config).inv_freq) == 8


def test_models_whose_rope_cannot_be_scaled_are_named_before_training():
    with pytest.raises(ValueError, match="rope_type: phi3 takes no RoPE of type linear .*longrope"):
        extend_rope(tiny_config("phi3"), 128)
    with pytest.raises(ValueError, match="gpt2"):
        extend_rope(AutoConfig.for_model("gpt2", n_positions=64), 128)
