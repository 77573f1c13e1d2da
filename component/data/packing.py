"""Packing: several documents in one training row, told apart by position ids that restart at 0."""

from collections.abc import Iterable, Iterator

import numpy as np

from longqlora.data.prompt import IGNORE_INDEX


def pack(
    documents: Iterable[tuple[np.ndarray, np.ndarray]], max_seq_length: int, *, split: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Concatenate documents, in order, into rows of at most `max_seq_length` tokens.

    documents: (input_ids, labels) of each, int32 [n]. Rows have input_ids, labels, position_ids, int32 [m].
    split: a document that does not fit is continued in the next row, so every row but the last is full. Otherwise
        it starts the next row, and no document may be longer than a row.

    The first label of each piece is -100: the model would predict that token from the document before it.
    """
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    room = max_seq_length
    for input_ids, labels in documents:
        assert split or len(input_ids) <= max_seq_length
        start = 0
        while start < len(input_ids):
            if room == 0 or (not split and len(input_ids) > room):
                yield packed_row(pieces)
                pieces, room = [], max_seq_length
            piece = slice(start, start + room)
            pieces.append((input_ids[piece], labels[piece]))
            room -= len(pieces[-1][0])
            start += len(pieces[-1][0])
    if pieces:
        yield packed_row(pieces)


def packed_row(pieces: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """One row from the (input_ids, labels) of its pieces."""
    labels = np.concatenate([labels for _, labels in pieces])
    lengths = [len(input_ids) for input_ids, _ in pieces]
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORE_INDEX
    return {
        "input_ids": np.concatenate([input_ids for input_ids, _ in pieces]),
        "labels": labels,
        "position_ids": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
    }
