"""Attention sinks and a window against a reference that holds everything and knows no cache."""

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForCausalLM, DynamicCache

from longqlora.inference.sink_cache import SinkLayer, check_streaming, sink_cache

WINDOW, NUM_SINKS = 16, 4
# Of logits between -10 and 10.
ROUNDING = 1e-4


def make_model(model_type="llama", **overrides):
    """Its weights are large, so that logits differ far beyond rounding where a token sees others."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, initializer_range=0.2, **overrides)).eval()


def random_ids(num_tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, 320, (1, num_tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run_blocks(model, cache, ids, blocks) -> torch.Tensor:
    """Logits [S, V] of `ids` [1, S], fed in blocks of these lengths."""
    pieces = ids.split(blocks, dim=1)
    return torch.cat([model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0] for piece in pieces])


def rotated(states, positions, inv_freq):
    """Llama's RoPE of states [..., S, D] at these positions [S], written as complex numbers."""
    half = states.shape[-1] // 2
    result = torch.complex(states[..., :half], states[..., half:]) * torch.polar(
        torch.ones(len(positions), half), torch.outer(positions.float(), inv_freq)
    )
    return torch.cat([result.real, result.imag], dim=-1)


@torch.no_grad()
def reference_logits(model, ids, blocks, *, window, num_sinks) -> torch.Tensor:
    """Logits [S, V]: each token alone through the stock model, with a cache made for it of the tokens it may see.

    Keys and values of all tokens are held as they were projected; who sees whom follows from `blocks`, one at a time.
    """
    attentions = [layer.self_attn for layer in model.model.layers]
    projected = {projection: [] for part in attentions for projection in (part.k_proj, part.v_proj)}
    for projection, kept in projected.items():
        projection.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
    logits, block_start = [], 0
    for block in blocks:
        kept = list(range(block_start))
        if len(kept) > window:
            kept = kept[:num_sinks] + kept[len(kept) - (window - num_sinks) :]
        for position in range(block_start, block_start + block):
            seen, cache = [*kept, *range(block_start, position)], DynamicCache()
            for index, part in enumerate(attentions if seen else []):
                keys, values = (
                    torch.cat([projected[projection][token] for token in seen], dim=1).unflatten(
                        -1, (-1, part.head_dim)
                    )
                    for projection in (part.k_proj, part.v_proj)
                )
                keys = rotated(keys.transpose(1, 2), torch.arange(len(seen)), model.model.rotary_emb.inv_freq)
                cache.update(keys, values.transpose(1, 2), index)
            logits.append(model(input_ids=ids[:, position, None], past_key_values=cache).logits[0, 0])
        block_start += block
    return torch.stack(logits)


@pytest.mark.parametrize("num_kv_heads", [4, 1])
@pytest.mark.parametrize(
    "num_sinks, blocks", [(4, [1] * 60), (0, [1] * 40), (15, [1] * 40), (4, [2, 5, 20, 1, 1, 40, 9, 3])]
)
def test_a_token_sees_sinks_and_window_at_positions_within_them(num_kv_heads, num_sinks, blocks):
    model = make_model(num_key_value_heads=num_kv_heads)
    ids = random_ids(sum(blocks))
    cache = sink_cache(model, window=WINDOW, num_sinks=num_sinks)
    found = run_blocks(model, cache, ids, blocks)
    expected = reference_logits(model, ids, blocks, window=WINDOW, num_sinks=num_sinks)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    assert cache.get_seq_length() == ids.shape[1] and cache.num_evicted == ids.shape[1] - WINDOW


def test_counting_from_0_again_changes_nothing():
    model, ids = make_model(), random_ids(120)
    plain, rebased = (sink_cache(model, window=WINDOW) for _ in range(2))
    expected = run_blocks(model, plain, ids, [1] * 120)
    logits, known = [], []
    for first in range(0, 120, 20):
        known = rebased.rebase(known) + ids[0, first : first + 20].tolist()
        logits.append(run_blocks(model, rebased, ids[:, first : first + 20], [1] * 20))
        assert rebased.get_seq_length() == len(known) <= WINDOW + 20
    torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=ROUNDING)
    assert rebased.rebase([*known, 7, 8]) == ids[0, :4].tolist() + ids[0, -12:].tolist() + [7, 8]
    assert rebased.rebase(list(range(20))) == list(range(20)), "nothing is evicted yet"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_the_window_is_full_it_is_stock_attention(dtype):
    model, ids, blocks = make_model().to(dtype), random_ids(24), [9, 1, 1, 5, 7, 1]
    model.model.rotary_emb.inv_freq = make_model().model.rotary_emb.inv_freq
    stock = run_blocks(model, DynamicCache(), ids, blocks)
    assert torch.equal(run_blocks(model, sink_cache(model, window=24), ids, blocks), stock)
    evicting = run_blocks(model, sink_cache(model, window=WINDOW), ids, blocks)
    assert torch.equal(evicting[:16], stock[:16]) and not torch.equal(evicting[-1], stock[-1])


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gpt_neox", "qwen3"])
def test_model_types(model_type):
    # With one layer, keys and values depend on the token alone: streaming is reading the kept tokens by themselves.
    model, ids = make_model(model_type, num_hidden_layers=1), random_ids(50)
    logits = run_blocks(model, sink_cache(model, window=WINDOW), ids, [1] * 50)
    for position in (10, 16, 17, 30, 49):
        seen = ids[:, : position + 1]
        if position > WINDOW:
            seen = torch.cat([seen[:, :NUM_SINKS], seen[:, position - (WINDOW - NUM_SINKS) :]], dim=1)
        with torch.no_grad():
            expected = model(input_ids=seen).logits[0, -1]
        torch.testing.assert_close(logits[position], expected, rtol=0, atol=ROUNDING)


def test_memory_is_constant_and_sinks_do_not_wear_off():
    inv_freq = make_model().model.rotary_emb.inv_freq
    layer, sizes = SinkLayer(inv_freq, WINDOW, NUM_SINKS), set()
    sinks = torch.randn(1, 2, NUM_SINKS, 16)
    layer.update(sinks, torch.zeros_like(sinks))
    for step in range(5000):
        keys, values = layer.update(torch.randn(1, 2, 1, 16), torch.full((1, 2, 1, 16), float(step)))
        if step > 2 * WINDOW:
            held = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
            sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in held))
    per_token = 2 * 16 * 4  # bytes of the keys of one token
    assert sizes == {per_token * 2 * (WINDOW + 1) + inv_freq.nbytes}
    assert keys.shape == values.shape == (1, 2, WINDOW + 1, 16)
    assert values[0, 0, NUM_SINKS:, 0].tolist() == list(range(4999 - 12, 5000))
    expected = rotated(sinks[0], torch.full((4,), 5000 + 3 - WINDOW), inv_freq)
    torch.testing.assert_close(keys[0, :, :NUM_SINKS], expected, rtol=0, atol=3e-3)
    assert layer.get_seq_length() == 5004 and not layer.is_croppable


DCA = {"chunk_size": 32, "local_size": 8, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "config, sizes, words",
    [
        (tiny_config(), (4, 4), ["--streaming_window 4", "--num_sinks 4"]),
        (tiny_config(), (10, -1), ["--num_sinks -1"]),
        (tiny_config(), (64, 4), ["--streaming_window 64", "context of 64"]),
        (tiny_config(), (None, 56), ["--streaming_window 56", "--num_sinks 56"]),
        (tiny_config(dual_chunk_attention_config=DCA), (16, 4), ["--attention full"]),
        (tiny_config(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}), (16, 4), ["dynamic"]),
        (tiny_config("mistral", sliding_window=32), (16, 4), ["mistral", "sliding-window"]),
    ],
)
def test_refused_by_the_config_alone(config, sizes, words):
    with pytest.raises(ValueError) as error:
        check_streaming(config, *sizes)
    assert all(word in str(error.value) for word in words), error.value


# No RoPE, an interleaved one, and one that is not in every layer.
@pytest.mark.parametrize("model_type", ["gpt2", "cohere", "smollm3"])
def test_models_without_llamas_rope_are_refused(model_type):
    with pytest.raises(ValueError, match=f"--streaming does not suit {model_type}: .* rotary position embedd"):
        sink_cache(make_model(model_type), window=WINDOW)


def test_block_and_window_fill_the_context():
    for size, window in ((64, 56), (8192, 7168), (32768, 31744)):
        assert check_streaming(tiny_config(max_position_embeddings=size), None, None) == (window, 4)
    model = make_model()
    assert sink_cache(model).block_size == 8 and sink_cache(model, window=63).block_size == 1
