"""Batches: padding known from lengths, and packed rows without a mask."""

import pytest
import torch

from longqlora.data.collator import DataCollator


def row(ids, **columns):
    return {"input_ids": ids, "labels": list(ids), **columns}


@pytest.mark.parametrize(("pad", "pad_id"), [("<pad>", 3), ("</s>", 2), (None, 0)])
def test_pads_right_to_the_longest_whatever_the_pad_token(tokenizer, pad, pad_id):
    tokenizer.pad_token = pad
    batch = DataCollator(tokenizer)([row([1, 5, 6, 2]), row([1, 2])])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 5, 6, 2], [1, 2, pad_id, pad_id]],
        "labels": [[1, 5, 6, 2], [1, 2, -100, -100]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
    }
    assert all(tensor.dtype == torch.long for tensor in batch.values())


@pytest.mark.parametrize(("num_parts", "padding"), [(1, []), (4, [3, 4, 5])])
def test_packed_rows_have_positions_and_no_mask(tiny_tokenizer, num_parts, padding):
    rows = [row([1, 5, 2, 1, 2], position_ids=[0, 1, 2, 0, 1]), row([1, 2], position_ids=[0, 1])]
    batch = DataCollator(tiny_tokenizer, num_parts=num_parts)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, *range(len(padding))], [0, 1, 0, 1, 2, *padding]]
    assert batch["labels"].tolist()[1] == [1, 2] + [-100] * (3 + len(padding))
    with pytest.raises(AssertionError, match="packed"):
        DataCollator(tiny_tokenizer)([rows[0], row([1])])
