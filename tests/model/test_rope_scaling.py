"""RoPE scaling: the formula, idempotence, and stock transformers reading what we write."""

import math

import pytest
import torch
from conftest import tiny_config
from transformers import AutoConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longqlora.model.context import context_length, extend_rope
from longqlora.model.rope_scaling import ROPE_METHODS, Rope, scale_rope

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


def decide(target, parameters=DEFAULT, length=64, original=None, **options):
    return scale_rope(Rope(parameters, length, original), target, rotary_dim=16, **options)


def cos_sin(config, positions):
    states = torch.zeros(1, 1, 1, dtype=torch.float32)
    return LlamaRotaryEmbedding(config)(states, positions[None])


@pytest.mark.parametrize("target,factor", [(65, 2), (128, 2), (129, 3), (256, 4), (1000, 16)])
def test_factor_is_rounded_up(target, factor):
    decision = decide(target)
    assert decision.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": factor}
    assert (decision.original_max_position_embeddings, decision.max_position_embeddings) == (64, target)


@pytest.mark.parametrize("target", [1, 63, 64])
def test_a_target_within_the_context_changes_nothing(target):
    assert decide(target).rope_parameters == DEFAULT and decide(target).max_position_embeddings == 64


def test_cos_sin_equal_stock_at_interpolated_positions():
    config = tiny_config()
    positions = torch.arange(0, 256, 4)
    plain = cos_sin(config, positions // 4)
    extend_rope(config, 256)
    for ours, theirs in zip(cos_sin(config, positions), plain, strict=True):
        assert torch.equal(ours, theirs)


MODEL_TYPES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gpt_neox"]


@pytest.mark.parametrize("rope_type", list(ROPE_METHODS))
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_twice_is_once_and_saving_keeps_it(tmp_path, model_type, rope_type):
    theta = 5e5 if rope_type == "theta" else None
    config = tiny_config(model_type)
    extend_rope(config, 200, rope_type, theta)
    once = (dict(config.rope_parameters), config.max_position_embeddings, context_length(config))
    extend_rope(config, 200, rope_type, theta)
    assert (config.rope_parameters, config.max_position_embeddings, context_length(config)) == once
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.rope_parameters == once[0] and loaded.original_max_position_embeddings == 64
    assert context_length(loaded) == 200
    extend_rope(loaded, 200, rope_type, theta)
    assert (loaded.rope_parameters, loaded.max_position_embeddings, context_length(loaded)) == once


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
@pytest.mark.parametrize("rope_type", list(ROPE_METHODS))
def test_stock_cos_sin_follow_the_formula(rope_type, target):
    config = tiny_config(head_dim=32)
    extend_rope(config, target, rope_type, 5e5 if rope_type == "theta" else None)
    s = float(-(-target // 64)) if rope_type == "linear" else target / 64
    frequencies, factor = expected_inv_freq(rope_type, s, theta=1e4, dim=32, original=64, num_tokens=target)
    positions = torch.arange(target)
    angles = positions[:, None].double() * torch.tensor(frequencies, dtype=torch.float64)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = cos_sin(config, positions)
    # float32 angles of up to 500 radians carry errors of some 3e-5.
    assert torch.allclose(cos[0].double(), angles.cos() * factor, atol=2e-4)
    assert torch.allclose(sin[0].double(), angles.sin() * factor, atol=2e-4)


def test_ntk_interpolates_the_slowest_pair_by_s_and_keeps_the_fastest():
    config = tiny_config(head_dim=32)
    plain = LlamaRotaryEmbedding(config).inv_freq
    extend_rope(config, 4 * 64, "ntk")
    ratio = plain / LlamaRotaryEmbedding(config).inv_freq
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(4, rel=1e-5)


def test_ntk_counts_rotated_dimensions_only():
    config = tiny_config("gpt_neox", hidden_size=128)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    plain = GPTNeoXRotaryEmbedding(config).inv_freq
    extend_rope(config, 4 * 64, "ntk")
    ratio = plain / GPTNeoXRotaryEmbedding(config).inv_freq
    assert len(ratio) == 4 and ratio[0] == 1 and ratio[-1].item() == pytest.approx(4, rel=1e-5)


def test_theta_is_set_within_the_context_too():
    config = tiny_config()
    extend_rope(config, 64, "theta", 5e5)
    assert config.rope_parameters["rope_theta"] == 5e5 and context_length(config) == 64


def test_dynamic_leaves_short_inputs_alone():
    config = tiny_config()
    plain = cos_sin(config, torch.arange(64))
    extend_rope(config, 256, "dynamic")
    assert config.max_position_embeddings == 64 and context_length(config) == 256
    for ours, theirs in zip(cos_sin(config, torch.arange(64)), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rope_type", list(ROPE_METHODS))
def test_extending_further_starts_from_the_original(rope_type):
    theta = 5e5 if rope_type == "theta" else None
    twice, once = tiny_config(), tiny_config()
    extend_rope(twice, 128, rope_type, theta)
    extend_rope(twice, 512, rope_type, theta)
    extend_rope(once, 512, rope_type, theta)
    assert twice.rope_parameters == once.rope_parameters and context_length(twice) == context_length(once) == 512
    assert (twice.original_max_position_embeddings, twice.original_rope_theta) == (64, 10000.0)


def test_a_method_on_top_of_another_is_refused():
    for first, second in [("ntk", "linear"), ("linear", "yarn"), ("theta", "dynamic"), ("yarn", "ntk")]:
        config = tiny_config()
        extend_rope(config, 128, first, 5e5 if first == "theta" else None)
        with pytest.raises(ValueError, match="already scaled"):
            extend_rope(config, 256, second)
        with pytest.raises(ValueError, match="already scaled"):
            extend_rope(config, 128, second)


def test_llama31_goes_further_by_its_own_method():
    native = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}  # fmt: skip
    decision = decide(262144, native, length=131072)
    assert decision.rope_parameters == {**native, "factor": 32.0} and decision.context_length == 262144
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 16,
            "original_max_position_embeddings": 64}  # fmt: skip
    assert decide(512, yarn, length=256).rope_parameters == {**yarn, "factor": 8.0}


@pytest.mark.parametrize(
    "options,text",
    [
        ({"rope_type": "theta"}, "rope_theta"),
        ({"rope_theta": 5e5}, "rope_type: theta"),
        ({"rope_type": "theta", "rope_theta": float("nan")}, "finite"),
        ({"rope_type": "theta", "rope_theta": 0.5}, "above 1"),
        ({"rope_type": "linear", "rope_theta": 5e5}, "rope_type: theta"),
    ],
)
def test_contradicting_requests(options, text):
    with pytest.raises(ValueError, match=text):
        decide(128, **options)


def test_a_released_config_that_kept_its_old_length():
    """LongLoRA's models say factor 8 and max_position_embeddings 4096."""
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}
    for target in (8192, 32768):
        assert decide(target, linear, length=4096).context_length == 32768
    further = decide(65536, linear, length=4096)
    assert (further.rope_parameters["factor"], further.original_max_position_embeddings) == (16, 4096)
    with pytest.raises(ValueError, match="already interpolated"):
        decide(16384, linear, length=8192, original=4096)


LINEAR_X2 = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN_X4 = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA_31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
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
    config = tiny_config("mixtral", head_dim=None)
    extend_rope(config, 128, rope_type)
    assert len(LlamaRotaryEmbedding(config).inv_freq) == 8


def test_a_model_that_has_a_scaling_of_its_own_is_refused_before_it_is_trained():
    with pytest.raises(ValueError, match="rope_type: phi3 takes no RoPE of type linear .*longrope"):
        extend_rope(tiny_config("phi3"), 128)


@pytest.mark.parametrize("rope_type", ["llama3", "yarn", "dynamic", "longrope"])
def test_refuses_to_compose_methods(rope_type):
    with pytest.raises(ValueError, match=rope_type):
        decide(256, {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}, rope_type="linear")


def test_keeps_a_partial_rotary_factor():
    assert decide(128, {**DEFAULT, "partial_rotary_factor": 0.5}).rope_parameters["partial_rotary_factor"] == 0.5


def test_unknown_method_and_bad_length():
    with pytest.raises(ValueError, match="rope_type"):
        decide(128, rope_type="magic")
    with pytest.raises(ValueError, match="model_max_length"):
        decide(0)


def test_no_rope_is_refused_by_name():
    with pytest.raises(ValueError, match="gpt2"):
        extend_rope(AutoConfig.for_model("gpt2", n_positions=64), 128)
