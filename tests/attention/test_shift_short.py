"""S2-Attn against dense attention under an explicit mask in float64: forward, backward, causality."""

from functools import partial
from itertools import product

import pytest
import torch
from attention_reference import assert_causal, assert_same_with_gradients, random_qkv, shift_short_reference

from longqlora.attention import shift_short
from longqlora.attention.segments import segment_lengths, segments_of
from longqlora.attention.shift_short import shift_short_attention

G = 8
FP64 = (torch.float64, 1e-10)
HEADS = [(4, 4), (4, 2), (4, 1), (6, 3), (6, 2), (2, 2), (2, 1), (12, 6), (10, 5)]
# (batch, (heads, key/value heads), length, group size, (dtype, tolerance))
CASES = {
    "length": [(1, (4, 4), length, G, FP64) for length in range(1, 4 * G + 1)],
    "heads": list(product((1, 2, 3), HEADS, (3, 8, 19, 24, 29), [G], [FP64])),
    "group": [(2, (4, 2), 23, group_size, FP64) for group_size in (2, 6, 10, 64)],
    "dtype": [(2, (4, 2), 27, G, kind) for kind in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2))],
}


@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_equals_the_reference(cases):
    for batch, (heads, kv_heads), length, group_size, (dtype, tolerance) in cases:
        tensors = random_qkv(length, batch=batch, heads=heads, kv_heads=kv_heads, dtype=dtype)
        method, expected = (partial(f, group_size=group_size) for f in (shift_short_attention, shift_short_reference))
        assert_same_with_gradients(method, expected, tensors, tolerance)


ROWS_OF_SEVERAL = {
    "left padding": [[-1] * 5 + [0] * 16, [0] * 21, [-1] * 13 + [0] * 8],
    "documents": [[0] * 5 + [1] * 11 + [2] * 5, [0] * 21, [0] * 8 + [1] * 8 + [2] * 4 + [3]],
    "single tokens": [list(range(21)), [0] * 20 + [1], [0] + [1] * 20],
    "padding on both sides": [[-1] * 4 + [0] * 5 + [1] * 9 + [-1] * 3] * 3,
    "a hole in a document": [[0] * 9 + [-1] * 2 + [0] * 10, [0] * 21, [0] * 12 + [1] * 4 + [0] * 5],
}


@pytest.mark.parametrize("by_mask", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", ROWS_OF_SEVERAL)
def test_rows_of_several_documents(rows, kv_heads, by_mask, monkeypatch):
    """Document by document, where no mask is made, and by masks, which only rows with a hole need."""
    if by_mask:
        monkeypatch.setattr(shift_short, "segment_lengths", lambda segment_ids: None)
    elif "hole" not in rows:
        monkeypatch.setattr(shift_short, "segment_mask", None)
    segment_ids = torch.tensor(ROWS_OF_SEVERAL[rows])
    options = {"group_size": G, "segment_ids": segment_ids}
    methods = partial(shift_short_attention, **options), partial(shift_short_reference, **options)
    real = (segment_ids >= 0).double()[:, None, :, None]
    assert_same_with_gradients(*methods, random_qkv(21, batch=3, kv_heads=kv_heads), rows=real)


def test_segments():
    rows = [[-1, -1, 0, 0, 0, 1], [0, 1, 1, 2, -1, -1]]
    assert segment_lengths(torch.tensor(rows)) == ((2, 3, 1), (1, 2, 1, 2))
    assert segment_lengths(torch.tensor([[0, 0, -1, 0, 1, 1]])) is None, "a document around a hole"
    ids = torch.tensor([[0, 0, 1]])
    assert segment_lengths(ids) == ((2, 1),)
    ids[0, 1] = 1
    assert segment_lengths(ids) == ((1, 2),), "changed in place"
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [5, 6, 7, 8, 9, 10, 11, 12]])
    assert segments_of(positions).tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0] * 8]


@pytest.mark.parametrize("length", [8, 13, 24, 31])
def test_no_token_sees_a_later_one(length):
    assert_causal(partial(shift_short_attention, group_size=G), random_qkv(length))


@pytest.mark.parametrize("heads,group_size", [(3, 8), (4, 7), (4, 0), (4, -2)])
def test_refuses_what_is_not_defined(heads, group_size):
    with pytest.raises(ValueError, match="S2-Attn"):
        shift_short_attention(*random_qkv(8, heads=heads, kv_heads=heads), group_size)


def test_uses_views_of_a_single_row():
    """At batch size one no group is copied: every kernel input shares memory with the caller's tensors."""
    tensors = [x.detach() for x in random_qkv(4 * G, kv_heads=4)]
    seen = []

    def kernel(query, key, value, *, mask=None, **kwargs):
        seen.extend(x.untyped_storage().data_ptr() for x in (query, key, value))
        return query

    shift_short_attention(*tensors, G, kernel=kernel)
    assert seen and set(seen) <= {x.untyped_storage().data_ptr() for x in tensors}
