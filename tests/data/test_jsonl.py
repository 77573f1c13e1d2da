"""Rows of jsonl files: every published form is read whole, and what is bad or not read is refused by file and line."""

import json

import pytest

from longqlora.data.jsonl import check_data_file, messages_of_row, read_rows, text_of_row


def turns(*texts, system=None):
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


ALPACA = {"instruction": "Add the numbers.", "input": "1 2", "output": "3"}
ALPACA_PROMPT = "Below is ...\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n1 2\n\n### Response:\n3"
ALPACA_TURNS = turns("Add the numbers.\n1 2", "3")
ROWS = {
    "alpaca": (ALPACA, ALPACA_TURNS),
    "alpaca without input": ({"instruction": "Name it.", "input": "", "output": "Paris."}, turns("Name it.", "Paris.")),
    "alpaca, input is null": ({"instruction": "Name it.", "input": None, "output": "P"}, turns("Name it.", "P")),
    "alpaca, input alone": ({"instruction": "", "input": "1 2", "output": "3"}, turns("1 2", "3")),
    "tatsu-lab/alpaca": ({**ALPACA, "text": ALPACA_PROMPT}, ALPACA_TURNS),
    "the same text twice": ({**ALPACA, "text": "Add the numbers."}, ALPACA_TURNS),
    "WildChat": (
        {"conversation": [{**turn, "country": "US", "hashed_ip": "ab cd", "state": "New York", "toxic": False,
                           "header": {"accept-language": "en, de", "user-agent": "A B"}} for turn in turns("q", "a")],
         "header": {"accept-language": "en, de", "user-agent": "A B"}, "country": "United States"},
        turns("q", "a"),
    ),
    "LongAlpaca": ({"instruction": "Sum: x", "output": "y", "input": "", "file": "a b.pdf"}, turns("Sum: x", "y")),
    "LLaMA-Factory": (
        {**ALPACA, "system": "Be brief.", "history": [["Hello", "Hi"], ["How?", "So."]]},
        turns("Hello", "Hi", "How?", "So.", "Add the numbers.\n1 2", "3", system="Be brief."),
    ),
    "LongAlign": ({"messages": turns("q", "a"), "length": 9}, turns("q", "a")),
    "no_robots": ({"prompt": "q", "prompt_id": "a b", "messages": turns("q", "a"), "category": "x y"}, turns("q", "a")),
    "LongQLoRA": (
        {"conversation_id": 3, "category": "x y", "conversation": [{"human": "q", "assistant": "a"}]}, turns("q", "a")
    ),
    "system beside turns": (
        {"system": "S", "conversation": [{"human": "q", "assistant": "a"}]}, turns("q", "a", system="S")
    ),
    "chunkllama-long-dialog": ({"inputs": ["q", "r"], "outputs": ["a", "b"], "id": "x"}, turns("q", "a", "r", "b")),
    "null for other forms": (
        {"messages": None, "instruction": None, "system": None, "input": "q", "output": "a"}, turns("q", "a")
    ),
    "metadata": (
        {"input": "q", "output": "a", "createdAt": "a b", "data_source": "b c", "sha256": "c", "score": 0.5,
         "meta": {"note": "two words"}, "embedding": [0.1, 2], "context": " "},
        turns("q", "a"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_sft_rows_are_read_whole(name):
    row, messages = ROWS[name]
    assert messages_of_row(row) == messages


@pytest.mark.parametrize(
    "row",
    [
        {"short_book_title": "A Title", "publication_date": 1862, "url": "http://a"},  # deepmind/pg19
        {"meta": {"redpajama_set_name": "RedPajama Book"}},  # SlimPajama
        {"id": "a", "dump": "CC", "file_path": "s3://a", "language": "en", "language_score": 0.9, "token_count": 7},
        {"language_script": "Latn", "top_langs": '{"deu_Latn_score": 1.0}', "minhash_cluster_size": 2},  # FineWeb-2
        {"full_doc_lid": "eng_Latn", "per_page_languages": ["eng_Latn"], "extractor": "docling"},  # FinePDFs
        {"warcinfo": "robots: classic", "language_id_whole_page_fasttext": {"en": 0.9}},  # DCLM
        {"identifier": "a b", "collection": "French-PD-Books", "language_type": "Written"},  # Common Corpus
        {"added": "2023", "created": "1990", "metadata": {"a": "b c"}, "source": "a b", "version": "1"},  # Dolma
    ],
)
def test_metadata_of_published_corpora_may_stay(row):
    assert text_of_row({"text": "a", **row}) == "a"


@pytest.mark.parametrize(
    "extra",
    [{"input": "b"}, {"summary": "b"}, {"parts": [{"x": "b"}]}, {"messages": ["b"]}, {"script": "b"},
     {"more": {"title": "a", "body": "lost"}}, {"x": [{"id": "lost"}]}],
)  # fmt: skip
def test_text_beside_a_pretraining_text_is_refused(extra):
    with pytest.raises(ValueError, match=f'the key "{[*extra][0]}" carries text that is not read beside text; remove'):
        text_of_row({"text": "a", **extra})


PAIR, BAD_TURN = {"input": "q", "output": "a"}, {"role": "assistant", "content": "a", "reasoning_content": "because"}
# Name: (what the file holds, rows or bytes as they are; the error behind the file's name).
BAD_TEXTS = {
    "cut off": ([{"text": "a"}, b'{"text": \n'], "line 2: not valid JSON"),
    "list": ([[{"text": "a"}]], "line 1: a JSON list, not an object"),
    "array": ([b'[\n{"text": "a"}\n]'], "line 1: not valid JSON .*no array"),
    "null": ([b"null\n"], "line 1: a JSON NoneType, not an object"),
    "nothing": ([b"\n\n{}\n"], r'line 3: no key "text" \(found no keys\)'),
    "other keys": ([{"Text": "a", "id": 1}], r'line 1: no key "text" \(found Text, id\)'),
    "an SFT row": ([PAIR], r"line 1: .*SFT file \(input, output\); set sft: true"),
    "null text": ([{"text": None}], 'line 1: "text" is of type NoneType'),
    "bytes": ([{"text": "a"}, b'{"text": "\xff"}\n'], r"line 2: not UTF-8 \(byte 11"),
    "UTF-16": (['{"text": "a"}\n'.encode("utf-16")], "line 1: not UTF-8"),
    "surrogate": ([b'{"text": "\\ud83d"}\n'], r"line 1: .*surrogate pair \(\\ud83d\)"),
    "deep": ([b'{"text": ' + b"[" * 100_000 + b"\n"], "line 1: (JSON nested too deep|not valid JSON)"),
    "two objects": ([b'{"text": "a"} {"text": "b"}\n'], r"line 1: not valid JSON \(Extra data"),
    "two lost keys": ([{"text": "a", "summary": "b", "prompt": "d"}],
                      'line 1: the keys "summary", "prompt" carry text that is not read beside text; remove them, or'),
    "empty": ([], "is empty; give one JSON object per line: .*text"),
    "blank": ([b"\xef\xbb\xbf\n \r\n"], "is empty; give"),
}  # fmt: skip
BAD_CONVERSATIONS = {
    "empty": ([], "is empty; give .*input"),
    "a pretraining row": ([{"text": "a"}], "line 1: a pretraining row .*set sft: false"),
    "no output": ([{"input": "a"}], r'line 1: no key "output" \(found input\)'),
    "no instruction": ([{"output": "a"}], r'line 1: no key "instruction" \(found output\)'),
    "number": ([PAIR, {"input": 3, "output": "b"}], 'line 2: "input" is of type int'),
    "null output": ([{"input": "a", "output": None}], 'line 1: "output" is of type NoneType'),
    "no turns": ([{"conversation": []}], "line 1: the conversation is empty"),
    "no list": ([{"conversation": "a"}], 'line 1: "conversation" is of type str; give a list'),
    "question alone": ([{"messages": turns("a")}], "line 1: the conversation ends with 'user'"),
    "role": ([{"messages": [{"role": "bot", "content": "a"}]}], "line 1: .*unknown role 'bot'"),
    "ShareGPT": ([{"messages": [{"from": "human", "value": "a"}]}], "line 1: message 1 has no .*'from'"),
    "human alone": ([{"conversation": [{"human": "a"}]}], "line 1: message 1 has no"),
    "answer": ([{"conversation": [{"human": "a", "assistant": 1}]}], "a text of turn 1 is of type int"),
    "surrogate": ([{"messages": turns("q", "\ud83d")}], r"message 2 has half of a surrogate pair \(\\ud83d\)"),
    "few-shot": ([{**PAIR, "query": "What?", "query_examples": ["x"]}], 'line 1: the key.* "query"'),
    "two forms": ([{"messages": turns("q", "a"), "instruction": "b"}], 'line 1: .*"instruction" carries'),
    "two conversations": ([{"conversation": turns("q", "a"), "messages": turns("q", "b")}], '"messages"'),
    "another text": ([{**ALPACA, "text": "Add the numbers. 1 2"}], 'line 1: .*"text" carries'),
    "nested": ([{**PAIR, "passages": [{"body": "lost"}]}], 'line 1: .*"passages" carries'),
    "thoughts": ([{"messages": [*turns("q"), BAD_TURN]}], 'turn 2 of "messages": .*"reasoning_content"'),
    "system of a turn": ([{"conversation": [{"human": "q", "assistant": "a", "system": "S"}]}],
                         'line 1: turn 1 .*"system" carries'),
    "two systems": ([{"system": "S", "messages": turns("q", "a", system="T")}], '"system" beside'),
    "bad history": ([{**ALPACA, "history": ["q", "a"]}], 'line 1: "history" is no list of'),
    "bad lists": ([{"inputs": ["q", "r"], "outputs": ["a"]}], "line 1: .*lists of equal length"),
}  # fmt: skip
BAD_FILES = [*((False, *case) for case in BAD_TEXTS.values()), *((True, *case) for case in BAD_CONVERSATIONS.values())]


@pytest.mark.parametrize(("sft", "rows", "message"), BAD_FILES, ids=[*BAD_TEXTS, *BAD_CONVERSATIONS])
def test_bad_files(sft, rows, message, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    with pytest.raises(ValueError, match=message) as error:
        check_data_file(path, sft=sft, flag="eval_file")
    assert str(error.value).startswith(f"eval_file: {path}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and "; " in str(error.value)


def test_read_rows_and_check(tmp_path):
    lines = [b"\xef\xbb\xbf" + b'{"text": "a"}\r\n', b" \n", b'{"text": ""}']
    assert list(read_rows(lines, "x", flag="--x")) == [(1, {"text": "a"}), (3, {"text": ""})]
    assert list(read_rows(lines, "x", flag="--x", parse=text_of_row)) == [(1, "a"), (3, "")]
    (tmp_path / "x").write_bytes(b"".join(lines))
    assert check_data_file(tmp_path / "x", sft=False, flag="--x") == 2
    with pytest.raises(ValueError, match="--x: no file at"):
        check_data_file(tmp_path, sft=True, flag="--x")


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["qmsum_val", "squality_v1-3_dev", "oasst_en_100_tree"])
def test_real_rows_of_no_form_are_refused(name, shared_data):
    with pytest.raises(ValueError, match=r'line 1: no key "\w+" \(found '):
        check_data_file(shared_data / f"sft_long/{name}.jsonl", sft=True, flag="train_file")
