"""Batches: padding known from lengths, and packed rows without a mask."""

import copy

import pytest
import torch

from longqlora.data.collator import DataCollator


def row(ids, **columns):
    return {"input_ids": ids, "labels": list(ids), **columns}


def test_pads_right_to_the_longest(tiny_tokenizer):
    batch = DataCollator(tiny_tokenizer)([row([1, 5, 6, 2]), row([1, 7])])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 2], [1, 7, 3, 3]]
    assert batch["labels"].tolist() == [[1, 5, 6, 2], [1, 7, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_mask_comes_from_lengths_where_pad_is_eos(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    batch = DataCollator(tokenizer)([row([1, 5, 2]), row([1, 5, 6, 2])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[1, 5, 2, -100], [1, 5, 6, 2]]


def test_needs_no_pad_token(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    assert DataCollator(tokenizer).pad_token_id == tokenizer.unk_token_id
    tokenizer.unk_token = None
    assert DataCollator(tokenizer)([row([1, 5]), row([1])])["input_ids"].tolist() == [[1, 5], [1, 0]]


def test_single_row_has_a_mask_of_ones(tiny_tokenizer):
    batch = DataCollator(tiny_tokenizer)([row([1, 3, 2])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]


def test_packed_rows_have_positions_and_no_mask(tiny_tokenizer):
    rows = [row([1, 5, 2, 1, 2], position_ids=[0, 1, 2, 0, 1]), row([1, 2], position_ids=[0, 1])]
    batch = DataCollator(tiny_tokenizer)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist()[1] == [1, 2, -100, -100, -100]


def test_mixed_batch_is_a_defect(tiny_tokenizer):
    with pytest.raises(AssertionError, match="packed"):
        DataCollator(tiny_tokenizer)([row([1], position_ids=[0]), row([1])])


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
