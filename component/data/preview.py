"""A look at the training data before it is trained on: rows decoded, and how much there is in all."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from longqlora.data.dataset import REPORT_NAME, cache_folder, encode_rows, settings_key
from longqlora.data.packing import pack
from longqlora.data.source import sources_of
from longqlora.files import read_json
from longqlora.settings.config import IGNORE_INDEX, DataConfig

NUM_SHOWN = 2
# Around what is learned.
MARKS = "⟦", "⟧"
# Most tokens of a run that are shown, those at its start and at its end, and most runs of a row.
MAX_SHOWN_TOKENS, NUM_FIRST, NUM_LAST, MAX_RUNS = 120, 80, 40, 12
# How many rows of a source, and tokens, are encoded to tell how much is in all of it.
NUM_SAMPLED, MAX_SAMPLED_TOKENS = 256, 2**20


class DataSize(NamedTuple):
    """Rows and tokens of an epoch, by the first and by evenly spread rows; whether all were read; rows to show."""

    num_rows: int
    num_tokens: int
    is_exact: bool
    shown: list[str]

    def describe(self) -> str:
        about = "" if self.is_exact else "about "
        return f"train_file: {about}{self.num_rows:,} rows, {about}{self.num_tokens:,} tokens"


def show_row(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int]) -> str:
    """A row of ids on one line, decoded, with marks around the tokens that are learned; long runs are shortened."""
    ids, is_learned = np.asarray(input_ids), np.asarray(labels) != IGNORE_INDEX
    # Nothing predicts the first token.
    is_learned[:1] = False
    starts = np.flatnonzero(np.diff(is_learned)) + 1
    parts = []
    for run, learned in zip(np.split(ids, starts), is_learned[[0, *starts]], strict=True):
        pieces = [run] if len(run) <= MAX_SHOWN_TOKENS else [run[:NUM_FIRST], run[-NUM_LAST:]]
        text = " ... ".join(tokenizer.decode(piece.tolist()) for piece in pieces)
        parts.append(text.join(MARKS) if learned else text)
    if len(parts) > MAX_RUNS:
        parts[MAX_RUNS - 2 : -2] = [" ... "]
    text = "".join(parts).replace("\r", "\\r").replace("\n", "\\n")
    return f"{len(ids):,} tokens, {int(is_learned.sum()):,} learned, between {' '.join(MARKS)}: {text}"


def measure(tokenizer: Any, config: DataConfig) -> DataSize:
    """The size of the training data, of what is in the cache exactly, else from a sample of each source's rows."""
    key, shown, num_rows, num_tokens, is_exact = settings_key(tokenizer, config), [], 0.0, 0.0, True
    sources = sources_of(config, "train_file")
    for source, weight in zip(sources, config.train_file_weights or [1] * len(sources), strict=True):
        index, rows = source.places(), []
        total = len(index["number"])
        # The first rows, then others in an order in which every part of it is spread over the source.
        spread = np.random.default_rng(0).permutation(total)[:NUM_SAMPLED]
        for position in dict.fromkeys([*range(min(NUM_SHOWN, total)), *map(int, spread)]):
            place = {name: [int(column[position])] for name, column in index.items()}
            encoded = encode_rows(place, source=source, tokenizer=tokenizer, config=config)
            row = {name: values[0] for name, values in encoded.items()}
            rows.append((position, len(row["input_ids"])))
            if len(shown) < NUM_SHOWN and len(row["input_ids"]):
                shown.append(
                    show_row(tokenizer, *(row[name][: config.max_seq_length] for name in ("input_ids", "labels")))
                )
            if sum(length for _, length in rows) > MAX_SAMPLED_TOKENS:
                break
        report = cache_folder(source, key, config) / REPORT_NAME
        if report.exists():
            known = read_json(report)
            of_rows, of_tokens = known["num_rows"], known["num_tokens"]
        else:
            kept = np.array([length for _, length in sorted(rows)])
            starts, stops = pack(kept, config.max_seq_length, split=not config.sft) if config.pack else (0 * kept, kept)
            of_rows, of_tokens = int((stops > starts).sum()), int((stops - starts).sum())
            if len(rows) < total:
                # The last row of a sample that is split into full rows is not full.
                of_rows = of_tokens / config.max_seq_length if config.pack and not config.sft else of_rows
                of_rows, of_tokens, is_exact = of_rows * total / len(rows), of_tokens * total / len(rows), False
        num_rows, num_tokens = num_rows + weight * of_rows, num_tokens + weight * of_tokens
    return DataSize(math.ceil(num_rows), math.ceil(num_tokens), is_exact, shown)
