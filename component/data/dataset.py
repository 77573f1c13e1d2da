"""Training data: a jsonl file becomes memory-mapped rows of token ids, tokenised once and cached on disk."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm import tqdm

from longqlora.cli import require_file
from longqlora.data import jsonl, packing, pretrain_data, prompt, sft_data
from longqlora.data.cache import cache_key, load_cache, write_cache
from longqlora.data.jsonl import check_data_file, error_at, iter_rows
from longqlora.data.worker_pool import map_in_processes
from longqlora.distributed import is_main_process, local_rank
from longqlora.settings.config import DataConfig

Encoded = tuple[np.ndarray, np.ndarray] | None


@dataclass
class DataReport:
    """What became of a file. Every token counts once: in `num_tokens` or in `num_dropped_tokens`."""

    source: str
    num_source_rows: int
    num_rows: int = 0
    num_tokens: int = 0
    num_predicted_tokens: int = 0  # tokens with a loss
    max_row_length: int = 0
    num_truncated_rows: int = 0  # source rows cut by max_seq_length and kept
    num_empty_rows: int = 0  # source rows dropped: no text, or an empty answer
    num_unanswered_rows: int = 0  # rows dropped: nothing to predict within max_seq_length
    num_dropped_tokens: int = 0  # tokens cut off, or in rows without anything to predict
    cached: bool = False

    @property
    def num_dropped_rows(self) -> int:
        return self.num_empty_rows + self.num_unanswered_rows

    def summary(self) -> str:
        """The report on one line."""
        parts = [
            f"{self.num_rows:,} rows from {self.num_source_rows:,}, {self.num_tokens:,} tokens "
            f"({self.num_predicted_tokens:,} predicted), longest row {self.max_row_length:,}"
        ]
        if self.num_truncated_rows:
            parts.append(f"{self.num_truncated_rows:,} rows cut at max_seq_length")
        if self.num_dropped_rows:
            parts.append(
                f"{self.num_dropped_rows:,} rows dropped ({self.num_empty_rows:,} empty, "
                f"{self.num_unanswered_rows:,} with nothing to predict within max_seq_length)"
            )
        if self.num_dropped_tokens:
            parts.append(f"{self.num_dropped_tokens:,} tokens dropped")
        return f"{self.source}: {'; '.join(parts)}{' [cached]' if self.cached else ''}"


def build_dataset(
    path: str | os.PathLike, tokenizer: Any, config: DataConfig, *, flag: str = "train_file"
) -> tuple[datasets.Dataset, DataReport]:
    """Rows of `path` as columns input_ids, labels and, where `config.pack`, position_ids (lists of int32).

    The first process of each node tokenises; the others wait for its cache and load that. No random state is
    touched. flag: the YAML key that gave the path, for errors. Raises ValueError with file and line for a bad row,
    and where no row is left.
    """
    path = require_file(path, flag)
    prompt.eos_id(tokenizer)
    if config.sft:
        prompt.prompt_template_for(tokenizer, config.prompt_template)
    folder = cache_root(config) / f"{path.stem[:80]}-{dataset_key(path, tokenizer, config)}"
    cached = load_cache(folder)
    was_cached = cached is not None
    if cached is None and local_rank() == 0:
        report = DataReport(source=str(path), num_source_rows=check_data_file(path, sft=config.sft, flag=flag))
        rows = fitted_rows(encoded_rows(path, tokenizer, config, report.num_source_rows, flag=flag), config, report)
        columns = ["input_ids", "labels", *(["position_ids"] if config.pack else [])]
        write_cache(folder, rows, columns, partial(asdict, report))
        cached = load_cache(folder)
        assert cached is not None, f"{folder} cannot be read back"
    # Not a collective: tokenising may take longer than the process group's timeout.
    while cached is None:
        time.sleep(0.2)
        cached = load_cache(folder)
    dataset, saved_report = cached
    # Copies of one file share a cache.
    report = DataReport(**{**saved_report, "source": str(path), "cached": was_cached})
    if report.num_rows == 0:
        raise ValueError(
            f"{flag}: no row is left to train on ({report.summary()}); raise max_seq_length or mend the file"
        )
    return dataset, report


def cache_root(config: DataConfig) -> Path:
    """The folder of all caches, made where it is missing."""
    root = Path(os.path.expanduser(config.data_cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "longqlora"))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"data_cache_dir: no folder can be made at {str(root)!r} ({error.strerror}); give one that can be written"
        ) from None
    return root


def dataset_key(path: Path, tokenizer: Any, config: DataConfig) -> str:
    settings = {
        "sft": config.sft,
        "max_seq_length": config.max_seq_length,
        "pack": config.pack,
        "prompt_template": config.prompt_template if config.sft else None,
    }
    modules = [sys.modules[__name__], jsonl, packing, pretrain_data, prompt, sft_data]
    return cache_key(path, tokenizer, settings, modules)


def encoded_rows(path: Path, tokenizer: Any, config: DataConfig, num_rows: int, *, flag: str) -> Iterator[Encoded]:
    """Ids and labels of every row of the file, in order, uncut; None for an empty one. Shows progress."""
    encode = partial(encode_row, path=path, tokenizer=tokenizer, config=config, flag=flag)
    rows = iter_rows(path, sft=config.sft, flag=flag)
    encoded = map_in_processes(encode, rows, config.preprocessing_num_workers)
    yield from tqdm(encoded, f"Tokenising {path.name}", num_rows, unit=" rows", disable=not is_main_process())


def encode_row(row: tuple[int, Any], *, path: Path, tokenizer: Any, config: DataConfig, flag: str) -> Encoded:
    """Ids and labels of one (line number, content)."""
    line_number, content = row
    try:
        if config.sft:
            return sft_data.encode_example(tokenizer, content, config.prompt_template)
        return pretrain_data.encode_document(tokenizer, content)
    except ValueError as error:
        raise error_at(path, line_number, error, flag=flag) from None


def fitted_rows(encoded: Iterable[Encoded], config: DataConfig, report: DataReport) -> Iterator[dict[str, np.ndarray]]:
    """Training rows of at most max_seq_length tokens with something to predict; fills in `report`."""
    split = config.pack and not config.sft
    documents = fit(encoded, config.max_seq_length, report, cut=not split)
    if config.pack:
        rows = packing.pack(documents, config.max_seq_length, split=split)
    else:
        rows = ({"input_ids": input_ids, "labels": labels} for input_ids, labels in documents)
    for row in rows:
        length, num_predicted = len(row["input_ids"]), count_predicted(row["labels"])
        # A lone last token of a packed file: a batch without a label has a loss of 0 / 0.
        if num_predicted == 0:
            report.num_dropped_tokens += length
            continue
        report.num_rows += 1
        report.num_tokens += length
        report.num_predicted_tokens += num_predicted
        report.max_row_length = max(report.max_row_length, length)
        yield row


def fit(
    encoded: Iterable[Encoded], max_seq_length: int, report: DataReport, *, cut: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Drop the empty documents; with `cut` also what is over max_seq_length and then has nothing to predict."""
    for document in encoded:
        if document is None:
            report.num_empty_rows += 1
            continue
        input_ids, labels = document
        if cut:
            num_over = max(0, len(input_ids) - max_seq_length)
            input_ids, labels = input_ids[:max_seq_length], labels[:max_seq_length]
            report.num_dropped_tokens += num_over
            if count_predicted(labels) == 0:
                report.num_unanswered_rows += 1
                report.num_dropped_tokens += len(input_ids)
                continue
            report.num_truncated_rows += num_over > 0
        yield input_ids, labels


def count_predicted(labels: np.ndarray) -> int:
    """Number of labels with a loss; nothing predicts the first."""
    return int(np.count_nonzero(labels[1:] != prompt.IGNORE_INDEX))


def build_datasets(
    tokenizer: Any, config: DataConfig, *, log: Callable[[str], None]
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training and, where `eval_file` is given, the evaluation rows; reports both through `log`."""
    built = []
    for flag, path in (("train_file", config.train_file), ("eval_file", config.eval_file)):
        if path is None:
            built.append(None)
            continue
        dataset, report = build_dataset(path, tokenizer, config, flag=flag)
        log(f"{flag}: {report.summary()}")
        # A list of 100,000 numbers takes 40 ms to become a tensor, an array 1 ms.
        built.append(dataset.with_format("numpy"))
    return built[0], built[1]
