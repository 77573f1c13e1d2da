"""Training data: each source becomes memory-mapped rows of token ids by `datasets.map`, which caches them on disk."""

import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers

from longqlora.data.packing import pack, packed_row
from longqlora.data.prompt import bos_ids, encode_for_training, encode_texts, eos_id
from longqlora.data.row import conversation_of_row, text_of_row
from longqlora.data.source import Source, sources_of
from longqlora.distributed import is_main_process, local_rank, print_notice
from longqlora.files import file_sha256, partial_name, remove, write_json
from longqlora.settings.config import IGNORE_INDEX, DataConfig

# The files beside this one that decide rows.
CODE = ("columns", "dataset", "jsonl", "packing", "prompt", "row", "source")
REPORT_NAME = "report.json"
# Rows that are encoded and written at once: so many, of at most so many bytes in the file.
ROWS_PER_BATCH, BYTES_PER_BATCH = 256, 2**25
ROWS_PER_WRITE = 32
IDS, COUNT = datasets.List(datasets.Value("int32")), datasets.Value("int64")


@dataclass
class DataReport:
    """What became of a source. Every token counts once: in `num_tokens` or in `num_dropped_tokens`."""

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
    forms: dict[str, int] = field(default_factory=dict)  # source rows of each form of conversation
    cached: bool = False

    @property
    def num_dropped_rows(self) -> int:
        return self.num_empty_rows + self.num_unanswered_rows

    def summary(self) -> str:
        """The report on one line."""
        rows = f"{self.num_rows:,} rows from {self.num_source_rows:,}, {self.num_tokens:,} tokens "
        parts = [f"{rows}({self.num_predicted_tokens:,} predicted), longest row {self.max_row_length:,}"]
        is_mixed = len(self.forms) > 1
        names = [f"{count:,} as {name}" if is_mixed else f"form {name}" for name, count in self.forms.items()]
        parts += [", ".join(names)] if names else []
        if self.num_truncated_rows:
            parts.append(f"{self.num_truncated_rows:,} rows cut at max_seq_length")
        if self.num_dropped_rows:
            unanswered = f"{self.num_unanswered_rows:,} with nothing to predict within max_seq_length"
            parts.append(f"{self.num_dropped_rows:,} rows dropped ({self.num_empty_rows:,} empty, {unanswered})")
        if self.num_dropped_tokens:
            parts.append(f"{self.num_dropped_tokens:,} tokens dropped")
        return f"{self.source}: {'; '.join(parts)}{' [cached]' if self.cached else ''}"


def check_sources(tokenizer: Any, config: DataConfig) -> None:
    """Check every row of the data files that are not in the cache yet. Raises ValueError with source and row."""
    key = settings_key(tokenizer, config)
    for flag in config.files:
        for source in sources_of(config, flag):
            if not (cache_folder(source, key, config) / REPORT_NAME).exists():
                source.check(conversation_of_row if config.sft else text_of_row)


def build_datasets(
    tokenizer: Any, config: DataConfig, *, log: Callable[[str], None], seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training and, where `eval_file` is given, the evaluation rows; reports each source through `log`.

    seed: of the rows that a part of a pass takes (`train_file_weights`).
    """
    built, key = {}, settings_key(tokenizer, config)
    for flag in config.files:
        parts = []
        for source in sources_of(config, flag):
            dataset, report = build_dataset(source, tokenizer, config, key=key)
            parts.append(dataset)
            log(f"{flag}: {report.summary()}")
        weights = config.train_file_weights if flag == "train_file" else None
        dataset = mixture(parts, weights or [1] * len(parts), seed=seed)
        if len(parts) > 1 or weights:
            passes = f", {' + '.join(f'{weight:g}' for weight in weights)} passes" if weights else ""
            log(f"{flag}: {len(dataset):,} rows of {len(parts)} sources{passes}")
        # A list of 100,000 numbers takes 40 ms to become a tensor, an array 1 ms.
        built[flag] = dataset.with_format("numpy")
    return built["train_file"], built.get("eval_file")


def mixture(parts: list[datasets.Dataset], weights: list[float], *, seed: int) -> datasets.Dataset:
    """Each part as often as its weight says; of the fraction that is left, that share of its rows, at least one."""
    taken = []
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        taken += [part] * int(weight)
        if share := weight % 1:
            chosen = np.random.default_rng([seed, number]).permutation(len(part))[: max(1, round(share * len(part)))]
            taken.append(part.select(np.sort(chosen)))
    return taken[0] if len(taken) == 1 else datasets.concatenate_datasets(taken)


def build_dataset(
    source: Source, tokenizer: Any, config: DataConfig, *, key: str | None = None
) -> tuple[datasets.Dataset, DataReport]:
    """Rows of a source: columns input_ids, labels and, where `config.is_packed`, position_ids (int32 lists).

    key: `settings_key`, where it is known. The first process of each node tokenises; the others wait for its cache. A
    damaged cache is built again, with a notice. No random state is touched. Raises ValueError with file and line for a
    bad row, and where no row is left.
    """
    folder = cache_folder(source, key or settings_key(tokenizer, config), config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not is_main_process():
        datasets.disable_progress_bars()
    while True:
        # Written last, so it tells that all else is there. No collective: tokenising may outlast its timeout.
        while local_rank() != 0 and not (folder / REPORT_NAME).exists():
            time.sleep(0.2)
        is_known = folder.exists()
        try:
            return build_rows(source, folder, tokenizer, config)
        except (pa.ArrowException, FileNotFoundError) as error:
            if local_rank() != 0:
                continue
            if not is_known:
                raise
            print_notice(f"data_cache_dir: {str(folder)!r} is damaged ({error}); tokenising again")
            # Gone at once, so that no other process finds a part of it.
            remove(partial_name(folder))
            remove(folder.rename(partial_name(folder)))


def build_rows(source: Source, folder: Path, tokenizer: Any, config: DataConfig) -> tuple[datasets.Dataset, DataReport]:
    """`build_dataset` in one process, by way of the cache in `folder`."""
    index = datasets.Dataset.from_dict(source.places())
    rows = cached_map(
        index,
        partial(encode_rows, source=source, tokenizer=tokenizer, config=config),
        folder / "documents.arrow",
        {"num_tokens": COUNT, "form": datasets.Value("string")},
        batch_size=rows_per_batch(index),
        num_workers=min(config.preprocessing_num_workers, len(index)),
        desc=f"Tokenising {Path(source.name).name}",
    )
    num_tokens = np.asarray(rows.data["num_tokens"])
    kept = np.asarray(pc.list_value_length(rows.data["input_ids"]))
    starts, stops = pack(kept, config.max_seq_length, split=not config.sft) if config.pack else (0 * kept, kept)
    lengths = (stops - starts)[stops > starts]
    forms = {counted["values"]: counted["counts"] for counted in pc.value_counts(rows.data["form"]).to_pylist()}
    report = DataReport(
        source=source.name,
        num_source_rows=len(index),
        num_rows=len(lengths),
        num_tokens=int(lengths.sum()),
        max_row_length=int(lengths.max(initial=0)),
        num_truncated_rows=int(((0 < kept) & (kept < num_tokens)).sum()),
        num_empty_rows=int((num_tokens == 0).sum()),
        num_unanswered_rows=int(((0 == kept) & (kept < num_tokens)).sum()),
        num_dropped_tokens=int(num_tokens.sum() - lengths.sum()),
        forms=forms if config.sft else {},
        cached=(folder / REPORT_NAME).exists(),
    )
    if not len(lengths):
        raise ValueError(
            f"{source.flag}: no row is left ({report.summary()}); raise max_seq_length or correct the file"
        )
    if config.pack:
        # In one process: it only copies, and others would have to be sent all ids.
        rows = cached_map(
            datasets.Dataset.from_dict({"start": starts, "stop": stops}),
            partial(
                packed_row,
                input_ids=pc.list_flatten(rows.data["input_ids"]),
                labels=pc.list_flatten(rows.data["labels"]),
                document_ends=np.cumsum(kept) if config.is_packed else None,
            ),
            folder / "packed.arrow",
            {"position_ids": IDS} if config.is_packed else {},
            desc=f"Packing {Path(source.name).name}",
        )
    elif not kept.all():
        rows = rows.select(np.flatnonzero(kept))
    report.num_predicted_tokens = int(np.asarray(rows.data["num_predicted"]).sum())
    if local_rank() == 0:
        write_json(folder / REPORT_NAME, asdict(report))
    return rows.select_columns(["input_ids", "labels", *(["position_ids"] if config.is_packed else [])]), report


def cached_map(
    rows: datasets.Dataset,
    function: Callable,
    file: Path,
    more: dict[str, Any],
    *,
    batch_size: int | None = None,
    num_workers: int = 1,
    desc: str,
) -> datasets.Dataset:
    """`rows.map(function)` to ids, labels and `more` columns, kept in `file`, or in one for each worker beside it.

    batch_size: rows that `function` gets at once; None gives it one by one.
    """
    return rows.map(
        function,
        batched=batch_size is not None,
        batch_size=batch_size,
        remove_columns=rows.column_names,
        features=datasets.Features({"input_ids": IDS, "labels": IDS, "num_predicted": COUNT, **more}),
        cache_file_name=str(file),
        load_from_cache_file=True,
        # The name of the folder tells all that decides the rows, so the function itself need not be hashed.
        new_fingerprint=hashlib.sha256(str(file).encode()).hexdigest()[:32],
        num_proc=num_workers if num_workers > 1 else None,
        writer_batch_size=batch_size or ROWS_PER_WRITE,
        desc=desc,
    )


def rows_per_batch(index: datasets.Dataset) -> int:
    """As many rows of an index as stay within BYTES_PER_BATCH, whichever they are."""
    if "size" not in index.column_names:
        return ROWS_PER_WRITE
    return max(1, min(ROWS_PER_BATCH, BYTES_PER_BATCH // max(1, pc.max(index.data["size"]).as_py())))


def encode_rows(
    places: dict[str, list[int]], *, source: Source, tokenizer: Any, config: DataConfig
) -> dict[str, list[Any]]:
    """Columns of the rows at `places` of `source`; ids and labels are empty where a row has nothing to predict.

    num_tokens: of the whole row, before max_seq_length cuts it; 0 where it has no text or an answer is empty. form: of
    a conversation.
    """
    rows = [dict(zip(places, place, strict=True)) for place in zip(*places.values(), strict=True)]
    if config.sft:
        parse = partial(encode_chat, tokenizer=tokenizer, config=config)
        encoded = (source.parsed(row, parse) for row in rows)
    else:
        encoded = encode_documents(tokenizer, [source.parsed(row, text_of_row) for row in rows])
    columns = {name: [] for name in ("input_ids", "labels", "num_predicted", "num_tokens", "form")}
    for form, *lists in encoded:
        ids, labels = (np.asarray(values, dtype=np.int32) for values in lists)
        num_tokens = len(ids)
        # A document that is packed goes on in the next row, a conversation does not. Nothing predicts a first label.
        if config.sft or not config.pack:
            num_kept = config.max_seq_length if (labels[1 : config.max_seq_length] != IGNORE_INDEX).any() else 0
            ids, labels = ids[:num_kept], labels[:num_kept]
        num_predicted = np.count_nonzero(labels[1:] != IGNORE_INDEX)
        for column, value in zip(columns.values(), (ids, labels, num_predicted, num_tokens, form), strict=True):
            column.append(value)
    return columns


def encode_chat(row: dict[str, Any], tokenizer: Any, config: DataConfig) -> tuple[str, list[int], list[int]]:
    """Form, ids and labels of a conversation.

    Both lists are empty for one with an empty answer, which would teach the model to stop at once.
    """
    form, messages, tools = conversation_of_row(row)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not all(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
        return form, [], []
    return form, *encode_for_training(tokenizer, messages, template=config.prompt_template, tools=tools)


def encode_documents(tokenizer: Any, texts: list[str]) -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
    """For each text no form, its ids and labels: BOS + text + EOS, all of it predicted; empty for a blank one."""
    bos, eos = bos_ids(tokenizer), eos_id(tokenizer)
    for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
        parts = (bos, ids, [eos]) if text.strip() else ([],)
        ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
        yield "", ids, ids


def settings_key(tokenizer: Any, config: DataConfig) -> str:
    """A hash of all but the source that decides rows: tokenizer, settings and code."""
    template = config.prompt_template if config.sft else None
    decisive = {
        "settings": [config.sft, config.max_seq_length, config.pack, template],
        "code": [inspect.getsource(sys.modules[f"{__package__}.{name}"]) for name in CODE],
        "versions": [tokenizers.__version__, transformers.__version__],
        "tokenizer": tokenizer_state(tokenizer),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()


def cache_folder(source: Source, key: str, config: DataConfig) -> Path:
    """The folder of the rows of a source, named by its content and `settings_key`."""
    digest = hashlib.sha256(f"{type(source).__name__} {source.unit} {source.content} {key}".encode()).hexdigest()[:24]
    root = Path(os.path.expanduser(config.data_cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "longqlora"))
    return root / f"{Path(source.name).stem[:80]}-{digest}"


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
