"""Batches of rows of unequal length. B batch, S sequence (the longest row of the batch)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from longqlora.distributed import rank
from longqlora.settings.config import IGNORE_INDEX


class DataCollator:
    """Pads rows on the right to the longest of the batch.

    Padding is known from the lengths of the rows, never from ids: where a tokenizer pads with its EOS, the EOS that
    ends a row stays a label and stays visible.
    """

    def __init__(self, tokenizer: Any, *, num_parts: int = 1) -> None:
        """num_parts: processes that share a row; its length is then a multiple of that, its positions are told."""
        self.num_parts = num_parts
        pad, unk = tokenizer.pad_token_id, tokenizer.unk_token_id
        # Any id does, since no label and no attention reaches padding.
        self.pad_token_id = pad if pad is not None else unk if unk is not None else 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """int64 [B, S] input_ids, labels and attention_mask (1 token, 0 padding).

        Packed rows have position_ids instead of the mask: documents are told apart by positions that restart at 0, and
        the padding is one more document. So have rows that several processes share, each of which holds a part.
        """
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])[:, None]
        packed = "position_ids" in rows[0]
        assert all(("position_ids" in row) == packed for row in rows), "packed and other rows in one batch"
        length = -(-int(lengths.max()) // self.num_parts) * self.num_parts
        places = torch.arange(length).repeat(len(rows), 1)
        is_token = places < lengths
        batch = {}
        for name, fill in (("input_ids", self.pad_token_id), ("labels", IGNORE_INDEX)):
            batch[name] = torch.full_like(places, fill)
            batch[name][is_token] = torch.cat([torch.as_tensor(row[name]).long() for row in rows])
        if packed:
            places -= lengths
            places[is_token] = torch.cat([torch.as_tensor(row["position_ids"]).long() for row in rows])
        if packed or self.num_parts > 1:
            return {**batch, "position_ids": places}
        return {**batch, "attention_mask": is_token.long()}


class PartCollator:
    """Collates whole rows, then keeps this process's part of each."""

    def __init__(self, collator: Callable[[Any], dict[str, torch.Tensor]], size: int) -> None:
        self.collator, self.size, self.part = collator, size, rank() % size

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        """int64 [B, S / size] input_ids, position_ids and shift_labels (each token's next).

        Also labels [B, S / size + 1] for those who shift or count them, the first, which no token here predicts, empty.
        """
        batch = self.collator(rows)
        length = batch["input_ids"].shape[1] // self.size
        here = slice(self.part * length, (self.part + 1) * length)
        labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)
        labels = labels[:, here.start : here.stop + 1].clone()
        labels[:, 0] = IGNORE_INDEX
        parts = {name: batch[name][:, here] for name in ("input_ids", "position_ids")}
        return {**parts, "labels": labels, "shift_labels": labels[:, 1:]}
