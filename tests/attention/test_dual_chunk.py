"""DCA against a dense reference in float64, written from the paper: prefill, decoding, blocks, gradients."""

import math
from functools import partial

import attention_reference as reference
import pytest
import torch
from attention_reference import assert_close, assert_same_with_gradients, dual_chunk_reference

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
inputs = partial(reference.random_qkv, dim=8)
# Of tensors that count as rotated.
attend = partial(dual_chunk_attention, inv_freq=FREQUENCIES, sizes=SIZES)


def run(query, key, value, sizes=SIZES, inv_freq=FREQUENCIES, first=0):
    """DCA of the positions from `first` on, of un-rotated tensors."""
    positions = torch.arange(key.shape[2]) % sizes.stride
    query, key = (reference.rope(x, positions, inv_freq) for x in (query, key))
    return dual_chunk_attention(query[:, :, first:], key, value, inv_freq=inv_freq, sizes=sizes)


# (length, first query, key/value heads, sizes, number of frequencies, rows per block)
CASES = {
    **{f"{length} tokens": [(length, first, kv_heads, SIZES, 4, 8192) for kv_heads in (1, 2, 4)
                            for first in {0, length // 3}] for length in LENGTHS},
    **{str(sizes): [(43, 0, 2, sizes, num_freqs, 8192) for num_freqs in (1, 3, 4)] for sizes in VARIANTS},
    "blocks of chunks": [(7 * S + 3, 0, 2, SIZES, 4, rows) for rows in (1, S, 2 * S, 3 * S + 1)],
}  # fmt: skip


@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_equals_the_reference(cases, monkeypatch):
    for length, first, kv_heads, sizes, num_freqs, rows in cases:
        monkeypatch.setattr(dca, "ROWS_PER_BLOCK", rows)
        frequencies = FREQUENCIES[:num_freqs]
        method = partial(run, sizes=sizes, inv_freq=frequencies, first=first)
        dense = lambda *x: dual_chunk_reference(*x, sizes, frequencies)[:, :, first:]  # noqa: B023, E731
        assert_same_with_gradients(method, dense, inputs(length, batch=2, kv_heads=kv_heads))


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
    assert_same_with_gradients(attend, attend, inputs(5 * S + 3, dtype=dtype), tolerance)


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
def test_no_token_sees_a_later_one(length):
    reference.assert_causal(attend, inputs(length))


def test_huge_and_tiny_logits_stay_finite():
    query, *others = inputs(3 * S, kv_heads=4)
    for factor in (1e4, 1e-30):
        tensors = query * factor, *others
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
    assert math.isclose(attention_mscale(4096 * 8, 4096, "attn_replace"), (0.05 * math.log(8) + 1) ** 2)


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
