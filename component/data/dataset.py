"""Training data: a jsonl file becomes memory-mapped rows of token ids by `datasets.map`, which caches them on disk."""

import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers

from longqlora.cli import require_file
from longqlora.data import jsonl, prompt
from longqlora.data.jsonl import index_rows, messages_of_row, read_rows, text_of_row
from longqlora.data.prompt import bos_ids, encode_for_training, encode_text, eos_id
from longqlora.distributed import is_main_process, local_rank, print_notice
from longqlora.files import file_sha256, partial_name, remove, write_json
from longqlora.settings.config import IGNORE_INDEX, DataConfig

REPORT_NAME = "report.json"
ROWS_PER_WRITE = 32
IDS, COUNT = datasets.List(datasets.Value("int32")), datasets.Value("int64")


@dataclass
class DataReport:
    """What became of a file. Every token counts once: in `num_tokens` or in `num_dropped_tokens`."""

    source: str
    num_source_rows: int
    num_rows: int
    num_tokens: int
    max_row_length: int
    num_truncated_rows: int  # source rows cut by max_seq_length and kept
    num_empty_rows: int  # source rows dropped: no text, or an empty answer
    num_unanswered_rows: int  # rows dropped: nothing to predict within max_seq_length
    num_dropped_tokens: int  # tokens cut off, or in rows without anything to predict
    num_predicted_tokens: int = 0  # tokens with a loss
    cached: bool = False

    @property
    def num_dropped_rows(self) -> int:
        return self.num_empty_rows + self.num_unanswered_rows

    def summary(self) -> str:
        """The report on one line."""
        rows = f"{self.num_rows:,} rows from {self.num_source_rows:,}, {self.num_tokens:,} tokens "
        parts = [f"{rows}({self.num_predicted_tokens:,} predicted), longest row {self.max_row_length:,}"]
        if self.num_truncated_rows:
            parts.append(f"{self.num_truncated_rows:,} rows cut at max_seq_length")
        if self.num_dropped_rows:
            unanswered = f"{self.num_unanswered_rows:,} with nothing to predict within max_seq_length"
            parts.append(f"{self.num_dropped_rows:,} rows dropped ({self.num_empty_rows:,} empty, {unanswered})")
        if self.num_dropped_tokens:
            parts.append(f"{self.num_dropped_tokens:,} tokens dropped")
        return f"{self.source}: {'; '.join(parts)}{' [cached]' if self.cached else ''}"


def build_datasets(
    tokenizer: Any, config: DataConfig, *, log: Callable[[str], None]
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training and, where `eval_file` is given, the evaluation rows; reports both through `log`."""
    built = {}
    for flag in config.files:
        dataset, report = build_dataset(tokenizer, config, flag=flag)
        log(f"{flag}: {report.summary()}")
        # A list of 100,000 numbers takes 40 ms to become a tensor, an array 1 ms.
        built[flag] = dataset.with_format("numpy")
    return built["train_file"], built.get("eval_file")


def build_dataset(tokenizer: Any, config: DataConfig, flag: str = "train_file") -> tuple[datasets.Dataset, DataReport]:
    """Rows of the file of key `flag`: columns input_ids, labels and, where `config.pack`, position_ids (int32 lists).

    The first process of each node tokenises; the others wait for its cache. A damaged cache is built again, with a
    notice. No random state is touched. Raises ValueError with file and line for a bad row, and where no row is left.
    """
    path = require_file(config.files[flag], flag)
    folder = cache_folder(path, tokenizer, config)
    if not is_main_process():
        datasets.disable_progress_bars()
    while True:
        # Written last, so it tells that all else is there. No collective: tokenising may outlast its timeout.
        while local_rank() != 0 and not (folder / REPORT_NAME).exists():
            time.sleep(0.2)
        is_known = folder.exists()
        try:
            return build_rows(path, folder, tokenizer, config, flag=flag)
        except (pa.ArrowException, FileNotFoundError) as error:
            if local_rank() != 0:
                continue
            if not is_known:
                raise
            print_notice(f"data_cache_dir: {str(folder)!r} is damaged ({error}); tokenising again")
            # Gone at once, so that no other process finds a part of it.
            remove(partial_name(folder))
            remove(folder.rename(partial_name(folder)))


def build_rows(
    path: Path, folder: Path, tokenizer: Any, config: DataConfig, *, flag: str
) -> tuple[datasets.Dataset, DataReport]:
    """`build_dataset` in one process, by way of the cache in `folder`."""
    source = datasets.Dataset.from_dict(index_rows(path, sft=config.sft, flag=flag))
    rows = cached_map(
        source,
        partial(encode_row, path=path, tokenizer=tokenizer, config=config, flag=flag),
        folder / "documents.arrow",
        {"num_tokens": COUNT},
        num_workers=min(config.preprocessing_num_workers, len(source)),
        desc=f"Tokenising {path.name}",
    )
    num_tokens = np.asarray(rows.data["num_tokens"])
    kept = np.asarray(pc.list_value_length(rows.data["input_ids"]))
    starts, stops = pack(kept, config.max_seq_length, split=not config.sft) if config.pack else (0 * kept, kept)
    lengths = (stops - starts)[stops > starts]
    report = DataReport(
        source=str(path),
        num_source_rows=len(source),
        num_rows=len(lengths),
        num_tokens=int(lengths.sum()),
        max_row_length=int(lengths.max(initial=0)),
        num_truncated_rows=int(((0 < kept) & (kept < num_tokens)).sum()),
        num_empty_rows=int((num_tokens == 0).sum()),
        num_unanswered_rows=int(((0 == kept) & (kept < num_tokens)).sum()),
        num_dropped_tokens=int(num_tokens.sum() - lengths.sum()),
        cached=(folder / REPORT_NAME).exists(),
    )
    if not len(lengths):
        raise ValueError(f"{flag}: no row is left ({report.summary()}); raise max_seq_length or correct the file")
    if config.pack:
        # In one process: it only copies, and others would have to be sent all ids.
        rows = cached_map(
            datasets.Dataset.from_dict({"start": starts, "stop": stops}),
            partial(
                packed_row,
                input_ids=pc.list_flatten(rows.data["input_ids"]),
                labels=pc.list_flatten(rows.data["labels"]),
                document_ends=np.cumsum(kept),
            ),
            folder / "packed.arrow",
            {"position_ids": IDS},
            desc=f"Packing {path.name}",
        )
    elif not kept.all():
        rows = rows.select(np.flatnonzero(kept))
    report.num_predicted_tokens = int(np.asarray(rows.data["num_predicted"]).sum())
    if local_rank() == 0:
        write_json(folder / REPORT_NAME, asdict(report))
    return rows.select_columns(["input_ids", "labels", *(["position_ids"] if config.pack else [])]), report


def cached_map(
    rows: datasets.Dataset, function: Callable, file: Path, more: dict[str, Any], *, num_workers: int = 1, desc: str
) -> datasets.Dataset:
    """`rows.map(function)` to ids, labels and `more` columns, kept in `file`, or in one for each worker beside it."""
    return rows.map(
        function,
        remove_columns=rows.column_names,
        features=datasets.Features({"input_ids": IDS, "labels": IDS, "num_predicted": COUNT, **more}),
        cache_file_name=str(file),
        load_from_cache_file=True,
        # The name of the folder tells all that decides the rows, so the function itself need not be hashed.
        new_fingerprint=hashlib.sha256(str(file).encode()).hexdigest()[:32],
        num_proc=num_workers if num_workers > 1 else None,
        writer_batch_size=ROWS_PER_WRITE,
        desc=desc,
    )


def encode_row(row: dict[str, int], *, path: Path, tokenizer: Any, config: DataConfig, flag: str) -> dict[str, Any]:
    """Ids and labels of the row of `path` at {"line", "offset"}; both empty where it has nothing to predict.

    num_tokens: of the whole row, before max_seq_length cuts it; 0 where it has no text or an answer is empty.
    """
    with path.open("rb") as file:
        file.seek(row["offset"])
        lines = [file.readline()]
    parse = partial(encode, tokenizer=tokenizer, config=config)
    [(_, columns)] = read_rows(lines, path, flag=flag, parse=parse, first=row["line"])
    ids, labels = (np.array(column, dtype=np.int32) for column in columns)
    num_tokens = len(ids)
    # A document that is packed goes on in the next row, a conversation does not. Nothing predicts a first label.
    if config.sft or not config.pack:
        num_kept = config.max_seq_length if (labels[1 : config.max_seq_length] != IGNORE_INDEX).any() else 0
        ids, labels = ids[:num_kept], labels[:num_kept]
    num_predicted = np.count_nonzero(labels[1:] != IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "num_predicted": num_predicted, "num_tokens": num_tokens}


def encode(row: dict[str, Any], tokenizer: Any, config: DataConfig) -> tuple[list[int], list[int]]:
    """Ids and labels of a row of jsonl: BOS + text + EOS, all of it predicted, or `encode_for_training`'s.

    Both are empty for a text without content, and for a conversation with an empty answer, which would teach the model
    to stop at once.
    """
    if config.sft:
        messages = messages_of_row(row)
        if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
            return [], []
        return encode_for_training(tokenizer, messages, template=config.prompt_template)
    text = text_of_row(row)
    ids = [*bos_ids(tokenizer), *encode_text(tokenizer, text), eos_id(tokenizer)] if text.strip() else []
    return ids, ids


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
    row: dict[str, int], *, input_ids: pa.ChunkedArray, labels: pa.ChunkedArray, document_ends: np.ndarray
) -> dict[str, Any]:
    """The row of tokens {"start", "stop"} of all documents. Its positions restart at 0 in each piece of a document.

    The first label of each piece is -100: the model would predict that token from the document before it.
    """
    start, length = row["start"], row["stop"] - row["start"]
    first, last = np.searchsorted(document_ends, [start, row["stop"]], side="right")
    pieces = np.union1d(document_ends[first:last], [start, row["stop"]])[:-1] - start
    labels = labels.slice(start, length).to_numpy().copy()
    labels[pieces] = IGNORE_INDEX
    positions = np.arange(length, dtype=np.int32) - np.repeat(pieces, np.diff([*pieces, length])).astype(np.int32)
    return {
        "input_ids": input_ids.slice(start, length).to_numpy(), "labels": labels,
        "num_predicted": np.count_nonzero(labels != IGNORE_INDEX), "position_ids": positions,
    }  # fmt: skip


def cache_folder(path: Path, tokenizer: Any, config: DataConfig) -> Path:
    """The folder of a file's rows, named by all that decides them: content, tokenizer, settings and code."""
    decisive = {
        "content": file_sha256(path),
        "settings": [config.sft, config.max_seq_length, config.pack, config.prompt_template if config.sft else None],
        "code": [inspect.getsource(module) for module in (sys.modules[__name__], jsonl, prompt)],
        "versions": [tokenizers.__version__, transformers.__version__],
        "tokenizer": tokenizer_state(tokenizer),
    }
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:24]
    root = Path(os.path.expanduser(config.data_cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "longqlora"))
    root.mkdir(parents=True, exist_ok=True)
    return root / f"{path.stem[:80]}-{key}"


def tokenizer_state(tokenizer: Any) -> list:
    """All of a tokenizer that decides ids, wherever it was loaded from."""
    if tokenizer.is_fast:
        # Truncation and padding are left behind by earlier calls, and set anew by each.
        state = {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
    else:
        vocab_file = Path(getattr(tokenizer, "vocab_file", None) or "")
        state = [tokenizer.get_vocab(), file_sha256(vocab_file) if vocab_file.is_file() else None]
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [type(tokenizer).__name__, special_tokens, getattr(tokenizer, "chat_template", None), state]
