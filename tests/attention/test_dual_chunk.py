"""DCA against an independent dense reference in float64, written from the paper: prefill, decoding, pieces, gradients.

Tolerance: 1e-10 in fp64 on outputs, 1e-9 on gradients; 2e-5 in fp32 and 3e-2 in bf16 (values of order one)."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longqlora.attention import dual_chunk as dca
from longqlora.attention import merged as merged_attention
from longqlora.attention.dual_chunk import (
    DualChunkSizes,
    attention_mscale,
    dual_chunk_attention,
    rotate,
    segment_dual_chunk_attention,
)
from longqlora.attention.shift_short import causal_attention

SIZES = DualChunkSizes(16)  # chunk_size 12, local_window 2, s 10
S = SIZES.stride
LENGTHS = [1, 2, S - 1, S, S + 1, 2 * S - 1, 2 * S, 2 * S + 1, 3 * S, 3 * S + 4, 5 * S + 3]
# chunk_size 12 and window 8: s = 4 and 2 s - 1 = 7 < 12, so that the largest query position is below chunk_size.
VARIANTS = [SIZES, DualChunkSizes(16, 12, 8), DualChunkSizes(16, 15, 1), DualChunkSizes(16, 3, 2), DualChunkSizes(64)]


def rope(x, positions, inv_freq):
    """Rotation as multiplication of complex numbers: dimension d is the real part, R + d the imaginary one."""
    num_freqs = len(inv_freq)
    pairs = torch.complex(x[..., :num_freqs], x[..., num_freqs : 2 * num_freqs])
    pairs = pairs * torch.polar(torch.ones((), dtype=torch.float64), positions[..., None] * inv_freq)
    rest = x[..., 2 * num_freqs :].expand(*pairs.shape[:-1], -1)
    return torch.cat([pairs.real, pairs.imag, rest], dim=-1)


def reference(query, key, value, sizes, inv_freq):
    """[S, S] logits from un-rotated query and key, the distance of every pair from the paper's three cases."""
    length, c, s = query.shape[2], sizes.chunk_size, sizes.chunk_size - sizes.local_window
    distance = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1):
            position = i % s
            if i // s - j // s == 1:
                position = min(i % s + s, c)
            if i // s - j // s > 1:
                position = min(s - 1 + s, c)
            distance[i, j] = position - j % s
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    pairs = rope(query[:, :, :, None], distance, inv_freq)
    logits = torch.einsum("bhijd,bhjd->bhij", pairs, key) / math.sqrt(query.shape[-1])
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -math.inf).softmax(-1) @ value


def frequencies(num=4):
    return 0.9 ** torch.arange(num, dtype=torch.float64)


def inputs(length, batch=1, heads=4, kv_heads=2, dim=8, seed=0):
    """Un-rotated query, key and value [B, H, S, D], in memory [B, S, H, D] as a model makes them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, h, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).transpose(1, 2) for s in shapes]


def rotated(query, key, sizes, inv_freq):
    positions = torch.arange(key.shape[2]) % sizes.stride
    return rope(query, positions, inv_freq), rope(key, positions, inv_freq)


def run(query, key, value, sizes=SIZES, inv_freq=None, first=0, dtype=torch.float64):
    """DCA of the positions from `first` on, of un-rotated tensors."""
    inv_freq = frequencies() if inv_freq is None else inv_freq
    query, key = rotated(query, key, sizes, inv_freq)
    tensors = (x.to(dtype) for x in (query[:, :, first:], key, value))
    return dual_chunk_attention(*tensors, inv_freq=inv_freq, sizes=sizes)


def assert_close(ours, expected, tolerance=1e-10):
    assert torch.allclose(ours.double(), expected, rtol=0, atol=tolerance), (ours - expected).abs().max()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_equals_the_reference(length, kv_heads):
    tensors = inputs(length, batch=2, kv_heads=kv_heads)
    assert_close(run(*tensors), reference(*tensors, SIZES, frequencies()))


@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
def test_sizes_and_partial_rotation(sizes):
    for num_freqs in (1, 3, 4):
        tensors = inputs(43)
        expected = reference(*tensors, sizes, frequencies(num_freqs))
        assert_close(run(*tensors, sizes, frequencies(num_freqs)), expected)


@pytest.mark.parametrize("rows", [1, S, 2 * S, 3 * S + 1])
def test_blocks_of_chunks(monkeypatch, rows):
    """However many chunks share a block, the result is the same."""
    monkeypatch.setattr(dca, "ROWS_PER_BLOCK", rows)
    tensors = inputs(7 * S + 3, batch=2)
    assert_close(run(*tensors), reference(*tensors, SIZES, frequencies()))


@pytest.mark.parametrize("length,calls", [(6 * S, 6), (6 * S + 1, 9), (2 * S, 2), (S + 1, 3)])
def test_whole_chunks_share_kernel_calls(monkeypatch, length, calls):
    """One call for all chunks themselves, one for all previous ones, and one for the earlier ones of each chunk."""
    seen, attend = [], merged_attention.attend
    monkeypatch.setattr(merged_attention, "attend", lambda *x, **options: seen.append(x) or attend(*x, **options))
    run(*inputs(length))
    assert len(seen) == calls


@pytest.mark.parametrize("piece", [1, 3, 7, S, 2 * S + 1, 38])
@pytest.mark.parametrize("sizes", VARIANTS[:3], ids=str)
def test_decoding_and_prefill_in_pieces(sizes, piece):
    """Pieces of any size, at any offset in a chunk, see the keys so far as the whole prompt's prefill does."""
    query, key, value = inputs(5 * S + 3)
    expected = reference(query, key, value, sizes, frequencies())
    for first in range(0, query.shape[2], piece):
        seen = [x[:, :, : first + piece] for x in (query, key, value)]
        assert_close(run(*seen, sizes, first=first), expected[:, :, first : first + piece])


@pytest.mark.parametrize("length,kv_heads,first", [(S, 4, 0), (2 * S, 1, 0), (4 * S + 3, 2, 0), (4 * S + 3, 2, S + 4)])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(length, kv_heads, first, recompute):
    tensors = [x.requires_grad_() for x in inputs(length, batch=2, kv_heads=kv_heads)]
    expected = reference(*tensors, SIZES, frequencies())[:, :, first:]
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.autograd.grad((expected * weights).sum(), tensors)
    call = lambda *x: run(*x, first=first)  # noqa: E731
    output = checkpoint(call, *tensors, use_reentrant=False) if recompute else call(*tensors)
    for ours, theirs in zip(torch.autograd.grad((output * weights).sum(), tensors), exact, strict=True):
        assert_close(ours, theirs, 1e-9)


def test_gradcheck():
    sizes = DualChunkSizes(8, 3, 1)
    tensors = [x.requires_grad_() for x in inputs(7, heads=2, kv_heads=1, dim=4)]
    call = lambda *x: dual_chunk_attention(*x, inv_freq=frequencies(2), sizes=sizes)  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors)
    partial = lambda q: call(q, tensors[1].detach(), tensors[2].detach())  # noqa: E731
    assert torch.autograd.gradcheck(partial, tensors[0][:, :, 3:].detach().requires_grad_())


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision(dtype, tolerance):
    tensors = [x.to(dtype).double() for x in inputs(5 * S + 3, kv_heads=2)]
    output = run(*tensors, dtype=dtype)
    assert output.dtype == dtype
    assert_close(output, reference(*tensors, SIZES, frequencies()), tolerance)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 5e-5), (torch.bfloat16, 6e-2)])
def test_gradients_in_lower_precision(dtype, tolerance):
    query, key, value = inputs(5 * S + 3)
    exact = [x.to(dtype).double().requires_grad_() for x in (*rotated(query, key, SIZES, frequencies()), value)]
    low = [x.detach().to(dtype).requires_grad_() for x in exact]
    for tensors in (exact, low):
        dual_chunk_attention(*tensors, inv_freq=frequencies(), sizes=SIZES).double().square().sum().backward()
    for ours, theirs in zip(low, exact, strict=True):
        assert ours.grad.dtype == dtype
        assert_close(ours.grad, theirs.grad, tolerance * theirs.grad.abs().max().item())


def test_under_autocast_it_computes_in_its_dtype_as_sdpa_does():
    tensors = [x.float().requires_grad_() for x in inputs(3 * S)]
    with torch.autocast("cpu", torch.bfloat16):
        output = dual_chunk_attention(
            tensors[0], tensors[1].bfloat16(), tensors[2], inv_freq=frequencies(), sizes=SIZES
        )
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.any() for x in tensors)


@pytest.mark.parametrize("length", [1, S - 1, S])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_within_one_chunk_it_is_plain_attention_to_the_bit(length, dtype):
    query, key, value = (x.to(dtype) for x in inputs(length, batch=2))
    ours = dual_chunk_attention(query, key, value, inv_freq=frequencies(), sizes=SIZES)
    assert torch.equal(ours, causal_attention(query, key, value))


def test_beyond_one_chunk_it_is_not():
    query, key, value = inputs(S + 1)
    assert not torch.allclose(
        run(query, key, value), causal_attention(*rotated(query, key, SIZES, frequencies()), value)
    )


@pytest.mark.parametrize("length", [S, 3 * S + 4, 4 * S])
def test_changed_future_changes_nothing_before(length):
    query, key, value = inputs(length)
    query, key = rotated(query, key, SIZES, frequencies())
    call = lambda *x: dual_chunk_attention(*x, inv_freq=frequencies(), sizes=SIZES)  # noqa: E731
    before = call(query, key, value)
    for token in range(length):
        changed = [x.clone() for x in (query, key, value)]
        for x in changed:
            x[:, :, token:] += 1.0
        after = call(*changed)
        assert torch.equal(after[:, :, :token], before[:, :, :token])
        assert not torch.equal(after[:, :, token], before[:, :, token])


def test_huge_and_tiny_logits_stay_finite():
    query, key, value = inputs(3 * S, kv_heads=4)
    for factor in (1e4, 1e-30):
        output = run(query * factor, key, value)
        assert_close(output, reference(query * factor, key, value, SIZES, frequencies()), 1e-7)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rotate(dtype, tolerance):
    query, deltas = inputs(9)[0], torch.tensor([0, 1, 5, 11, 2, -3, 7, 7, 100])
    for num_freqs in (2, 4):
        turned = rotate(query.to(dtype), deltas, frequencies(num_freqs))
        assert turned.dtype == dtype
        assert_close(turned, rope(query, deltas, frequencies(num_freqs)), tolerance)
        assert torch.equal(turned[..., 2 * num_freqs :], query.to(dtype)[..., 2 * num_freqs :])


def test_frequencies_changed_in_place_are_seen():
    tensors, inv_freq = inputs(3 * S), frequencies()
    run(*tensors, inv_freq=inv_freq)
    inv_freq /= 2
    assert_close(run(*tensors, inv_freq=inv_freq), reference(*tensors, SIZES, inv_freq))


def test_default_sizes_are_the_authors():
    sizes = DualChunkSizes(4096)
    assert (sizes.chunk_size, sizes.local_window, sizes.stride, sizes.inter_position) == (3072, 512, 2560, 3072)
    assert DualChunkSizes(4096, local_window=256).stride == 2816
    assert DualChunkSizes(4096, 1000, 600).inter_position == 799


@pytest.mark.parametrize(
    "settings,name",
    [
        ((4,), "pretraining_length"), ((0,), "pretraining_length"), ((-16,), "pretraining_length"),
        ((None,), "pretraining_length"), ((16.0,), "pretraining_length"), (("16",), "pretraining_length"),
        ((True,), "pretraining_length"), ((16, 0), "chunk_size"), ((16, 17), "chunk_size"), ((16, 12.5), "chunk_size"),
        ((16, 12, 12), "local_window"), ((16, 12, 0), "local_window"), ((16, 2), "local_window"),
        ((16, 12, -1), "local_window"), ((16, 12, "2"), "local_window"),
    ],
)  # fmt: skip
def test_bad_sizes_name_the_setting(settings, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        DualChunkSizes(*settings)


@pytest.mark.parametrize("attention", [dual_chunk_attention, segment_dual_chunk_attention])
def test_bad_calls(attention):
    query, key, value = inputs(12)
    options = {"inv_freq": frequencies(), "sizes": SIZES}
    ids = () if attention is dual_chunk_attention else (torch.zeros(1, 12, dtype=torch.long),)
    with pytest.raises(ValueError, match="attention_dropout"):
        attention(query, key, value, *ids, dropout=0.1, **options)
    with pytest.raises(ValueError, match="12 queries cannot be the last of 11"):
        attention(query, key[:, :, 1:], value[:, :, 1:], *ids, **options)
    with pytest.raises(ValueError, match="inv_freq"):
        attention(query, key, value, *ids, **{**options, "inv_freq": frequencies(5)})
    if ids:
        with pytest.raises(ValueError, match="segment_ids"):
            attention(query, key, value, ids[0][:, 1:], **options)


def test_mscale():
    assert attention_mscale(4096, 4096) == attention_mscale(1, 4096) == 1.0
    assert math.isclose(attention_mscale(4096 * 8, 4096), (0.1 * math.log(8) + 1) ** 2)
    assert math.isclose(attention_mscale(4096 * 8, 4096, coefficient=0.05), (0.05 * math.log(8) + 1) ** 2)
    query, key, value = inputs(3 * S)
    factor = attention_mscale(3 * S, 16)
    ours = dual_chunk_attention(query, key, value, inv_freq=frequencies(), sizes=SIZES, scaling=factor / math.sqrt(8))
    query, key = (x * math.sqrt(factor) for x in (query, key))
    assert_close(ours, dual_chunk_attention(query, key, value, inv_freq=frequencies(), sizes=SIZES))


def padded_ids(length, *ranges):
    """One row of segment ids: the ranges are segments 0, 1, ..., all else is padding."""
    ids = torch.full((length,), -1)
    for number, (start, stop) in enumerate(ranges):
        ids[start:stop] = number
    return ids


ROWS = {
    "left, right, both": [padded_ids(44, (9, 44)), padded_ids(44, (0, 35)), padded_ids(44, (3, 41))],
    "packed": [padded_ids(44, (0, 1), (1, 22), (22, 44)), padded_ids(44, (0, 10), (10, 44)), padded_ids(44, (0, 44))],
    "packed and padded": [padded_ids(44, (5, 17), (17, 40)), padded_ids(44), padded_ids(44, (4, 5), (8, 30), (33, 44))],
}


def by_segment(ids):
    for row, values in enumerate(ids.tolist()):
        for number in sorted(set(values) - {-1}):
            yield row, values.index(number), len(values) - values[::-1].index(number)


@pytest.mark.parametrize("first", [0, 1, 17, 43])
@pytest.mark.parametrize("rows", ROWS)
def test_segments_equal_their_sequences_alone(rows, first):
    """Padded and packed rows, whole or their last slots only, forward and backward; padding gives zeros."""
    ids = torch.stack(ROWS[rows])
    query, key, value = inputs(44, batch=3)
    weights = torch.randn(query.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, grads = torch.zeros_like(query), [torch.zeros_like(x) for x in (query, key, value)]
    packed = [x.clone() for x in (query, key, value)]
    for row, start, stop in by_segment(ids):
        alone = [x[row : row + 1, :, start:stop] for x in (query, key, value)]
        alone = [x.requires_grad_() for x in (*rotated(*alone[:2], SIZES, frequencies()), alone[2].clone())]
        begin = max(first - start, 0)
        output = dual_chunk_attention(alone[0][:, :, begin:], *alone[1:], inv_freq=frequencies(), sizes=SIZES)
        expected[row, :, start + begin : stop] = output[0].detach()
        (output * weights[row, :, start + begin : stop]).sum().backward()
        for x, leaf, grad in zip(packed, alone, grads, strict=True):
            x[row, :, start:stop], grad[row, :, start:stop] = leaf[0].detach(), leaf.grad[0]
    leaves = [x.requires_grad_() for x in packed]
    output = segment_dual_chunk_attention(
        leaves[0][:, :, first:], *leaves[1:], ids, inv_freq=frequencies(), sizes=SIZES
    )
    assert_close(output, expected[:, :, first:])
    assert not output.transpose(1, 2)[ids[:, first:] < 0].any()
    (output * weights[:, :, first:]).sum().backward()
    for leaf, grad in zip(leaves, grads, strict=True):
        assert_close(leaf.grad, grad, 1e-9)


def test_equal_ids_apart_are_sequences_of_their_own():
    ids = torch.tensor([[0] * 15 + [-1] + [0] * 14])
    tensors = inputs(30)
    output = segment_dual_chunk_attention(*tensors, ids, inv_freq=frequencies(), sizes=SIZES)
    alone = dual_chunk_attention(*(x[:, :, 16:] for x in tensors), inv_freq=frequencies(), sizes=SIZES)
    assert_close(output[:, :, 16:], alone)


def test_what_stands_in_padding_reaches_nothing():
    ids = torch.stack(ROWS["left, right, both"])
    tensors = inputs(44, batch=3)
    call = lambda *x: segment_dual_chunk_attention(*x, ids, inv_freq=frequencies(), sizes=SIZES)  # noqa: E731
    before = call(*tensors)
    for x in tensors:
        x.transpose(1, 2)[ids < 0] = math.nan
    assert torch.equal(call(*tensors), before)
