"""Training data: reading and its errors, cutting, packing, the cache, several processes and ranks."""

import copy
import dataclasses
import json
import multiprocessing
import os
import random
import sys

import numpy as np
import pytest
import torch
from conftest import sentences

from longqlora.data.dataset import build_dataset, build_datasets
from longqlora.data.jsonl import check_data_file
from longqlora.data.packing import pack
from longqlora.data.prompt import bos_ids, encode_conversation, encode_for_training, encode_text
from longqlora.settings.config import DataConfig

PRETRAIN, SFT = {"sft": False}, {"sft": True}
TURNS = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps over"}]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows, or bytes as they are, to a file."""

    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_bytes(rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode())
        return path

    return write


@pytest.fixture
def build(tmp_path):
    def build(path, tokenizer, **settings):
        config = DataConfig(train_file=str(path), data_cache_dir=str(tmp_path / "cache"), **settings)
        return build_dataset(path, tokenizer, config)

    return build


def document(tokenizer, text):
    return [tokenizer.bos_token_id, *encode_text(tokenizer, text), tokenizer.eos_token_id]


def documents_of(num_documents, seed=0):
    """Texts of 1 to about 60 words."""
    lengths = random.Random(seed).choices([1, 2, 3, 8, 20, 60], k=num_documents)
    return [sentences(length, seed=index) for index, length in enumerate(lengths)]


# Reading


def test_pretraining_rows_are_bos_text_eos(tokenizer, jsonl, build):
    texts = ["the quick fox", "  a </s> b\n"]
    dataset, report = build(jsonl([{"text": text, "id": 1} for text in texts]), tokenizer)
    assert dataset["input_ids"][:] == [document(tokenizer, text) for text in texts]
    assert dataset["labels"][:] == dataset["input_ids"][:]
    assert dataset.column_names == ["input_ids", "labels"]
    assert [row.count(tokenizer.eos_token_id) for row in dataset["input_ids"]] == [1, 1]
    assert report.num_dropped_tokens == report.num_dropped_rows == 0


def test_bos_only_where_the_model_was_pretrained_with_one(tokenizer, jsonl, build):
    path = jsonl([{"text": "the fox"}])
    text = encode_text(tokenizer, "the fox")
    tokenizer.bos_token = None
    assert build(path, tokenizer)[0][0]["input_ids"] == [*text, 2]
    tokenizer.bos_token = "</s>"
    assert build(path, tokenizer)[0][0]["input_ids"] == [*text, 2]


def test_pad_equal_to_eos_keeps_the_label_of_the_eos(tokenizer, jsonl, build):
    tokenizer.pad_token = tokenizer.eos_token
    assert build(jsonl([{"text": "the fox"}]), tokenizer)[0][0]["labels"][-1] == tokenizer.eos_token_id
    labels = build(jsonl([{"input": "the", "output": "fox"}]), tokenizer, sft=True)[0][0]["labels"]
    assert labels[-1] == tokenizer.eos_token_id


def test_blank_lines_crlf_bom_and_no_last_line_break(tokenizer, jsonl, build):
    path = jsonl(b'\xef\xbb\xbf{"text": "the fox"}\r\n\r\n  \n{"text": "a \xe2\x80\xa8 dog"}')
    dataset, report = build(path, tokenizer)
    assert dataset["input_ids"][:] == [document(tokenizer, text) for text in ("the fox", "a \u2028 dog")]
    assert report.num_source_rows == 2


def test_all_sft_forms_give_the_same_rows(tokenizer, jsonl, build):
    forms = [
        {"input": "the fox", "output": "jumps over", "source": "x"},
        {"conversation": TURNS},
        {"messages": [{**turn, "name": "x"} for turn in TURNS]},
        {"conversation": [{"human": "the fox", "assistant": "jumps over"}]},
    ]
    dataset, _ = build(jsonl(forms), tokenizer, sft=True)
    ids, labels = encode_for_training(tokenizer, TURNS)
    assert dataset[:] == {"input_ids": [ids] * 4, "labels": [labels] * 4}
    prompt = encode_conversation(tokenizer, TURNS[:1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt


def test_chat_template_rows(tokenizer, jsonl, build):
    path = jsonl([{"conversation": TURNS}])
    with pytest.raises(ValueError, match="no chat template"):
        build(path, tokenizer, sft=True, prompt_template="chat_template")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
    dataset, _ = build(path, tokenizer, sft=True, prompt_template="chat_template")
    assert tokenizer.decode(dataset[0]["input_ids"]) == "<s>user:the fox</s>assistant:jumps over</s>"


def test_shipped_examples_build(repo, tokenizer, build):
    dataset, report = build(repo / "data/dummy_pretrain.jsonl", tokenizer, pack=True, max_seq_length=512)
    assert report.num_source_rows >= 10 and report.num_dropped_tokens == 0
    assert set(map(len, dataset["input_ids"][:-1])) == {512}
    for settings in ({}, {"prompt_template": "vicuna_v1.1_fastchat"}):
        dataset, report = build(repo / "data/dummy_sft.jsonl", tokenizer, sft=True, **settings)
        assert len(dataset) == report.num_source_rows >= 10
    rows = [json.loads(line) for line in (repo / "data/dummy_sft.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"input", "conversation"} <= {key for row in rows for key in row}


def test_training_and_evaluation_rows(tokenizer, jsonl, tmp_path):
    train, evaluation = jsonl([{"text": "the fox"}]), jsonl([{"text": "a dog"}] * 2, "eval.jsonl")
    config = DataConfig(str(train), data_cache_dir=str(tmp_path / "cache"))
    lines = []
    assert [rows and len(rows) for rows in build_datasets(tokenizer, config, log=lines.append)] == [1, None]
    config = dataclasses.replace(config, eval_file=str(evaluation))
    assert list(map(len, build_datasets(tokenizer, config, log=lines.append))) == [1, 2]
    assert [line.split(": 1 rows")[0].split(": 2 rows")[0] for line in lines] == [
        f"train_file: {train}",
        f"train_file: {train}",
        f"eval_file: {evaluation}",
    ]
    evaluation.write_text("{}")
    with pytest.raises(ValueError, match=r"eval_file: .*eval\.jsonl line 1"):
        build_datasets(tokenizer, config, log=lines.append)


# Cutting


def test_long_text_loses_its_tail(tokenizer, jsonl, build):
    ids = document(tokenizer, sentences(50))
    dataset, report = build(jsonl([{"text": sentences(50)}, {"text": "the"}]), tokenizer, max_seq_length=20)
    assert dataset[0]["input_ids"] == ids[:20]
    assert report.num_dropped_tokens == len(ids) - 20
    assert report.num_truncated_rows == 1 and report.max_row_length == 20


def test_empty_rows_are_dropped_and_counted(tokenizer, jsonl, build):
    texts = ["the fox", "", " \n\t ", "a dog"]
    for packed in (False, True):
        _, report = build(jsonl([{"text": text} for text in texts]), tokenizer, pack=packed)
        assert report.num_source_rows == 4 and report.num_empty_rows == 2
        assert "2 rows dropped (2 empty" in report.summary()
    rows = [{"input": "the", "output": " "}, {"input": "", "output": "fox"}]
    dataset, report = build(jsonl(rows), tokenizer, sft=True)
    assert len(dataset) == 1 and report.num_empty_rows == 1


def test_cut_answers(tokenizer, jsonl, build):
    prompt = len(encode_conversation(tokenizer, TURNS[:1], add_generation_prompt=True))
    ids, labels = encode_for_training(tokenizer, TURNS)
    path = jsonl([{"conversation": TURNS}, {"input": sentences(100), "output": "the"}])
    dataset, report = build(path, tokenizer, sft=True, max_seq_length=prompt + 1)
    assert dataset[:] == {"input_ids": [ids[: prompt + 1]], "labels": [labels[: prompt + 1]]}
    assert tokenizer.eos_token_id not in dataset[0]["labels"]
    assert (report.num_truncated_rows, report.num_unanswered_rows, report.num_rows) == (1, 1, 1)
    with pytest.raises(ValueError, match="train_file: no row is left .*raise max_seq_length"):
        build(path, tokenizer, sft=True, max_seq_length=prompt)


@pytest.mark.parametrize("max_seq_length", [2, 3, 7, 64, 300, 10_000])
@pytest.mark.parametrize("settings", [{}, {"pack": True}, {"sft": True}, {"sft": True, "pack": True}])
def test_every_token_is_kept_or_counted(tokenizer, jsonl, build, max_seq_length, settings):
    texts = documents_of(25)
    if settings.get("sft"):
        rows = [{"input": text, "output": text} for text in texts]
        lengths = [
            len(encode_for_training(tokenizer, [{**TURNS[0], "content": t}, {**TURNS[1], "content": t}])[0])
            for t in texts
        ]
    else:
        rows = [{"text": text} for text in texts]
        lengths = [len(document(tokenizer, text)) for text in texts]
    try:
        dataset, report = build(jsonl(rows), tokenizer, max_seq_length=max_seq_length, **settings)
    except ValueError as error:
        assert settings.get("sft") and max_seq_length <= 64 and "no row is left" in str(error)
        return
    assert report.num_tokens + report.num_dropped_tokens == sum(lengths)
    assert report.num_tokens == sum(map(len, dataset["input_ids"]))
    assert report.num_rows == len(dataset)
    assert report.max_row_length == max(map(len, dataset["input_ids"])) <= max_seq_length
    assert report.num_predicted_tokens == sum(label != -100 for row in dataset["labels"] for label in row[1:])
    assert all(any(label != -100 for label in row[1:]) for row in dataset["labels"])
    if not settings.get("pack"):
        assert report.num_rows + report.num_dropped_rows == report.num_source_rows == len(texts)


# Packing


def segments(row):
    """The (input_ids, labels) of a packed row's documents, told apart by its position ids alone."""
    starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
    for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
        assert row["position_ids"][start:end] == list(range(end - start))
        yield row["input_ids"][start:end], row["labels"][start:end]


@pytest.mark.parametrize("max_seq_length", [8, 31, 64, 1000, 100_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_packed_texts(tokenizer, jsonl, build, max_seq_length, seed):
    texts = documents_of(40, seed)
    dataset, report = build(
        jsonl([{"text": text} for text in texts]), tokenizer, pack=True, max_seq_length=max_seq_length
    )
    stream = [token for text in texts for token in document(tokenizer, text)]
    kept = [token for row in dataset["input_ids"] for token in row]
    assert kept == stream[: len(kept)] and len(stream) - len(kept) == report.num_dropped_tokens <= 1
    assert all(len(row) == max_seq_length for row in dataset["input_ids"][:-1])
    pieces = [segment for row in dataset for segment in segments(row)]
    assert len(pieces) > len(dataset) or max_seq_length == 8
    for ids, labels in pieces:
        assert labels == [-100, *ids[1:]]
        assert tokenizer.bos_token_id not in ids[1:] and tokenizer.eos_token_id not in ids[:-1]
    # A document is at most one piece longer than the rows it touches.
    assert sum(ids[0] == tokenizer.bos_token_id for ids, _ in pieces) >= len(texts) - report.num_dropped_tokens
    assert len(pieces) <= len(texts) + len(dataset)


@pytest.mark.parametrize("max_seq_length", [200, 300, 5000])
def test_packed_conversations_stay_whole(tokenizer, jsonl, build, max_seq_length):
    rows = [{"input": text, "output": text} for text in documents_of(30)]
    dataset, report = build(jsonl(rows), tokenizer, sft=True, pack=True, max_seq_length=max_seq_length)
    unpacked, unpacked_report = build(jsonl(rows), tokenizer, sft=True, max_seq_length=max_seq_length)
    pieces = [segment for row in dataset for segment in segments(row)]
    assert [ids for ids, _ in pieces] == unpacked["input_ids"][:]
    assert [labels for _, labels in pieces] == unpacked["labels"][:]
    assert report.num_dropped_rows == unpacked_report.num_dropped_rows
    assert max_seq_length < 5000 or len(dataset) < len(unpacked)


def test_packing_does_not_change_its_input():
    ids = np.arange(5, dtype=np.int32)
    labels = ids.copy()
    assert len(list(pack([(ids, labels)] * 3, 4, split=True))) == 4
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_lone_last_token_is_dropped_and_counted(tokenizer, jsonl, build):
    length = len(document(tokenizer, "the fox"))
    dataset, report = build(jsonl([{"text": "the fox"}]), tokenizer, pack=True, max_seq_length=length - 1)
    assert len(dataset) == 1 and report.num_dropped_tokens == 1


def test_no_loss_crosses_packed_documents(tokenizer, jsonl, build, tiny_model_dir):
    """The loss of a packed row is the mean over the documents alone, weighted by their predicted tokens."""
    from transformers import AutoModelForCausalLM

    from longqlora.data.collator import DataCollator

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="sdpa").eval()
    path = jsonl([{"text": text} for text in ("the quick fox", "seven wizards box", "night")])
    collator = DataCollator(tokenizer)
    with torch.no_grad():
        row = build(path, tokenizer, pack=True, max_seq_length=64)[0][0]
        # With a cache, transformers takes positions that restart for something else than packing.
        packed = model(**collator([row]), use_cache=False).loss
        alone = [model(**collator([row])).loss for row in build(path, tokenizer)[0]]
    counts = [len(row["input_ids"]) - 1 for row in build(path, tokenizer)[0]]
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(packed, expected)


# Cache


def calls_of_tokenizer(monkeypatch):
    calls = []
    from longqlora.data import pretrain_data

    original = pretrain_data.encode_document
    monkeypatch.setattr(pretrain_data, "encode_document", lambda *args: calls.append(args) or original(*args))
    return calls


def test_second_build_reads_the_cache(tokenizer, jsonl, build, monkeypatch):
    calls = calls_of_tokenizer(monkeypatch)
    path = jsonl([{"text": "the fox"}, {"text": "a dog"}])
    first, first_report = build(path, tokenizer)
    assert len(calls) == 2 and not first_report.cached
    tokenizer("warm", truncation=True, max_length=2, padding="max_length")
    second, second_report = build(path, tokenizer)
    assert len(calls) == 2 and second_report.cached and "[cached]" in second_report.summary()
    assert first[:] == second[:]
    second_report.cached = False
    assert first_report == second_report
    copied = jsonl(path.read_bytes(), "copy.jsonl")
    copied = copied.rename(path.parent / "cache" / path.name)
    assert build(copied, tokenizer)[1].source == str(copied) and len(calls) == 2


def test_cache_is_not_read_for_anything_else(tokenizer, jsonl, build, monkeypatch):
    calls = calls_of_tokenizer(monkeypatch)
    path = jsonl([{"text": "the fox"}])
    build(path, tokenizer)
    for change in (
        lambda: build(path, tokenizer, max_seq_length=16),
        lambda: build(path, tokenizer, pack=True),
        lambda: build(jsonl([{"text": "the dog"}]), tokenizer),
        lambda: (setattr(tokenizer, "bos_token", None), build(jsonl([{"text": "the fox"}]), tokenizer)),
        lambda: (tokenizer.add_tokens(["fox"]), build(path, tokenizer)),
    ):
        num_calls = len(calls)
        change()
        assert len(calls) == num_calls + 1


def test_damaged_cache_is_built_again(tokenizer, jsonl, build, tmp_path):
    path = jsonl([{"text": "the fox"}])
    first = build(path, tokenizer)[0][:]
    for name in ("rows.arrow", "report.json"):
        next((tmp_path / "cache").glob(f"*/{name}")).write_bytes(b"{")
        dataset, report = build(path, tokenizer)
        assert dataset[:] == first and not report.cached


def test_failed_build_leaves_nothing(tokenizer, jsonl, build, tmp_path, monkeypatch):
    from longqlora.data import pretrain_data

    monkeypatch.setattr(pretrain_data, "encode_document", lambda *_: (_ for _ in ()).throw(ValueError("bad; mend")))
    with pytest.raises(ValueError, match="train.jsonl line 1: bad; mend"):
        build(jsonl([{"text": "the fox"}]), tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_random_state_is_untouched(tokenizer, jsonl, build):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    build(jsonl([{"text": text} for text in documents_of(5)]), tokenizer, pack=True)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_several_processes_give_the_same_rows(tokenizer, jsonl, tmp_path):
    path = jsonl([{"text": text} for text in documents_of(150)])
    built = []
    for num_workers in (1, 2):
        cache = str(tmp_path / f"cache{num_workers}")
        config = DataConfig(str(path), preprocessing_num_workers=num_workers, data_cache_dir=cache)
        built.append(build_dataset(path, tokenizer, config))
    assert built[0][0][:] == built[1][0][:]
    assert built[0][1] == built[1][1]


def test_error_in_a_worker_names_the_line(tokenizer, jsonl, build):
    tokenizer.chat_template = "{% if 'dog' in messages[0].content %}{{ raise_exception('no dogs') }}{% endif %}"
    tokenizer.chat_template += "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    rows = [{"input": "dog" if index == 49 else "fox", "output": "x"} for index in range(60)]
    settings = {"sft": True, "prompt_template": "chat_template"}
    for num_workers in (1, 2):
        with pytest.raises(ValueError, match=r"train\.jsonl line 50: .*no dogs"):
            build(jsonl(rows), tokenizer, preprocessing_num_workers=num_workers, **settings)


def build_as_rank(rank, path, cache, tokenizer, folder):
    """Build in this process as rank `rank` of two; leaves its outcome and its stderr in `folder`."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    with (folder / f"stderr{rank}").open("w") as sys.stderr:
        dataset, report = build_dataset(path, tokenizer, DataConfig(str(path), data_cache_dir=str(cache)))
    (folder / f"rank{rank}.json").write_text(json.dumps([dataset[:], report.num_tokens]))


def test_one_rank_tokenises_and_the_others_load(tokenizer, jsonl, tmp_path):
    """Two processes without a process group; the second starts first, and must wait."""
    path = jsonl([{"text": text} for text in documents_of(30)])
    cache = tmp_path / "cache"
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=build_as_rank, args=(rank, path, cache, tokenizer, tmp_path)) for rank in (0, 1)]
    ranks[1].start()
    ranks[1].join(0.5)
    assert ranks[1].is_alive() and not any(cache.glob("*"))
    ranks[0].start()
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert (tmp_path / "rank0.json").read_text() == (tmp_path / "rank1.json").read_text()
    assert "Tokenising" in (tmp_path / "stderr0").read_text() and (tmp_path / "stderr1").read_text() == ""
    assert len(list(cache.iterdir())) == 1


# Errors

BAD_FILES = [
    (PRETRAIN, b'{"text": "a"}\n{"text": \n', r"line 2: not valid JSON"),
    (PRETRAIN, b'[{"text": "a"}]', r"line 1: a JSON list, not an object"),
    (PRETRAIN, b'[\n{"text": "a"}\n]', r"line 1: not valid JSON .*no array"),
    (PRETRAIN, b'"text"\n', r"line 1: a JSON str, not an object"),
    (PRETRAIN, b"null\n", r"line 1: a JSON NoneType, not an object"),
    (PRETRAIN, b"\n\n{}\n", r'line 3: no key "text" \(found no keys\)'),
    (PRETRAIN, b'{"Text": "a", "id": 1}\n', r'line 1: no key "text" \(found Text, id\)'),
    (PRETRAIN, b'{"input": "a", "output": "b"}\n', r"line 1: .*SFT file \(input, output\); set sft: true"),
    (PRETRAIN, b'{"messages": []}\n', r"line 1: .*set sft: true"),
    (PRETRAIN, b'{"text": null}\n', r'line 1: "text" is of type NoneType'),
    (PRETRAIN, b'{"text": ["a"]}\n', r'line 1: "text" is of type list'),
    (PRETRAIN, b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: not UTF-8 \(byte 11"),
    (PRETRAIN, '{"text": "a"}\n'.encode("utf-16"), r"line 1: not UTF-8"),
    (PRETRAIN, b'{"text": "\\ud83d"}\n', r"line 1: .*surrogate pair \(\\ud83d\)"),
    (PRETRAIN, b'{"text": ' + b"[" * 100_000 + b"\n", r"line 1: (JSON nested too deep|not valid JSON)"),
    (PRETRAIN, b'{"text": "a"} {"text": "b"}\n', r"line 1: not valid JSON \(Extra data"),
    (PRETRAIN, b"", r"is empty; give one JSON object per line: .*text"),
    (PRETRAIN, b"\n \r\n", r"is empty"),
    (SFT, b"", r"is empty; .*input"),
    (SFT, b'{"text": "a"}\n', r"line 1: a pretraining row .*set sft: false"),
    (SFT, b'{"input": "a"}\n', r'line 1: no key "output" \(found input\)'),
    (SFT, b'{"output": "a"}\n', r'line 1: no key "instruction" \(found output\)'),
    (SFT, b'{"input": 3, "output": "b"}\n', r'line 1: "input" is of type int'),
    (SFT, b'{"input": "a", "output": null}\n', r'line 1: "output" is of type NoneType'),
    (SFT, b'{"conversation": []}\n', r"line 1: the conversation is empty"),
    (SFT, b'{"conversation": "a"}\n', r'line 1: "conversation" is of type str; give a list'),
    (SFT, b'{"messages": {"role": "user"}}\n', r'line 1: "messages" is of type dict; give a list'),
    (SFT, b'{"messages": [{"role": "user", "content": "a"}]}\n', r"line 1: the conversation ends with 'user'"),
    (SFT, b'{"messages": [{"role": "bot", "content": "a"}]}\n', r"line 1: message 1 has the unknown role 'bot'"),
    (SFT, b'{"messages": [{"role": "assistant", "content": "a"}]}\n', r"line 1: the roles are assistant"),
    (
        SFT,
        b'{"messages": [{"from": "human", "value": "a"}]}\n',
        r"line 1: message 1 has no .*found \['from', 'value'\]",
    ),
    (SFT, b'{"conversation": [{"human": "a", "assistant": 1}]}\n', r'line 1: "assistant" of turn 1 is of type int'),
    (SFT, b'{"conversation": [{"human": "a"}]}\n', r"line 1: message 1 has no"),
    (SFT, b'{"conversation": [3]}\n', r"line 1: message 1 has no"),
]


@pytest.mark.parametrize(("kind", "content", "message"), BAD_FILES)
def test_bad_files(jsonl, kind, content, message):
    path = jsonl(content)
    with pytest.raises(ValueError, match=message) as error:
        check_data_file(path, flag="eval_file", **kind)
    assert str(error.value).startswith(f"eval_file: {path}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and "; " in str(error.value)


def test_bad_line_is_found_before_anything_is_tokenised(tokenizer, jsonl, build, monkeypatch):
    calls = calls_of_tokenizer(monkeypatch)
    with pytest.raises(ValueError, match=r"train_file: .*train\.jsonl line 2"):
        build(jsonl(b'{"text": "a"}\n{"txt": 1}\n'), tokenizer)
    assert calls == []


def test_missing_file(tokenizer, build, tmp_path):
    with pytest.raises(ValueError, match="train_file: no file at"):
        build(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(ValueError, match="eval_file: no file at"):
        check_data_file(tmp_path, sft=True, flag="eval_file")


def test_cache_folder_that_cannot_be_made(tokenizer, jsonl):
    path = jsonl([{"text": "a"}])
    with pytest.raises(ValueError, match="data_cache_dir: no folder can be made"):
        build_dataset(path, tokenizer, DataConfig(str(path), data_cache_dir=str(path / "cache")))


def test_check_counts_rows(jsonl):
    assert check_data_file(jsonl(b'{"text": "a"}\n\n{"text": ""}'), sft=False, flag="train_file") == 2


def test_tokenizer_without_eos_is_refused(tokenizer, jsonl, build):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        build(jsonl([{"text": "a"}]), tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seq_length": 1}, "max_seq_length: 1 "),
        ({"max_seq_length": "long"}, "max_seq_length: 'long'"),
        ({"max_seq_length": 8.5}, "max_seq_length: 8.5"),
        ({"preprocessing_num_workers": 0}, "preprocessing_num_workers: 0"),
        ({"preprocessing_num_workers": True}, "preprocessing_num_workers: True"),
        ({"prompt_template": "alpaca"}, "prompt_template: 'alpaca' is not one of.*vicuna_v1.1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig("x.jsonl", **settings)


@pytest.mark.realdata
def test_real_conversations_with_the_llama2_tokenizer(shared_data, build):
    from transformers import AutoTokenizer

    llama = AutoTokenizer.from_pretrained(shared_data / "llama2_tokenizer")
    path = shared_data / "sft_long/sft_input_output.jsonl"
    dataset, report = build(path, llama, sft=True, max_seq_length=4096)
    assert report.num_source_rows == 180
    assert report.num_rows + report.num_dropped_rows == 180 and report.num_rows == len(dataset) > 90
    assert report.num_tokens == sum(map(len, dataset["input_ids"]))
    assert report.max_row_length <= 4096
    for row in dataset:
        assert row["input_ids"][:1] == bos_ids(llama) == [1]
        assert row["labels"][-1] == row["input_ids"][-1]
    assert (
        sum(row[-1] == llama.eos_token_id for row in dataset["labels"]) == report.num_rows - report.num_truncated_rows
    )
