"""Dual chunk attention inside whole models, against a dense float64 reference that knows only relative positions.

The reference runs the same model with RoPE switched off and an attention function of its own, which rotates each
query-key pair by its distance. RoPE is in float64 in both, so that 1e-10 can be asked; stock RoPE computes its angles
in float32.
"""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
from attention_reference import assert_close, dual_chunk_reference, logits_and_gradients, logits_in_blocks
from conftest import tiny_config
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from longqlora.attention.binding import bind_dual_chunk_attention, bind_inference_attention, unbind_attention
from longqlora.attention.dual_chunk import DualChunkSizes
from longqlora.attention.dual_chunk_binding import dual_chunk_sizes
from longqlora.attention.model_internals import attention_layers
from longqlora.evaluation.perplexity_task import TokenScorer
from longqlora.inference.source import read_source
from longqlora.model.context import ContextRequest, apply_context, context_length

PRETRAINING = 16  # chunk 12, window 2, so chunks of 10 tokens
# The last three: adjacent dimensions are pairs, in all of a head or in half of it, and layers without RoPE.
MODEL_TYPES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gpt_neox", "ernie4_5", "glm4", "smollm3"]
DCA = ContextRequest(attention="dca", pretraining_length=PRETRAINING, context_size=64)


def reference_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """query [B, H, S, D], not rotated; rows have no padding."""
    inv_freq, num_rotated = module.inv_freq, 2 * len(module.inv_freq)
    if module.is_interleaved:
        order = [*range(0, num_rotated, 2), *range(1, num_rotated, 2), *range(num_rotated, query.shape[-1])]
        query, key = query[..., order], key[..., order]
    sizes, frequencies = DualChunkSizes(PRETRAINING), inv_freq * getattr(module, "use_rope", 1)
    return dual_chunk_reference(query, key, value, sizes, frequencies, scaling).transpose(1, 2), None


def make_pair(model_type="llama", request=DCA, **overrides):
    """(the model with dual chunk attention, the same weights as the reference), both float64 and in eval mode."""
    config = tiny_config(model_type, **{"max_position_embeddings": PRETRAINING, **overrides})
    torch.manual_seed(0)
    apply_context(config, request)
    ours = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    if model_type == "mixtral":
        ours.set_experts_implementation("eager")  # the grouped kernel knows no float64
    reference = copy.deepcopy(ours)
    bind_inference_attention(ours)
    rotary = ours.get_decoder().rotary_emb
    inv_freq = rotary.inv_freq = rotary.inv_freq.double()

    def forward(states, position_ids, speed=1):
        angles = (position_ids[..., None].double() * inv_freq * speed).repeat(1, 1, 2)
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    rotary.forward, reference.get_decoder().rotary_emb.forward = forward, partial(forward, speed=0)
    for module in attention_layers(reference):
        module.inv_freq, module.is_interleaved = inv_freq, model_type in ("ernie4_5", "glm4")
    AttentionInterface.register("dense_reference", reference_attention)
    AttentionMaskInterface.register("dense_reference", lambda **kwargs: None)
    reference.set_attn_implementation("dense_reference")
    return ours, reference


def ids_of(num_tokens, batch=1, seed=0):
    return torch.randint(4, 320, (batch, num_tokens), generator=torch.Generator().manual_seed(seed))


CASES = {name: (name, {}) for name in MODEL_TYPES} | {
    # Twelve tokens extended to those that count as pretraining.
    rope_type: ("llama", {
        "request": dataclasses.replace(DCA, rope_type=rope_type, rope_theta=5e5 if rope_type == "theta" else None),
        "max_position_embeddings": 12,
    })
    for rope_type in ("linear", "ntk", "yarn", "llama3", "theta", "dynamic")
}  # fmt: skip


@pytest.mark.parametrize("model_type,given", CASES.values(), ids=CASES)
@torch.no_grad()
def test_prefill_and_decode_equal_the_dense_reference(model_type, given):
    ours, reference = make_pair(model_type, **given)
    assert context_length(ours.config) == 64
    ids = ids_of(57, batch=2)
    expected = reference(ids).logits
    assert_close(ours(ids).logits, expected)
    # A prefill across chunk borders, single tokens, and blocks that begin and end within chunks.
    assert_close(logits_in_blocks(ours, ids, [23, 24, 25, 38, 39]), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@torch.no_grad()
def test_padded_batches_equal_single_rows(model_type, side):
    ours, _ = make_pair(model_type)
    rows = [ids_of(length, seed=length) for length in (41, 10, 27, 1)]
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    ids, mask = pad([row[0] for row in rows], padding_value=3), pad([torch.ones_like(row[0]) for row in rows])
    logits = ours(ids, attention_mask=mask).logits
    for row, content in enumerate(rows):
        assert_close(logits[row][mask[row].bool()], ours(content).logits[0])
    if side == "left":
        # Without position ids, which are counted from the mask of all tokens so far.
        found = logits_in_blocks(ours, ids, [17, 18], mask)
        assert_close(found[mask.bool()], logits[mask.bool()])
        options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
        together = ours.generate(input_ids=ids, attention_mask=mask, **options)[:, 41:]
        for row, content in enumerate(rows):
            alone = ours.generate(input_ids=content, attention_mask=torch.ones_like(content), **options)
            assert torch.equal(together[row], alone[0, content.shape[1] :])


@torch.no_grad()
def test_packed_rows_are_kept_apart():
    ours, _ = make_pair()
    first, second = ids_of(23, seed=1), ids_of(18, seed=2)
    positions = torch.cat((torch.arange(23), torch.arange(18)))[None]
    packed = ours(torch.cat((first, second), dim=1), position_ids=positions, use_cache=False).logits
    assert_close(packed, torch.cat([ours(first).logits, ours(second).logits], dim=1))


@torch.no_grad()
def test_within_a_chunk_it_is_plain_attention_and_unbinding_leaves_no_trace():
    (ours, _), (plain, _) = make_pair(), make_pair()
    unbind_attention(plain)
    assert torch.equal(ours(ids_of(10)).logits, plain(ids_of(10)).logits)
    assert not torch.allclose(ours(ids_of(40)).logits, plain(ids_of(40)).logits)
    unbind_attention(ours)
    assert torch.equal(ours(ids_of(40)).logits, plain(ids_of(40)).logits)
    assert not any(hasattr(module, "dual_chunk_rotary") or module._forward_pre_hooks for module in ours.modules())
    bind_inference_attention(ours)
    del ours.config.dual_chunk_attention_config
    bind_inference_attention(ours, is_chunked=True)
    assert_close(ours(ids_of(40)).logits, plain(ids_of(40)).logits)


def test_training_gradients_equal_the_dense_reference_with_and_without_checkpointing():
    ours, reference = make_pair("qwen2")
    ids = ids_of(34, batch=2)
    expected, plain = (logits_and_gradients(model.train(), ids) for model in (reference, ours))
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    for theirs, mine, recomputed in zip(expected, plain, logits_and_gradients(ours, ids), strict=True):
        assert_close(mine, theirs)
        assert torch.equal(mine, recomputed)


@pytest.mark.parametrize("block", [1, 7, 10, 64])
def test_scoring_in_blocks_equals_scoring_whole_windows(block):
    (ours, _), ids = make_pair(), ids_of(64)
    assert_close(TokenScorer(ours, prefill_chunk_size=block)(ids)[0], TokenScorer(ours)(ids)[0], 1e-6)


@torch.no_grad()
def test_mscale_is_off_unless_asked():
    (plain, _), ids = make_pair(), ids_of(60)
    scaled, _ = make_pair(request=dataclasses.replace(DCA, dca_mscale=True))
    assert "_m1.29" in scaled.config._attn_implementation and "_m" not in plain.config._attn_implementation
    for module in attention_layers(plain):
        module.scaling *= (0.1 * math.log(64 / 16) + 1) ** 2
    expected = plain(ids).logits
    assert_close(scaled(ids).logits, expected, 1e-12)
    assert_close(logits_in_blocks(scaled, ids, [30]), expected)


@torch.no_grad()
@pytest.mark.parametrize("mscale", [None, "flash_decoding", "attn_replace"])
def test_one_call_for_ones_own_script(tmp_path, mscale):
    """The model that a config with the same request makes, saved and loaded again too."""
    config = tiny_config(max_position_embeddings=PRETRAINING)
    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    text = bind_dual_chunk_attention(own, pretraining_length=PRETRAINING, context_size=64, mscale=mscale)
    assert text.startswith("dual chunk attention (chunk 12, local window 2, pretraining length 16")
    by_config, _ = make_pair(request=dataclasses.replace(DCA, dca_mscale=mscale or False))
    ids, coefficient = ids_of(60), {"flash_decoding": 0.1, "attn_replace": 0.05}.get(mscale, 0)
    assert_close(own(ids).logits, by_config(ids).logits, 1e-6)
    factor = (coefficient * math.log(64 / 16) + 1) ** 2
    assert f"logits x {factor:.4g}" in text or mscale is None
    own.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert bind_inference_attention(again) == text and context_length(again.config) == 64


def test_one_call_refuses_what_cannot_be(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config())
    for options, error in (
        ({"mscale": "attn_replace"}, "context_size: missing"),
        ({"mscale": "0.05", "context_size": 64}, "mscale: '0.05' is not one of flash_decoding, attn_replace"),
        ({"local_window": 64}, "local_window: must be"),
    ):
        with pytest.raises(ValueError, match=error):
            bind_dual_chunk_attention(model, **options)
    windows = AutoModelForCausalLM.from_config(tiny_config("mistral", sliding_window=8))
    with pytest.raises(ValueError, match="sliding-window layers"):
        bind_dual_chunk_attention(windows)
    assert not any("dual_chunk_attention_config" in config.to_dict() for config in (windows.config, model.config))


def test_the_config_carries_it(tmp_path):
    ours, _ = make_pair()
    ours.save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert dual_chunk_sizes(config) == dual_chunk_sizes(ours.config)
    assert context_length(config) == 64 and config.max_position_embeddings == PRETRAINING
    apply_context(config, ContextRequest())
    assert dual_chunk_sizes(config).stride == 10 and context_length(config) == 64
    apply_context(config, ContextRequest(attention="full"))
    assert dual_chunk_sizes(config) is None and context_length(config) == PRETRAINING


def test_a_config_of_qwen_1m_is_read_as_it_is():
    """The values of Qwen2.5-7B-Instruct-1M's config.json."""
    config = tiny_config("qwen2", max_position_embeddings=1010000)
    config.dual_chunk_attention_config = {
        "chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144,
    }  # fmt: skip
    apply_context(config, ContextRequest())
    assert dual_chunk_sizes(config).stride == 253952 and context_length(config) == 1010000
    model = AutoModelForCausalLM.from_config(config)
    assert "chunk 262144" in bind_inference_attention(model)
    apply_context(model.config, ContextRequest(attention="full"))
    assert context_length(model.config) == 262144, "RoPE alone reaches what it was trained for"
    assert bind_inference_attention(model) == "dense causal (sdpa)"


def test_what_it_cannot_do_is_refused_by_name():
    config = tiny_config("mistral", sliding_window=32)
    apply_context(config, DCA)
    with pytest.raises(ValueError, match="sliding-window layers"):
        bind_inference_attention(AutoModelForCausalLM.from_config(config))
    ours, _ = make_pair()
    with pytest.raises(ValueError, match="static"):
        ours.generate(ids_of(5), max_new_tokens=2, cache_implementation="static", pad_token_id=3, eos_token_id=None)
    with pytest.raises(ValueError, match="left"):
        logits_in_blocks(ours, ids_of(5), [4], torch.tensor([[1, 1, 0, 0, 1]]))
    with pytest.raises(ValueError, match="attention_dropout"):
        make_pair(attention_dropout=0.1)[0].train()(ids_of(20))


def test_any_length_suits_a_model_with_dual_chunk_attention(tiny_model_dir, capsys):
    request = ContextRequest(attention="dca", pretraining_length=32)
    for context, warning in ((request, ""), (None, "warning: length 65 is beyond the model's context of 64 tokens\n")):
        read_source(str(tiny_model_dir), context=context).warn_beyond_context([64, 65])
        assert capsys.readouterr().out == warning
