"""Training data: rows, cutting, packing, the cache, several processes and ranks."""

import dataclasses
import json
import multiprocessing
import os
import random
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import sentences

from longqlora.data import dataset as dataset_module
from longqlora.data.dataset import build_dataset, build_datasets, check_sources, mixture
from longqlora.data.packing import pack
from longqlora.data.prompt import TURN_TEMPLATES, bos_ids, encode_conversation, encode_for_training, encode_text
from longqlora.data.source import open_source
from longqlora.settings.config import DataConfig

TURNS = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps over"}]


@pytest.fixture
def build(tmp_path, tokenizer):
    """Rows and report of a file, or of rows (or bytes as they are) that are written to one."""

    def build(source, **settings):
        path = source if isinstance(source, Path) else write_jsonl(tmp_path / "train.jsonl", source)
        config = DataConfig(str(path), **{"data_cache_dir": str(tmp_path / "cache"), **settings})
        return build_dataset(open_source(str(path), "train_file"), tokenizer, config)

    return build


def write_jsonl(path, rows):
    path.write_bytes(rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def texts_of(*texts):
    return [{"text": text} for text in texts]


def document(tokenizer, text):
    return [tokenizer.bos_token_id, *encode_text(tokenizer, text), tokenizer.eos_token_id]


def documents_of(num_documents, seed=0):
    """Texts of 1 to about 60 words."""
    lengths = random.Random(seed).choices([1, 2, 3, 8, 20, 60], k=num_documents)
    return [sentences(length, seed=index) for index, length in enumerate(lengths)]


# Rows


def test_pretraining_rows_are_bos_text_eos(tokenizer, build):
    """Of a file with a byte order mark, blank lines, lines of Windows and no last line break."""
    texts = ["the quick fox", "  a </s> b\n", "a \u2028 dog"]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False).encode() for text in texts]
    dataset, report = build(b"\xef\xbb\xbf" + b"\r\n\r\n  \n".join(lines))
    assert dataset[:] == {name: [document(tokenizer, text) for text in texts] for name in ("input_ids", "labels")}
    assert [row.count(tokenizer.eos_token_id) for row in dataset["input_ids"]] == [1, 1, 1]
    assert report.num_source_rows == 3 and report.num_dropped_tokens == report.num_dropped_rows == 0


def test_special_tokens_that_are_missing_or_the_same(tokenizer, build):
    rows, ids = texts_of("the fox"), encode_text(tokenizer, "the fox")
    tokenizer.pad_token = tokenizer.eos_token
    assert build(rows)[0][0]["labels"][-1] == tokenizer.eos_token_id
    for bos in (None, "</s>"):
        tokenizer.bos_token = bos
        assert build(rows)[0][0]["input_ids"] == [*ids, 2], "BOS only where models were pretrained with one"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        build(rows)


@pytest.mark.parametrize("bound,value", [("ROWS_PER_BATCH", 3), ("BYTES_PER_BATCH", 1), ("BYTES_PER_BATCH", 1000)])
def test_rows_are_the_same_however_many_are_encoded_at_once(build, tmp_path, monkeypatch, bound, value):
    rows = texts_of(*documents_of(20), "", " ")
    expected = build(rows)[0][:]
    monkeypatch.setattr(dataset_module, bound, value)
    assert build(rows, data_cache_dir=str(tmp_path / "other"))[0][:] == expected


def test_conversations_take_the_template_asked_for(tokenizer, build):
    for name in TURN_TEMPLATES:
        ids, labels = encode_for_training(tokenizer, TURNS, template=name)
        dataset, _ = build([{"conversation": TURNS}], sft=True, prompt_template=name)
        assert dataset[:] == {"input_ids": [ids], "labels": [labels]}


def test_shipped_examples_build(repo, build):
    dataset, report = build(repo / "data/dummy_pretrain.jsonl", pack=True, max_seq_length=512)
    assert report.num_source_rows >= 10 and report.num_dropped_tokens == 0
    assert set(map(len, dataset["input_ids"][:-1])) == {512}
    dataset, report = build(repo / "data/dummy_sft.jsonl", sft=True, prompt_template="vicuna_v1.1_fastchat")
    assert len(dataset) == report.num_source_rows >= 10


def test_training_and_evaluation_rows(tokenizer, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", texts_of("the fox"))
    evaluation = write_jsonl(tmp_path / "eval.jsonl", texts_of("a dog", "a dog"))
    config = DataConfig(str(train), data_cache_dir=str(tmp_path / "cache"))
    lines = []
    assert [rows and len(rows) for rows in build_datasets(tokenizer, config, log=lines.append)] == [1, None]
    config = dataclasses.replace(config, eval_file=str(evaluation))
    built = build_datasets(tokenizer, config, log=lines.append)
    assert list(map(len, built)) == [1, 2] and isinstance(built[0][0]["input_ids"], np.ndarray)
    said = [f"train_file: {train}: 1", f"train_file: {train}: 1", f"eval_file: {evaluation}: 2"]
    assert [line.split(" rows")[0] for line in lines] == said
    # Of both at once the training rows are those of one after the other, whatever is tokenised anew.
    both = dataclasses.replace(config, train_file=[str(train), str(evaluation)], eval_file=None)
    [rows, _] = build_datasets(tokenizer, both, log=lines.append)
    assert [row["input_ids"].tolist() for row in rows] == [row["input_ids"].tolist() for part in built for row in part]
    assert lines[-1] == "train_file: 3 rows of 2 sources" and "[cached]" in lines[-2]
    evaluation.write_text("{}")
    with pytest.raises(ValueError, match=r"eval_file: .*eval\.jsonl line 1"):
        build_datasets(tokenizer, config, log=lines.append)


@pytest.mark.parametrize(
    "weights,counts", [([1, 1], [4, 6]), ([2, 0.5], [8, 3]), ([1.25, 0.01], [5, 1]), ([0.5, 3], [2, 18])]
)
def test_a_mixture_takes_each_source_by_its_weight(weights, counts):
    parts = [datasets.Dataset.from_dict({"x": range(start, start + size)}) for start, size in ((0, 4), (10, 6))]
    rows, again, other = (mixture(parts, weights, seed=seed)["x"][:] for seed in (1, 1, 2))
    assert [sum(x < 10 for x in rows), sum(x >= 10 for x in rows)] == counts and rows == again
    assert len(set(rows)) == sum(min(count, size) for count, size in zip(counts, (4, 6), strict=True))
    assert (rows == other) == all(weight % 1 in (0, 0.01) for weight in weights) or weights == [1.25, 0.01]


def test_forms_are_named_and_counted(build):
    pair, turns = {"input": "a", "output": "b"}, [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    sharegpt = {"conversations": turns}
    assert "; form input/output" in build([pair, pair], sft=True)[1].summary()
    mixed = build([sharegpt, pair, pair], sft=True)[1].summary()
    assert "; 1 as ShareGPT (from/value), 2 as input/output" in mixed
    assert " as " not in build(texts_of("a"))[1].summary()


# Cutting


def test_empty_rows_are_dropped_and_counted(build):
    for packed in (False, True):
        _, report = build(texts_of("the fox", "", " \n\t ", "a dog"), pack=packed)
        assert report.num_source_rows == 4 and report.num_empty_rows == 2
        assert "2 rows dropped (2 empty" in report.summary()
    dataset, report = build([{"input": "a", "output": " "}, {"input": "", "output": "fox"}], sft=True)
    assert len(dataset) == 1 and report.num_empty_rows == 1


def test_cut_answers(tokenizer, build):
    prompt = len(encode_conversation(tokenizer, TURNS[:1]))
    ids, labels = encode_for_training(tokenizer, TURNS)
    rows = [{"input": sentences(100), "output": "the"}, {"conversation": TURNS}]
    dataset, report = build(rows, sft=True, max_seq_length=prompt + 1)
    assert dataset[:] == {"input_ids": [ids[: prompt + 1]], "labels": [labels[: prompt + 1]]}
    assert (report.num_truncated_rows, report.num_unanswered_rows, report.num_rows) == (1, 1, 1)
    for packed in (False, True):
        with pytest.raises(ValueError, match="train_file: no row is left .*0 rows from 2.*raise max_seq_length"):
            build(rows, sft=True, max_seq_length=prompt, pack=packed)


@pytest.mark.parametrize("max_seq_length", [2, 7, 64, 300, 10_000])
@pytest.mark.parametrize("settings", [{}, {"pack": True}, {"sft": True}, {"sft": True, "pack": True}])
def test_every_token_is_kept_or_counted(build, max_seq_length, settings):
    is_sft = settings.get("sft", False)
    rows = [{"input": text, "output": text} if is_sft else {"text": text} for text in documents_of(25)]
    lengths = [len(ids) for ids in build(rows, sft=is_sft)[0]["input_ids"]]
    try:
        dataset, report = build(rows, max_seq_length=max_seq_length, **settings)
    except ValueError as error:
        assert is_sft and max_seq_length <= 64 and "no row is left" in str(error)
        return
    assert report.num_tokens + report.num_dropped_tokens == sum(lengths)
    assert report.num_tokens == sum(map(len, dataset["input_ids"]))
    assert report.num_rows == len(dataset)
    assert report.max_row_length == max(map(len, dataset["input_ids"])) <= max_seq_length
    assert report.num_predicted_tokens == sum(label != -100 for row in dataset["labels"] for label in row[1:])
    assert all(any(label != -100 for label in row[1:]) for row in dataset["labels"])
    if not settings.get("pack"):
        assert report.num_rows + report.num_dropped_rows == report.num_source_rows == len(rows)
        assert report.num_truncated_rows == sum(length > max_seq_length for length in lengths) - report.num_dropped_rows


# Packing


def segments(row):
    """The (input_ids, labels) of a packed row's documents, told apart by its position ids alone."""
    starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
    for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
        assert row["position_ids"][start:end] == list(range(end - start))
        yield row["input_ids"][start:end], row["labels"][start:end]


@pytest.mark.parametrize("max_seq_length", [8, 31, 1000, 100_000])
def test_packed_texts(tokenizer, build, max_seq_length):
    texts = documents_of(40)
    dataset, report = build(texts_of(*texts, ""), pack=True, max_seq_length=max_seq_length)
    stream = [token for text in texts for token in document(tokenizer, text)]
    kept = [token for row in dataset["input_ids"] for token in row]
    assert kept == stream[: len(kept)] and len(stream) - len(kept) == report.num_dropped_tokens <= 1
    assert all(len(row) == max_seq_length for row in dataset["input_ids"][:-1])
    pieces = [segment for row in dataset for segment in segments(row)]
    for ids, labels in pieces:
        assert labels == [-100, *ids[1:]]
        assert tokenizer.bos_token_id not in ids[1:] and tokenizer.eos_token_id not in ids[:-1]
    assert len(texts) - report.num_dropped_tokens <= len(pieces) <= len(texts) + len(dataset)


@pytest.mark.parametrize("sft", [False, True])
def test_joined_rows_are_those_kept_apart_but_attend_to_each_other(build, sft):
    rows = [{"input": text, "output": text} if sft else {"text": text} for text in documents_of(30)]
    apart, report = build(rows, sft=sft, pack=True, max_seq_length=300)
    joined, joined_report = build(rows, sft=sft, pack="join", max_seq_length=300)
    assert joined["input_ids"][:] == apart["input_ids"][:] and joined.column_names == ["input_ids", "labels"]
    assert joined_report.num_tokens == report.num_tokens
    if sft:
        assert joined["labels"][:] == apart["labels"][:]
    else:
        assert joined["labels"][:] == joined["input_ids"][:]
        assert joined_report.num_predicted_tokens == report.num_tokens - len(joined)


@pytest.mark.parametrize("max_seq_length", [200, 300, 5000])
def test_packed_conversations_stay_whole(build, max_seq_length):
    rows = [{"input": text, "output": text} for text in documents_of(30)]
    dataset, report = build(rows, sft=True, pack=True, max_seq_length=max_seq_length)
    alone, alone_report = build(rows, sft=True, max_seq_length=max_seq_length)
    pieces = [segment for row in dataset for segment in segments(row)]
    assert pieces == list(zip(alone["input_ids"], alone["labels"], strict=True))
    assert report.num_dropped_rows == alone_report.num_dropped_rows
    assert report.num_predicted_tokens == alone_report.num_predicted_tokens
    assert max_seq_length < 5000 or len(dataset) < len(alone)


@pytest.mark.parametrize(
    ("lengths", "split", "bounds"),
    [
        ([3, 2, 4], False, [(0, 5), (5, 9)]),
        ([3, 0, 3, 0], False, [(0, 3), (3, 6)]),
        ([5, 5], False, [(0, 5), (5, 10)]),
        ([3, 2, 4], True, [(0, 5), (5, 9)]),
        ([12], True, [(0, 5), (5, 10), (10, 12)]),
        ([6], True, [(0, 5)]),
        ([5, 1, 1, 1, 1, 1, 2], True, [(0, 5), (10, 12)]),
        ([0, 0], True, []),
    ],
)
def test_bounds_of_packed_rows(lengths, split, bounds):
    starts, stops = pack(np.array(lengths), 5, split=split)
    assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == bounds


# Cache


@pytest.fixture
def encoded(monkeypatch):
    """The texts that were tokenised."""
    found, original = [], dataset_module.encode_documents
    monkeypatch.setattr(
        dataset_module, "encode_documents", lambda tokenizer, texts: found.extend(texts) or original(tokenizer, texts)
    )
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_second_build_reads_the_cache(tokenizer, build, encoded, tmp_path, packed):
    rows = texts_of("the fox", " ", "a dog")
    first, first_report = build(rows, pack=packed)
    assert len(encoded) == 3 and not first_report.cached
    tokenizer("warm", truncation=True, max_length=2, padding="max_length")
    second, second_report = build(rows, pack=packed)
    assert len(encoded) == 3 and second_report.cached and "[cached]" in second_report.summary()
    assert first[:] == second[:] and first_report == dataclasses.replace(second_report, cached=False)
    copied = write_jsonl(tmp_path / "cache" / "train.jsonl", rows)
    assert build(copied, pack=packed)[1].source == str(copied) and len(encoded) == 3


def test_cache_is_not_read_for_anything_else(tokenizer, build, encoded):
    rows = texts_of("the fox")
    build(rows)
    for change in (
        lambda: build(rows, max_seq_length=16),
        lambda: build(rows, pack=True),
        lambda: build(texts_of("the dog")),
        lambda: (setattr(tokenizer, "bos_token", None), build(rows)),
        lambda: (tokenizer.add_tokens(["fox"]), build(rows)),
    ):
        num_rows = len(encoded)
        change()
        assert len(encoded) == num_rows + 1


def test_what_is_cached_is_not_checked_again(tokenizer, build, monkeypatch, tmp_path):
    rows, other = texts_of("the fox"), write_jsonl(tmp_path / "other.jsonl", [{"txt": "a"}])
    build(rows)
    config = DataConfig(str(tmp_path / "train.jsonl"), data_cache_dir=str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "text_of_row", None)
        check_sources(tokenizer, config)
    with pytest.raises(ValueError, match="eval_file: .*other.jsonl line 1"):
        check_sources(tokenizer, dataclasses.replace(config, eval_file=str(other)))


@pytest.mark.parametrize("name", ["documents", "packed"])
@pytest.mark.parametrize("num_bytes", [0, 1, 700])
def test_a_damaged_cache_is_built_again(build, encoded, tmp_path, capsys, name, num_bytes):
    rows = texts_of("the fox", "a dog")
    first = build(rows, pack=True)[0][:]
    [file] = (tmp_path / "cache").glob(f"*/{name}.arrow")
    file.write_bytes(file.read_bytes()[:num_bytes])
    capsys.readouterr()
    again, report = build(rows, pack=True)
    assert again[:] == first and not report.cached and len(encoded) == 4
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1 and said[0].startswith(f"notice: data_cache_dir: '{file.parent}' is damaged")


def test_random_state_is_untouched(build):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    build(texts_of(*documents_of(5)), pack=True)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


# Several processes


@pytest.mark.parametrize("settings", [{}, {"pack": True, "max_seq_length": 100}])
def test_several_processes_give_the_same_rows(build, tmp_path, settings):
    rows = texts_of("", *documents_of(150))
    alone, alone_report = build(rows, **settings)
    caches = {"data_cache_dir": str(tmp_path / "other")}
    for is_cached, num_workers in ((False, 3), (True, 1)):
        together, report = build(rows, preprocessing_num_workers=num_workers, **caches, **settings)
        assert together[:] == alone[:] and report.summary() == alone_report.summary() + " [cached]" * is_cached


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("bad", [{"inputs": "q"}, {"input": "dog", "output": "x"}])
def test_a_bad_line_is_named(tokenizer, build, bad, num_workers):
    tokenizer.chat_template = "{% if 'dog' in messages[0].content %}{{ raise_exception('no dogs') }}{% endif %}"
    tokenizer.chat_template += "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    rows = [bad if index in (49, 58) else {"input": "fox", "output": "x"} for index in range(60)]
    settings = {"sft": True, "prompt_template": "chat_template", "preprocessing_num_workers": num_workers}
    with pytest.raises(ValueError, match=r"^train_file: .*train\.jsonl line 50: .*(no dogs|no key)"):
        build(rows, **settings)


def build_as_rank(rank, local_rank, path, cache, tokenizer, folder):
    """Build in this process as rank `rank` of three; leaves its outcome and its stderr in `folder`."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "3"})
    with (folder / f"stderr{rank}").open("w") as sys.stderr:
        config = DataConfig(str(path), pack=True, data_cache_dir=str(cache))
        dataset, report = build_dataset(open_source(str(path), "train_file"), tokenizer, config)
    (folder / f"rank{rank}.json").write_text(json.dumps([dataset[:], report.num_tokens]))


def test_one_rank_of_each_node_tokenises_and_the_others_load(tokenizer, tmp_path):
    """Processes without a process group, two of them on one node: its second starts first, and must wait."""
    path, fork = write_jsonl(tmp_path / "a.jsonl", texts_of(*documents_of(30))), multiprocessing.get_context("fork")
    places = [(0, 0, tmp_path / "cache"), (1, 1, tmp_path / "cache"), (2, 0, tmp_path / "other node")]
    ranks = [fork.Process(target=build_as_rank, args=(rank, local_rank, path, cache, tokenizer, tmp_path))
             for rank, local_rank, cache in places]  # fmt: skip
    ranks[1].start()
    ranks[1].join(0.5)
    assert ranks[1].is_alive() and not any((tmp_path / "cache").glob("*"))
    ranks[0].start()
    ranks[2].start()
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    assert len({(tmp_path / f"rank{rank}.json").read_text() for rank in range(3)}) == 1
    assert "Tokenising" in (tmp_path / "stderr0").read_text()
    assert [(tmp_path / f"stderr{rank}").read_text() for rank in (1, 2)] == ["", ""]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.realdata
def test_real_conversations_with_the_llama2_tokenizer(shared_data, tmp_path):
    from transformers import AutoTokenizer

    llama = AutoTokenizer.from_pretrained(shared_data / "llama2_tokenizer")
    path = shared_data / "sft_long/sft_input_output.jsonl"
    config = DataConfig(str(path), sft=True, max_seq_length=4096, data_cache_dir=str(tmp_path))
    dataset, report = build_dataset(open_source(str(path), "train_file"), llama, config)
    assert report.num_rows + report.num_dropped_rows == report.num_source_rows == 180
    assert report.num_rows == len(dataset) > 90 and report.max_row_length <= 4096
    assert report.num_tokens == sum(map(len, dataset["input_ids"]))
    assert all(row["input_ids"][:1] == bos_ids(llama) and row["labels"][-1] == row["input_ids"][-1] for row in dataset)
    num_whole = sum(row[-1] == llama.eos_token_id for row in dataset["labels"])
    assert num_whole == report.num_rows - report.num_truncated_rows
