"""RoPE scaling: the formula, idempotence, and stock transformers reading what we write."""

import pytest
import torch
from conftest import tiny_config
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from component.model import extend_context
from component.rope_scaling import scale_rope

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


def decide(target, parameters=DEFAULT, length=64, original=None):
    return scale_rope(
        parameters, max_position_embeddings=length, original_max_position_embeddings=original, model_max_length=target
    )


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
    extend_context(config, 256)
    for ours, theirs in zip(cos_sin(config, positions), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_twice_is_once_and_saving_keeps_it(tmp_path, model_type):
    config = tiny_config(model_type)
    extend_context(config, 200)
    once = (dict(config.rope_parameters), config.max_position_embeddings)
    extend_context(config, 200)
    assert (config.rope_parameters, config.max_position_embeddings) == once
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.rope_parameters == once[0] and loaded.original_max_position_embeddings == 64
    extend_context(loaded, 200)
    assert (loaded.rope_parameters, loaded.max_position_embeddings) == once


def test_extending_further_starts_from_the_original_length():
    config = tiny_config()
    extend_context(config, 128)
    extend_context(config, 512)
    assert config.rope_parameters["factor"] == 8 and config.original_max_position_embeddings == 64


def test_a_released_config_that_kept_its_old_length():
    """LongLoRA's models say factor 8 and max_position_embeddings 4096."""
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}
    assert decide(32768, linear, length=4096).rope_parameters["factor"] == 8
    with pytest.raises(ValueError, match="original_max_position_embeddings"):
        decide(8192, linear, length=4096)


@pytest.mark.parametrize("rope_type", ["llama3", "yarn", "dynamic", "longrope"])
def test_refuses_to_compose_methods(rope_type):
    with pytest.raises(ValueError, match=rope_type):
        decide(128, {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0})


def test_keeps_a_partial_rotary_factor():
    assert decide(128, {**DEFAULT, "partial_rotary_factor": 0.5}).rope_parameters["partial_rotary_factor"] == 0.5


def test_unknown_method_and_bad_length():
    with pytest.raises(ValueError, match="rope_type"):
        scale_rope(
            DEFAULT,
            max_position_embeddings=8,
            original_max_position_embeddings=None,
            model_max_length=9,
            rope_type="magic",
        )
    with pytest.raises(ValueError, match="model_max_length"):
        decide(0)


def test_no_rope_is_refused_by_name():
    with pytest.raises(ValueError, match="gpt2"):
        extend_context(AutoConfig.for_model("gpt2", n_positions=64), 128)
