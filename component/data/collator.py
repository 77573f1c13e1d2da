"""Batches of rows of unequal length. B batch, S sequence (the longest row of the batch)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from longqlora.data.prompt import IGNORE_INDEX
from longqlora.distributed import rank


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
        """Return int64 [B, S] tensors.

        Rows with input_ids and labels give input_ids, labels and attention_mask (1 token, 0 padding). Packed rows,
        which also have position_ids, give those and no attention_mask: documents are told apart by positions that
        restart at 0, and the padding is one more document. Rows to be shared by several processes have position_ids
        in either case, for what a process holds is no whole row.
        """
        lengths = [len(row["input_ids"]) for row in rows]
        shape = (len(rows), -(-max(lengths) // self.num_parts) * self.num_parts)
        packed = "position_ids" in rows[0]
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORE_INDEX),
        }
        if packed:
            batch["position_ids"] = torch.zeros(shape, dtype=torch.long)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            assert ("position_ids" in row) == packed, "packed and other rows in one batch"
            for name, values in batch.items():
                values[index, :length] = torch.as_tensor(row[name])
            if packed:
                batch["position_ids"][index, length:] = torch.arange(shape[1] - length)
        if not packed and self.num_parts > 1:
            batch["position_ids"] = torch.arange(shape[1]).repeat(len(rows), 1)
        elif not packed:
            batch["attention_mask"] = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
        return batch


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
