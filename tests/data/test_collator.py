"""Batches: padding known from lengths, and packed rows without a mask."""

import copy

import pytest
import torch

from longqlora.data.collator import DataCollator


def row(ids, **columns):
    return {"input_ids": ids, "labels": list(ids), **columns}


@pytest.mark.parametrize(("pad", "pad_id"), [("<pad>", 3), ("</s>", 2), (None, 0)])
def test_pads_right_to_the_longest_whatever_the_pad_token(tiny_tokenizer, pad, pad_id):
    tokenizer = copy.deepcopy(tiny_tokenizer)
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


@pytest.mark.parametrize("packed", [False, True])
def test_padding_does_not_change_the_loss(tiny_tokenizer, tiny_model_dir, packed):
    """The loss of a short row is the same alone and beside a longer one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    short, longer = [1, 20, 21, 22, 2], list(range(30, 40))
    rows = [row(ids, **({"position_ids": list(range(len(ids)))} if packed else {})) for ids in (short, longer)]
    collator = DataCollator(tiny_tokenizer)
    with torch.no_grad():
        alone = model(**collator(rows[:1])).logits[0]
        beside = model(**collator(rows)).logits[0, : len(short)]
    torch.testing.assert_close(alone, beside)
