"""DCA against an independent dense reference in float64, written from the paper: prefill, decoding, blocks, gradients.

Tolerance: 1e-10 in fp64 on outputs, 1e-9 on gradients; 2e-5 in fp32 and 3e-2 in bf16 (values of order one)."""

import math
from functools import partial

import pytest
import torch
from attention_reference import assert_close, assert_same_with_gradients, dual_chunk_reference, random_qkv, rope
from torch.utils.checkpoint import checkpoint

from longqlora.attention import dual_chunk as dca
from longqlora.attention import merged
from longqlora.attention.dual_chunk import DualChunkSizes, attention_mscale, dual_chunk_attention
from longqlora.attention.rotation import rotate
from longqlora.attention.sdpa import causal_attention

SIZES = DualChunkSizes(16)  # chunk_size 12, local_window 2, s 10
S = SIZES.stride
LENGTHS = [1, 2, S - 1, S, S + 1, 2 * S - 1, 2 * S, 2 * S + 1, 3 * S, 3 * S + 4, 5 * S + 3]
# chunk_size 12 and window 8: s = 4 and 2 s - 1 = 7 < 12, so that the largest query position is below chunk_size.
VARIANTS = [SIZES, DualChunkSizes(16, 12, 8), DualChunkSizes(16, 15, 1), DualChunkSizes(16, 3, 2), DualChunkSizes(64)]
FREQUENCIES = 0.9 ** torch.arange(4, dtype=torch.float64)
inputs = partial(random_qkv, dim=8)


def reference(query, key, value, sizes=SIZES, inv_freq=FREQUENCIES):
    return dual_chunk_reference(query, key, value, sizes, inv_freq)


def rotated(query, key, sizes=SIZES, inv_freq=FREQUENCIES):
    positions = torch.arange(key.shape[2]) % sizes.stride
    return rope(query, positions, inv_freq), rope(key, positions, inv_freq)


def run(query, key, value, sizes=SIZES, inv_freq=FREQUENCIES, first=0):
    """DCA of the positions from `first` on, of un-rotated tensors."""
    query, key = rotated(query, key, sizes, inv_freq)
    return dual_chunk_attention(query[:, :, first:], key, value, inv_freq=inv_freq, sizes=sizes)


attend = partial(dual_chunk_attention, inv_freq=FREQUENCIES, sizes=SIZES)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_equals_the_reference(length, kv_heads):
    tensors = inputs(length, batch=2, kv_heads=kv_heads)
    assert_close(run(*tensors), reference(*tensors))


@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
def test_sizes_and_partial_rotation(sizes):
    for num_freqs in (1, 3, 4):
        tensors, inv_freq = inputs(43), FREQUENCIES[:num_freqs]
        assert_close(run(*tensors, sizes, inv_freq), reference(*tensors, sizes, inv_freq))


@pytest.mark.parametrize("rows", [1, S, 2 * S, 3 * S + 1])
def test_blocks_of_chunks(monkeypatch, rows):
    """However many chunks share a block, the result is the same."""
    monkeypatch.setattr(dca, "ROWS_PER_BLOCK", rows)
    tensors = inputs(7 * S + 3, batch=2)
    assert_close(run(*tensors), reference(*tensors))


@pytest.mark.parametrize("length,calls", [(6 * S, 6), (6 * S + 1, 9), (2 * S, 2), (S + 1, 3)])
def test_whole_chunks_share_kernel_calls(monkeypatch, length, calls):
    """One call for all chunks themselves, one for all previous ones, and one for the earlier ones of each chunk."""
    seen, stock = [], merged.attend
    monkeypatch.setattr(merged, "attend", lambda *x, **options: seen.append(x) or stock(*x, **options))
    run(*inputs(length))
    assert len(seen) == calls


@pytest.mark.parametrize("size", [1, 3, 7, S, 2 * S + 1, 38])
@pytest.mark.parametrize("sizes", VARIANTS[:3], ids=str)
def test_decoding_and_prefill_in_blocks(sizes, size):
    """Blocks of any size, at any offset in a chunk, see the keys so far as the whole prompt's prefill does."""
    tensors = inputs(5 * S + 3)
    expected = reference(*tensors, sizes)
    for first in range(0, 5 * S + 3, size):
        seen = [x[:, :, : first + size] for x in tensors]
        assert_close(run(*seen, sizes, first=first), expected[:, :, first : first + size])


@pytest.mark.parametrize("length,kv_heads,first", [(S, 4, 0), (2 * S, 1, 0), (4 * S + 3, 2, 0), (4 * S + 3, 2, S + 4)])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(length, kv_heads, first, recompute):
    method = partial(run, first=first)
    assert_same_with_gradients(
        (lambda *x: checkpoint(method, *x, use_reentrant=False)) if recompute else method,
        lambda *x: reference(*x)[:, :, first:],
        inputs(length, batch=2, kv_heads=kv_heads),
    )


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision(dtype, tolerance):
    query, key, value = inputs(5 * S + 3)
    tensors = [x.detach().to(dtype).requires_grad_() for x in (*rotated(query, key), value)]
    assert attend(*tensors).dtype == dtype
    assert all(x.dtype == dtype for x in torch.autograd.grad(attend(*tensors).sum(), tensors))
    assert_same_with_gradients(attend, attend, tensors, tolerance)


def test_under_autocast_it_computes_in_its_dtype_as_sdpa_does():
    query, key, value = (x.detach().float().requires_grad_() for x in inputs(3 * S))
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(query, key.bfloat16(), value)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.any() for x in (query, key, value))


@pytest.mark.parametrize("length", [1, S - 1, S, S + 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_within_one_chunk_it_is_plain_attention_to_the_bit(length, dtype):
    tensors = inputs(length, batch=2, dtype=dtype)
    assert torch.equal(attend(*tensors), causal_attention(*tensors)) == (length <= S)


@pytest.mark.parametrize("length", [S, 3 * S + 4, 4 * S])
def test_changed_future_changes_nothing_before(length):
    tensors = [x.detach() for x in inputs(length)]
    before = attend(*tensors)
    for token in range(length):
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[:, :, token:] += 1.0
        after = attend(*changed)
        assert torch.equal(after[:, :, :token], before[:, :, :token])
        assert not torch.equal(after[:, :, token], before[:, :, token])


def test_huge_and_tiny_logits_stay_finite():
    query, key, value = inputs(3 * S, kv_heads=4)
    for factor in (1e4, 1e-30):
        assert_close(run(query * factor, key, value), reference(query * factor, key, value), 1e-7)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rotate(dtype, tolerance):
    query, deltas = inputs(9)[0], torch.tensor([0, 1, 5, 11, 2, -3, 7, 7, 100])
    for num_freqs in (2, 4):
        found = rotate(query.to(dtype), deltas, FREQUENCIES[:num_freqs])
        assert found.dtype == dtype
        assert_close(found, rope(query, deltas, FREQUENCIES[:num_freqs]), tolerance)
        assert torch.equal(found[..., 2 * num_freqs :], query.to(dtype)[..., 2 * num_freqs :])


def test_frequencies_changed_in_place_are_seen():
    tensors, inv_freq = inputs(3 * S), FREQUENCIES.clone()
    run(*tensors, inv_freq=inv_freq)
    inv_freq /= 2
    assert_close(run(*tensors, inv_freq=inv_freq), reference(*tensors, inv_freq=inv_freq))


def test_default_sizes_are_the_authors():
    sizes = DualChunkSizes(4096)
    assert (sizes.chunk_size, sizes.local_window, sizes.stride, sizes.inter_position) == (3072, 512, 2560, 3072)
    assert DualChunkSizes(4096, local_window=256).stride == 2816
    assert DualChunkSizes(4096, 1000, 600).inter_position == 799


BAD_SIZES = {
    "pretraining_length": [(4,), (0,), (-16,), (None,), (16.0,), ("16",), (True,)],
    "chunk_size": [(16, 0), (16, 17), (16, 12.5)],
    "local_window": [(16, 12, 12), (16, 12, 0), (16, 2), (16, 12, -1), (16, 12, "2")],
}


@pytest.mark.parametrize("name,sizes", [(name, sizes) for name, group in BAD_SIZES.items() for sizes in group])
def test_bad_sizes_name_the_setting(name, sizes):
    with pytest.raises(ValueError, match=f"^{name}: "):
        DualChunkSizes(*sizes)


def test_bad_calls():
    query, key, value = inputs(12)
    ids = torch.zeros(1, 12, dtype=torch.long)
    for segment_ids in (None, ids):
        with pytest.raises(ValueError, match="12 queries cannot be the last of 11"):
            attend(query, key[:, :, 1:], value[:, :, 1:], segment_ids=segment_ids)
        with pytest.raises(ValueError, match="inv_freq"):
            attend(query, key, value, segment_ids=segment_ids, inv_freq=torch.ones(5))
    with pytest.raises(ValueError, match="segment_ids"):
        attend(query, key, value, segment_ids=ids[:, 1:])


def test_mscale():
    assert attention_mscale(4096, 4096) == attention_mscale(1, 4096) == 1.0
    assert math.isclose(attention_mscale(4096 * 8, 4096), (0.1 * math.log(8) + 1) ** 2)
    query, key, value = inputs(3 * S)
    factor = attention_mscale(3 * S, 16)
    ours = attend(query, key, value, scaling=factor / math.sqrt(8))
    assert_close(ours, attend(query * math.sqrt(factor), key * math.sqrt(factor), value))


def padded_ids(*ranges):
    """One row of segment ids: the ranges are segments 0, 1, ..., all else is padding."""
    ids = torch.full((44,), -1)
    for number, (start, stop) in enumerate(ranges):
        ids[start:stop] = number
    return ids


ROWS = {
    "left, right, both": [padded_ids((9, 44)), padded_ids((0, 35)), padded_ids((3, 41))],
    "packed": [padded_ids((0, 1), (1, 22), (22, 44)), padded_ids((0, 10), (10, 44)), padded_ids((0, 44))],
    "packed and padded": [padded_ids((5, 17), (17, 40)), padded_ids(), padded_ids((4, 5), (8, 30), (33, 44))],
}


@pytest.mark.parametrize("first", [0, 1, 17, 43])
@pytest.mark.parametrize("rows", ROWS)
def test_segments_equal_their_sequences_alone(rows, first):
    """Padded and packed rows, whole or their last slots only, forward and backward; padding gives zeros."""
    ids = torch.stack(ROWS[rows])

    def alone(query, key, value):
        output = torch.zeros_like(query)
        for row, values in enumerate(ids.tolist()):
            for number in sorted(set(values) - {-1}):
                start, end = values.index(number), len(values) - values[::-1].index(number)
                begin = max(first, start)
                if begin < end:
                    kv = (x[row : row + 1, :, start:end] for x in (key, value))
                    output[row, :, begin:end] = attend(query[row : row + 1, :, begin:end], *kv)[0]
        return output[:, :, first:]

    method = lambda query, *kv: attend(query[:, :, first:], *kv, segment_ids=ids)  # noqa: E731
    tensors = inputs(44, batch=3)
    assert_same_with_gradients(method, alone, tensors)
    assert not method(*tensors).transpose(1, 2)[ids[:, first:] < 0].any()


def test_equal_ids_apart_are_sequences_of_their_own():
    tensors = inputs(30)
    output = attend(*tensors, segment_ids=torch.tensor([[0] * 15 + [-1] + [0] * 14]))
    assert_close(output[:, :, 16:], attend(*(x[:, :, 16:] for x in tensors)))


def test_what_stands_in_padding_reaches_nothing():
    ids = torch.stack(ROWS["left, right, both"])
    tensors = [x.detach() for x in inputs(44, batch=3)]
    before = attend(*tensors, segment_ids=ids)
    for x in tensors:
        x.transpose(1, 2)[ids < 0] = math.nan
    assert torch.equal(attend(*tensors, segment_ids=ids), before)
