"""What transformers must keep for the bindings to work, and does not promise: a failure here names what has changed."""

import inspect

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel, masking_utils

from longqlora.attention.model_internals import (
    attention_layers,
    attention_name,
    rotary_embedding,
    uses_attention_interface,
)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_config(tiny_config())


def test_names_of_the_attention_interface(model):
    assert hasattr(PreTrainedModel, "_supports_attention_backend"), "transformers no longer says who uses its interface"
    assert uses_attention_interface(model), "transformers says otherwise than by True that Llama uses its interface"
    falcon = AutoModelForCausalLM.from_config(tiny_config("falcon"))
    assert not uses_attention_interface(falcon), "transformers' Falcon uses the interface now; take another type"
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert attention_name(model.config) == name, "transformers keeps the name of the attention elsewhere"


def test_parts_of_a_decoder(model):
    layers = attention_layers(model)
    assert [layer.layer_idx for layer in layers] == [0, 1], "attention modules have no layer_idx any more"
    assert all(layer.scaling > 0 for layer in layers), "attention modules have no scaling any more"
    rotary, calls = rotary_embedding(model), []
    handle = rotary.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
    model(torch.arange(5)[None])
    handle.remove()
    given = [*calls[0][1], *calls[0][2]]
    assert "position_ids" in given or len(given) == 2, "RoPE is not called with position_ids as second argument"
    with pytest.raises(ValueError, match="no rotary position embeddings"):
        rotary_embedding(AutoModelForCausalLM.from_config(tiny_config("gpt2", n_embd=64, n_head=4)))


def test_arguments_of_mask_functions():
    ours = {"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask", "device"}
    known = inspect.signature(masking_utils.sdpa_mask).parameters.keys()
    assert ours | {"use_vmap"} <= known, f"transformers' mask functions no longer take {ours - known}"
    rows, positions = torch.arange(2)[:, None], torch.arange(4)[None]
    sees = masking_utils.causal_mask_function(rows, rows, positions, positions)
    assert sees.all() and sees.dtype == torch.bool, "transformers' mask_function does not take index tensors any more"
