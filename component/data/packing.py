"""Packed rows: where they begin and end among the tokens of all documents, and what stands in them."""

from typing import Any

import numpy as np
import pyarrow as pa

from longqlora.settings.config import IGNORE_INDEX


def pack(lengths: np.ndarray, max_seq_length: int, *, split: bool) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of each packed row among the tokens of all documents, int64 [num_rows] each.

    lengths: tokens of each document, int [n]. split: a document that does not fit goes on in the next row, so every
    row but the last is full. Otherwise it starts the next row, and no document may be longer than a row. A row of
    nothing but first tokens is left out: none is predicted, and the loss of its batch would be 0 / 0.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    bounds = [0, *range(max_seq_length, ends[-1], max_seq_length)] if split else [0]
    while bounds[-1] < ends[-1] and not split:
        bounds.append(ends[np.searchsorted(ends, bounds[-1] + max_seq_length, side="right") - 1])
        assert bounds[-1] > bounds[-2], "a document longer than a row"
    bounds = np.unique([*bounds, ends[-1]])
    num_pieces = np.diff(np.searchsorted(np.union1d(bounds, ends), bounds))
    predicts = np.diff(bounds) > num_pieces
    return bounds[:-1][predicts], bounds[1:][predicts]


def packed_row(
    row: dict[str, int], *, input_ids: pa.ChunkedArray, labels: pa.ChunkedArray, document_ends: np.ndarray | None
) -> dict[str, Any]:
    """The row of tokens {"start", "stop"} of all documents. document_ends: None joins them; otherwise they are apart.

    Apart, positions restart at 0 in each piece of a document, and the first label of each is -100: the model would
    predict that token from the document before it.
    """
    start, length = row["start"], row["stop"] - row["start"]
    columns = {"input_ids": input_ids.slice(start, length).to_numpy()}
    labels = labels.slice(start, length).to_numpy()
    if document_ends is not None:
        first, last = np.searchsorted(document_ends, [start, row["stop"]], side="right")
        pieces = np.union1d(document_ends[first:last], [start, row["stop"]])[:-1] - start
        labels = labels.copy()
        labels[pieces] = IGNORE_INDEX
        starts = np.repeat(pieces, np.diff([*pieces, length])).astype(np.int32)
        columns["position_ids"] = np.arange(length, dtype=np.int32) - starts
    return {**columns, "labels": labels, "num_predicted": np.count_nonzero(labels[1:] != IGNORE_INDEX)}
