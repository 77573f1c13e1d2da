"""S2-Attn against an independent dense-mask reference in float64: forward, backward, causality.

Tolerance: 1e-10 in fp64 (absolute, on outputs and gradients of order one), 2e-5 in fp32, 2e-2 in bf16.
"""

import math

import pytest
import torch

from longqlora.attention.segments import document_lengths
from longqlora.attention.shift_short import cut, group_sizes, shift_short_attention

G = 8


def reference(query, key, value, group_size, segment_ids=None):
    """Every pair of tokens in three loops' worth of masks: the definition, with no thought of speed."""
    batch, heads, length, dim = query.shape
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    value = value.repeat_interleave(heads // value.shape[1], dim=1)
    allowed = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for head in range(heads):
        shift = group_size // 2 if head >= heads // 2 else 0
        # Half groups at both ends: token t of a shifted head is in group (t + G/2) // G.
        group = (torch.arange(length) + shift) // group_size
        allowed[:, head] = (group[:, None] == group[None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        allowed &= same[:, None]
    scores = query @ key.transpose(-1, -2) / math.sqrt(dim)
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ value


def inputs(batch, heads, kv_heads, length, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, h, 16) for h in (heads, kv_heads, kv_heads)]
    # As the model makes them: [B, S, H, D] in memory.
    return [torch.randn(s, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes]


def assert_equal_with_gradients(tensors, group_size, tolerance, segment_ids=None, real=None, **known):
    """known: `documents` in place of the segment ids that the reference gets."""
    output = shift_short_attention(*tensors, group_size, **(known or {"segment_ids": segment_ids}))
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = reference(*exact, group_size, segment_ids)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if real is not None:
        weights = weights * real[:, None, :, None]
        output, expected = output * real[:, None, :, None], expected * real[:, None, :, None]
    assert torch.allclose(output.double(), expected, rtol=0, atol=tolerance)
    (output.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(tensors, exact, strict=True):
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=0, atol=tolerance * 4)


@pytest.mark.parametrize("length", range(1, 4 * G + 1))
def test_every_length_up_to_four_groups(length):
    assert_equal_with_gradients(inputs(1, 4, 4, length), G, 1e-10)


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (4, 1), (6, 3), (6, 2), (2, 2), (2, 1), (12, 6), (10, 5)])
@pytest.mark.parametrize("length", [3, 8, 19, 24, 29])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batches_and_grouped_heads(batch, heads, kv_heads, length):
    assert_equal_with_gradients(inputs(batch, heads, kv_heads, length), G, 1e-10)


@pytest.mark.parametrize("group_size", [2, 6, 10, 64])
def test_other_group_sizes(group_size):
    assert_equal_with_gradients(inputs(2, 4, 2, 23), group_size, 1e-10)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype, tolerance):
    assert_equal_with_gradients(inputs(2, 4, 2, 27, dtype), G, tolerance)


ROWS_OF_SEVERAL = {
    "left padding": [[-1] * 5 + [0] * 16, [0] * 21, [-1] * 13 + [0] * 8],
    "documents": [[0] * 5 + [1] * 11 + [2] * 5, [0] * 21, [0] * 8 + [1] * 8 + [2] * 4 + [3]],
    "single tokens": [list(range(21)), [0] * 20 + [1], [0] + [1] * 20],
    "padding on both sides": [[-1] * 4 + [0] * 5 + [1] * 9 + [-1] * 3] * 3,
}


@pytest.mark.parametrize("needs_mask", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", ROWS_OF_SEVERAL.values(), ids=ROWS_OF_SEVERAL)
def test_rows_of_several_documents(rows, kv_heads, needs_mask):
    segment_ids = torch.tensor(rows)
    known = {} if needs_mask else {"documents": document_lengths(segment_ids)}
    real = (segment_ids >= 0).double()
    assert_equal_with_gradients(inputs(3, 4, kv_heads, 21), G, 1e-10, segment_ids, real, **known)


def test_lengths_of_documents():
    rows = [[-1, -1, 0, 0, 0, 1], [0, 1, 1, 2, -1, -1]]
    assert document_lengths(torch.tensor(rows)) == ((2, 3, 1), (1, 2, 1, 2))
    assert document_lengths(torch.tensor([[0, 0, -1, 0, 1, 1]])) is None, "a document around a hole"
    ids = torch.tensor([[0, 0, 1]])
    assert document_lengths(ids) == ((2, 1),)
    ids[0, 1] = 1
    assert document_lengths(ids) == ((1, 2),), "changed in place"
    assert cut([4, 8, 8, 3], [6, 6, 11]) == [4, 2, 6, 8, 3]
    assert cut([8], [8]) == [8]


def test_right_padding_needs_no_mask():
    tensors = inputs(2, 4, 2, 27)
    short = [x.detach()[:, :, :17] for x in tensors]
    padded, alone = shift_short_attention(*tensors, G), shift_short_attention(*short, G)
    assert torch.allclose(padded[:, :, :17], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [8, 13, 24, 31])
def test_changed_future_changes_nothing_before(length):
    tensors = [x.detach() for x in inputs(1, 4, 2, length)]
    before = shift_short_attention(*tensors, G)
    for token in range(length):
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[:, :, token] += 1.0
        after = shift_short_attention(*changed, G)
        assert torch.equal(after[:, :, :token], before[:, :, :token])
        assert not torch.equal(after[:, :, token], before[:, :, token])


def test_shifted_heads_cross_group_borders():
    tensors = [x.detach() for x in inputs(1, 4, 4, 2 * G)]
    changed = [x.clone() for x in tensors]
    changed[2][:, :, G - 1] += 1.0
    moved = (shift_short_attention(*changed, G) - shift_short_attention(*tensors, G)).abs().amax(-1)[0] > 0
    assert not moved[:2, G:].any() and moved[2:, G : G + G // 2].all() and not moved[2:, G + G // 2 :].any()


def test_group_sizes():
    assert group_sizes(32, 8, shifted=False) == [8, 8, 8, 8]
    assert group_sizes(32, 8, shifted=True) == [4, 8, 8, 8, 4]
    assert group_sizes(3, 8, shifted=True) == [3]
    assert group_sizes(21, 8, shifted=True) == [4, 8, 8, 1]


@pytest.mark.parametrize("heads,group_size", [(3, 8), (4, 7), (4, 0), (4, -2)])
def test_refuses_what_is_not_defined(heads, group_size):
    with pytest.raises(ValueError, match="S2-Attn"):
        shift_short_attention(*inputs(1, heads, heads, 8), group_size)


def test_uses_views_of_a_single_row(monkeypatch):
    """At batch size one no group is copied: every kernel input shares memory with the caller's tensors."""
    tensors = [x.detach() for x in inputs(1, 4, 4, 4 * G)]
    storages = {x.untyped_storage().data_ptr() for x in tensors}
    seen = []

    def kernel(query, key, value, *, mask=None, **kwargs):
        seen.extend(x.untyped_storage().data_ptr() for x in (query, key, value))
        return query

    shift_short_attention(*tensors, G, kernel=kernel)
    assert seen and set(seen) <= storages
