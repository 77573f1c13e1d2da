"""Dual chunk attention inside whole models, against a dense float64 reference that knows only relative positions.

The reference runs the same model with RoPE switched off and an attention function of its own: it turns
each query-key pair by the distance that the paper's table gives. RoPE is in float64 in both, so that
1e-10 can be asked; stock RoPE computes its angles in float32.
"""

import copy
import dataclasses
import math

import pytest
import torch
from conftest import tiny_config
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from longqlora.attention.binding import bind_attention, bind_inference_attention, unbind_attention
from longqlora.attention.dual_chunk_binding import dual_chunk_sizes
from longqlora.evaluation.scoring import TokenScorer
from longqlora.inference.load import load_for_inference
from longqlora.model.context import ContextRequest, apply_context, context_length
from longqlora.settings.config import AttentionConfig

PRETRAINING = 16  # chunk 12, window 2, so chunks of 10 tokens
# The last three: adjacent dimensions are pairs, in all of a head or in half of it, and layers without RoPE.
MODEL_TYPES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gpt_neox", "ernie4_5", "glm4", "smollm3"]
DCA = ContextRequest(attention="dca", pretraining_length=PRETRAINING, context_size=64)


def distance_table(num_tokens):
    """Relative position of each query (row) and key, as section 3 of the paper and the authors' code define it."""
    stride, largest = 10, 12
    table = torch.zeros(num_tokens, num_tokens)
    for i in range(num_tokens):
        for j in range(i + 1):
            apart = i // stride - j // stride
            own = i % stride if apart == 0 else min(i % stride + stride, largest) if apart == 1 else largest
            table[i, j] = own - j % stride
    return table.double()


def reference_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """query [B, H, S, D], not rotated; attention_mask: real tokens bool [B, S], or None."""
    inv_freq, cos_sin_scale = module.reference
    batch, heads, length, dim = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    output = torch.zeros_like(query)
    half = len(inv_freq)
    for row in range(batch):
        real = torch.arange(length) if attention_mask is None else attention_mask[row].nonzero().flatten()
        distance = distance_table(len(real)) * getattr(module, "use_rope", 1)
        q, k, v = (x[row][:, real].double() for x in (query, key, value))
        logits = q[..., 2 * half :] @ k[..., 2 * half :].mT
        for pair in range(half):
            first, second = (2 * pair, 2 * pair + 1) if module.is_interleaved else (pair, half + pair)
            q1, q2, k1, k2 = q[..., first], q[..., second], k[..., first], k[..., second]
            cos, sin = (distance * inv_freq[pair]).cos(), (distance * inv_freq[pair]).sin()
            same = q1[..., None] * k1[:, None] + q2[..., None] * k2[:, None]
            cross = q1[..., None] * k2[:, None] - q2[..., None] * k1[:, None]
            # R(m) q . R(n) k is R(m - n) q . k: a part along the pair and a part across it.
            logits = logits + cos_sin_scale**2 * (same * cos + cross * sin)
        future = torch.ones(len(real), len(real), dtype=torch.bool).triu(1)
        weights = (logits * scaling).masked_fill(future, float("-inf")).softmax(dim=-1)
        output[row][:, real] = (weights @ v).to(query.dtype)
    return output.transpose(1, 2), None


def in_float64(rotary, inv_freq):
    """Forward of a rotary embedding with angles in float64."""

    def forward(states, position_ids):
        angles = position_ids[..., None].double() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    return forward


def make_pair(model_type="llama", request=DCA, **overrides):
    """(the model with dual chunk attention, the same weights as the reference), both float64 and in eval mode."""
    config = tiny_config(model_type, max_position_embeddings=PRETRAINING, **overrides)
    torch.manual_seed(0)
    apply_context(config, request)
    ours = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    if model_type == "mixtral":
        ours.set_experts_implementation("eager")  # the grouped kernel knows no float64
    reference = copy.deepcopy(ours)
    bind_inference_attention(ours)
    rotary = ours.get_decoder().rotary_emb
    inv_freq = rotary.inv_freq.double()
    rotary.inv_freq = inv_freq
    rotary.forward = in_float64(rotary, inv_freq)
    still = reference.get_decoder().rotary_emb
    still.forward = lambda states, position_ids: (
        torch.ones(*position_ids.shape, 2 * len(inv_freq), dtype=torch.float64),
        torch.zeros(*position_ids.shape, 2 * len(inv_freq), dtype=torch.float64),
    )
    for module in reference.modules():
        if hasattr(module, "layer_idx"):
            module.reference = (inv_freq, rotary.attention_scaling)
            module.is_interleaved = model_type in ("ernie4_5", "glm4")
    AttentionInterface.register("dense_reference", reference_attention)
    AttentionMaskInterface.register("dense_reference", lambda *args, attention_mask=None, **kwargs: attention_mask)
    reference.set_attn_implementation("dense_reference")
    return ours, reference


def ids_of(num_tokens, batch=1, seed=0):
    return torch.randint(4, 320, (batch, num_tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_prefill_and_decode_equal_the_dense_reference(model_type):
    ours, reference = make_pair(model_type)
    ids = ids_of(57, batch=2)
    with torch.no_grad():
        expected = reference(ids).logits
        assert torch.allclose(ours(ids).logits, expected, atol=1e-10, rtol=0)
        cache, pieces = None, []
        # A prefill across chunk borders, single tokens, and blocks that begin and end within chunks.
        for first, end in [(0, 23), (23, 24), (24, 25), (25, 38), (38, 39), (39, 57)]:
            output = ours(ids[:, first:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    assert torch.allclose(torch.cat(pieces, dim=1), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rope_type", ["linear", "ntk", "yarn", "llama3", "theta", "dynamic"])
def test_on_top_of_every_rope_method(rope_type):
    request = ContextRequest(
        attention="dca", rope_type=rope_type, rope_theta=5e5 if rope_type == "theta" else None,
        pretraining_length=PRETRAINING, context_size=64,
    )  # fmt: skip
    ours, reference = make_pair(request=request, head_dim=16)
    config = tiny_config(max_position_embeddings=4)
    apply_context(config, request)
    assert context_length(config) == 64
    ids = ids_of(45)
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, reference(ids).logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_padded_batches_equal_single_rows(model_type, side):
    ours, _ = make_pair(model_type)
    lengths = [41, 10, 27, 1]
    rows = [ids_of(length, seed=length) for length in lengths]
    ids, mask = torch.full((4, 41), 3), torch.zeros(4, 41, dtype=torch.long)
    for row, (length, content) in enumerate(zip(lengths, rows, strict=True)):
        place = slice(41 - length, 41) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = content[0], 1
    with torch.no_grad():
        logits = ours(ids, attention_mask=mask).logits
        for row, content in enumerate(rows):
            expected = ours(content).logits[0]
            assert torch.allclose(logits[row][mask[row].bool()], expected, atol=1e-10, rtol=0)


def test_a_padded_batch_read_in_blocks_equals_it_at_once():
    """Without position ids, which are counted from the mask of all tokens so far."""
    ours, _ = make_pair()
    ids, mask = ids_of(41, batch=2), torch.ones(2, 41, dtype=torch.long)
    mask[1, :13] = 0
    with torch.no_grad():
        expected, cache, pieces = ours(ids, attention_mask=mask).logits, None, []
        for first, end in [(0, 17), (17, 18), (18, 41)]:
            block = ours(ids[:, first:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache, pieces = block.past_key_values, [*pieces, block.logits]
    found = torch.cat(pieces, dim=1)
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-10, rtol=0)


def test_generation_of_a_padded_batch_equals_single_rows():
    ours, _ = make_pair()
    rows = [ids_of(length, seed=length) for length in (33, 9)]
    ids, mask = torch.full((2, 33), 3), torch.zeros(2, 33, dtype=torch.long)
    ids[0], mask[0], ids[1, 24:], mask[1, 24:] = rows[0][0], 1, rows[1][0], 1
    options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    together = ours.generate(input_ids=ids, attention_mask=mask, **options)[:, 33:]
    for row, content in enumerate(rows):
        alone = ours.generate(input_ids=content, attention_mask=torch.ones_like(content), **options)
        assert torch.equal(together[row], alone[0, content.shape[1] :])


def test_within_a_chunk_it_is_plain_attention():
    ours, _ = make_pair()
    ids = ids_of(10)
    with torch.no_grad():
        chunked = ours(ids).logits
        unbind_attention(ours)
        assert torch.equal(chunked, ours(ids).logits)
        # Unbound, a longer input is read by plain RoPE again: the hooks are gone.
        longer = ours(ids_of(40)).logits
    plain, _ = make_pair()
    unbind_attention(plain)
    assert torch.equal(longer, plain(ids_of(40)).logits)
    assert not any(hasattr(module, "dual_chunk_rotary") for module in ours.modules())
    assert not any(module._forward_pre_hooks for module in ours.modules())


def test_training_gradients_equal_the_dense_reference():
    ours, reference = make_pair("qwen2")
    ids = ids_of(34, batch=2)
    for model in (ours, reference):
        model.train()
        model(ids, labels=ids).loss.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-10, rtol=1e-8), name


def test_gradient_checkpointing_changes_nothing():
    ours, _ = make_pair()
    ids = ids_of(34)
    ours.train()
    ours(ids, labels=ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in ours.parameters()]
    ours.zero_grad()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours(ids, labels=ids).loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(ours.parameters(), expected, strict=True))


def test_packed_rows_are_kept_apart():
    ours, _ = make_pair()
    first, second = ids_of(23, seed=1), ids_of(18, seed=2)
    positions = torch.cat((torch.arange(23), torch.arange(18)))[None]
    with torch.no_grad():
        packed = ours(torch.cat((first, second), dim=1), position_ids=positions, use_cache=False).logits
        for part, alone in ((packed[:, :23], first), (packed[:, 23:], second)):
            assert torch.allclose(part, ours(alone).logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("block", [1, 7, 10, 64])
def test_scoring_in_blocks_equals_scoring_whole_windows(block):
    ours, _ = make_pair()
    ids = ids_of(64)
    whole, _ = TokenScorer(ours)(ids)
    assert torch.allclose(TokenScorer(ours, prefill_chunk_size=block)(ids)[0], whole, atol=1e-6)
    unbind_attention(ours)
    dense, _ = TokenScorer(ours)(ids)
    bound = copy.deepcopy(ours)
    del bound.config.dual_chunk_attention_config
    bind_inference_attention(bound, is_chunked=True)
    assert torch.allclose(TokenScorer(bound, prefill_chunk_size=block)(ids)[0], dense, atol=1e-6)
    assert not torch.allclose(whole, dense, atol=1e-3), "the two methods must differ at this length"


def test_mscale_is_off_unless_asked():
    plain, _ = make_pair()
    ids = ids_of(60)
    scaled, _ = make_pair(request=dataclasses.replace(DCA, dca_mscale=True))
    assert "_m1.29" in scaled.config._attn_implementation and "_m" not in plain.config._attn_implementation
    factor = (0.1 * math.log(64 / 16) + 1) ** 2
    for module in plain.modules():
        if hasattr(module, "layer_idx"):
            module.scaling *= factor
    with torch.no_grad():
        expected = plain(ids).logits
        assert torch.allclose(scaled(ids).logits, expected, atol=1e-12)
        first = scaled(ids[:, :30], use_cache=True)
        rest = scaled(ids[:, 30:], past_key_values=first.past_key_values)
    assert torch.allclose(rest.logits, expected[:, 30:], atol=1e-10), "blocks and whole inputs agree"


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
    with pytest.raises(ValueError, match="rope_type"):
        apply_context(tiny_config(), ContextRequest(attention="dca", pretraining_length=128))
    with pytest.raises(ValueError, match="pretraining_length"):
        apply_context(tiny_config(), ContextRequest(attention="dca", rope_type="linear"))
    with pytest.raises(ValueError, match="^dca_chunk_size: "):
        apply_context(tiny_config(), ContextRequest(attention="dca", dca_chunk_size=100))
    with pytest.raises(ValueError, match="^dca_local_window: "):
        apply_context(tiny_config(), ContextRequest(attention="dca", dca_local_window=60))
    with pytest.raises(ValueError, match="attention: dca only"):
        apply_context(tiny_config(), ContextRequest(pretraining_length=32))
    config = tiny_config("mistral", sliding_window=32)
    apply_context(config, DCA)
    with pytest.raises(ValueError, match="sliding_window"):
        bind_inference_attention(AutoModelForCausalLM.from_config(config))
    ours, _ = make_pair()
    with pytest.raises(ValueError, match="static"):
        ours.generate(ids_of(5), max_new_tokens=2, cache_implementation="static", pad_token_id=3, eos_token_id=None)
    with pytest.raises(ValueError, match="left"):
        cache = ours(ids_of(4), use_cache=True).past_key_values
        ours(ids_of(1), past_key_values=cache, attention_mask=torch.tensor([[1, 1, 0, 0, 1]]))
    with pytest.raises(ValueError, match="attention_dropout"):
        dropping, _ = make_pair(attention_dropout=0.1)
        dropping.train()(ids_of(20))


def test_training_binds_it_too():
    config = tiny_config(max_position_embeddings=PRETRAINING)
    apply_context(config, DCA)
    model = AutoModelForCausalLM.from_config(config)
    assert "dual chunk" in bind_attention(model, AttentionConfig(attention="dca"), 64)


def test_any_length_suits_a_model_with_dual_chunk_attention(tiny_model_dir):
    request = ContextRequest(attention="dca", pretraining_length=32)
    assert load_for_inference(str(tiny_model_dir), context=request).longest_input == math.inf
    assert load_for_inference(str(tiny_model_dir)).longest_input == 64
