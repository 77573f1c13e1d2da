"""DCA against an independent dense reference in float64, written from the paper: prefill, decoding, blocks, gradients.

Tolerance: 1e-10 in fp64 on outputs, 1e-9 on gradients; 2e-5 in fp32 and 3e-2 in bf16 (values of order one)."""

import math
from functools import partial

import pytest
import torch
from attention_reference import assert_close, assert_same_with_gradients, dual_chunk_reference, random_qkv, rope

from longqlora.attention import dual_chunk as dca
from longqlora.attention import merged
from longqlora.attention.dual_chunk import DualChunkSizes, attention_mscale, dual_chunk_attention
from longqlora.attention.sdpa import causal_attention

SIZES = DualChunkSizes(16)  # chunk_size 12, local_window 2, s 10
S = SIZES.stride
LENGTHS = [1, 2, S - 1, S, S + 1, 2 * S - 1, 2 * S, 2 * S + 1, 3 * S, 3 * S + 4, 5 * S + 3]
# chunk_size 12 and window 8: s = 4 and 2 s - 1 = 7 < 12, so that the largest query position is below chunk_size.
VARIANTS = [SIZES, DualChunkSizes(16, 12, 8), DualChunkSizes(16, 15, 1), DualChunkSizes(16, 3, 2), DualChunkSizes(64)]
FREQUENCIES = 0.9 ** torch.arange(4, dtype=torch.float64)
inputs = partial(random_qkv, dim=8)


attend = partial(dual_chunk_attention, inv_freq=FREQUENCIES, sizes=SIZES)


def rotated(query, key, sizes=SIZES, inv_freq=FREQUENCIES):
    positions = torch.arange(key.shape[2]) % sizes.stride
    return rope(query, positions, inv_freq), rope(key, positions, inv_freq)


def run(query, key, value, sizes=SIZES, inv_freq=FREQUENCIES, first=0):
    """DCA of the positions from `first` on, of un-rotated tensors."""
    query, key = rotated(query, key, sizes, inv_freq)
    return dual_chunk_attention(query[:, :, first:], key, value, inv_freq=inv_freq, sizes=sizes)


def check(length, *, kv_heads=2, first=0, sizes=SIZES, inv_freq=FREQUENCIES):
    """Outputs and gradients are the reference's."""
    assert_same_with_gradients(
        lambda *x: run(*x, sizes, inv_freq, first),
        lambda *x: dual_chunk_reference(*x, sizes, inv_freq)[:, :, first:],
        inputs(length, batch=2, kv_heads=kv_heads),
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_and_heads(length, kv_heads):
    for first in {0, length // 3}:
        check(length, kv_heads=kv_heads, first=first)


@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
def test_sizes_and_partial_rotation(sizes):
    for num_freqs in (1, 3, 4):
        check(43, sizes=sizes, inv_freq=FREQUENCIES[:num_freqs])


@pytest.mark.parametrize("rows", [1, S, 2 * S, 3 * S + 1])
def test_blocks_of_chunks(monkeypatch, rows):
    """However many chunks share a block, the result is the same."""
    monkeypatch.setattr(dca, "ROWS_PER_BLOCK", rows)
    check(7 * S + 3)


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
    expected = dual_chunk_reference(*tensors, sizes, FREQUENCIES)
    for first in range(0, 5 * S + 3, size):
        seen = [x[:, :, : first + size] for x in tensors]
        assert_close(run(*seen, sizes, first=first), expected[:, :, first : first + size])


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
        tensors = query * factor, key, value
        assert_close(run(*tensors), dual_chunk_reference(*tensors, SIZES, FREQUENCIES), 1e-7)


def test_frequencies_changed_in_place_are_seen():
    tensors, inv_freq = inputs(3 * S), FREQUENCIES.clone()
    run(*tensors, inv_freq=inv_freq)
    inv_freq /= 2
    assert_close(run(*tensors, inv_freq=inv_freq), dual_chunk_reference(*tensors, SIZES, inv_freq))


def test_default_sizes_and_scaling_are_the_authors():
    sizes = DualChunkSizes(4096)
    assert (sizes.chunk_size, sizes.local_window, sizes.stride, sizes.inter_position) == (3072, 512, 2560, 3072)
    assert DualChunkSizes(4096, local_window=256).stride == 2816
    assert DualChunkSizes(4096, 1000, 600).inter_position == 799
    assert attention_mscale(4096, 4096) == attention_mscale(1, 4096) == 1.0
    assert math.isclose(attention_mscale(4096 * 8, 4096), (0.1 * math.log(8) + 1) ** 2)


BAD_SIZES = {
    "pretraining_length": [(4,), (0,), (-16,), (None,), (16.0,), ("16",), (True,)],
    "chunk_size": [(16, 0), (16, 17), (16, 12.5)],
    "local_window": [(16, 12, 12), (16, 12, 0), (16, 2), (16, 12, -1), (16, 12, "2")],
}


@pytest.mark.parametrize("name,sizes", [(name, sizes) for name, group in BAD_SIZES.items() for sizes in group])
def test_bad_sizes_name_the_setting(name, sizes):
    with pytest.raises(ValueError, match=f"^{name}: "):
        DualChunkSizes(*sizes)


# Each row's sequences; all else is padding.
ROWS = {
    "left, right, both": [[(9, 44)], [(0, 35)], [(3, 41)]],
    "packed": [[(0, 1), (1, 22), (22, 44)], [(0, 10), (10, 44)], [(0, 44)]],
    "packed and padded": [[(5, 17), (17, 40)], [], [(4, 5), (8, 30), (33, 44)]],
}


@pytest.mark.parametrize("first", [0, 1, 17, 43])
@pytest.mark.parametrize("rows", ROWS)
def test_segments_equal_their_sequences_alone(rows, first):
    """Whole rows or their last slots, forward and backward; padding gives zeros, and what stands in it no effect."""
    ids = torch.full((3, 44), -1)
    for row, ranges in enumerate(ROWS[rows]):
        for number, (start, end) in enumerate(ranges):
            ids[row, start:end] = number % 2  # equal ids apart are sequences of their own

    def alone(query, key, value):
        output = torch.zeros_like(query)
        for row, ranges in enumerate(ROWS[rows]):
            for start, end in ranges:
                query_start = max(first, start)
                if query_start < end:
                    kv = (x[row : row + 1, :, start:end] for x in (key, value))
                    output[row, :, query_start:end] = attend(query[row : row + 1, :, query_start:end], *kv)[0]
        return output[:, :, first:]

    method = lambda query, *kv: attend(query[:, :, first:], *kv, segment_ids=ids)  # noqa: E731
    tensors = inputs(44, batch=3)
    assert_same_with_gradients(method, alone, tensors)
    tensors = [x.detach() for x in tensors]
    before = method(*tensors)
    assert not before.transpose(1, 2)[ids[:, first:] < 0].any()
    for x in tensors:
        x.transpose(1, 2)[ids < 0] = math.nan
    assert torch.equal(method(*tensors), before)
