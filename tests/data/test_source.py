"""Sources: jsonl, json arrays, parquet and data sets, read row by row; what is bad is refused by file and row."""

import hashlib
import json

import datasets
import pytest

from longqlora.data.row import conversation_of_row, text_of_row
from longqlora.data.source import joint_content, open_source


def turns(*texts, system=None):
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def rows_of(source):
    index = source.places()
    places = [dict(zip(index, place, strict=True)) for place in zip(*index.values(), strict=True)]
    return [source.parsed(place, dict) for place in places]


ALPACA = {"instruction": "Add the numbers.", "input": "1 2", "output": "3"}
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
    "empty": ([], "is empty; give rows"),
    "blank": ([b"\xef\xbb\xbf\n \r\n"], "is empty; give"),
}  # fmt: skip
BAD_CONVERSATIONS = {
    "empty": ([], "is empty; give rows"),
    "a pretraining row": ([{"text": "a"}], "line 1: a pretraining row .*set sft: false"),
    "no output": ([{"input": "a"}], r'line 1: no key "output" \(found input\)'),
    "no instruction": ([{"output": "a"}], r'line 1: no key "instruction" \(found output\)'),
    "number": ([PAIR, {"input": 3, "output": "b"}], 'line 2: "input" is of type int'),
    "null output": ([{"input": "a", "output": None}], 'line 1: "output" is of type NoneType'),
    "no turns": ([{"conversation": []}], "line 1: the conversation is empty"),
    "no list": ([{"conversation": "a"}], 'line 1: "conversation" is of type str; give a list'),
    "question alone": ([{"messages": turns("a")}], "line 1: the conversation ends with 'user'"),
    "role": ([{"messages": [{"role": "bot", "content": "a"}]}], "line 1: .*unknown role 'bot'"),
    "ShareGPT and others": ([{"messages": [{"from": "human", "value": "a"}, turns("a")[0]]}],
                            "line 1: message 1 has no"),
    "unknown sender": ([{"conversations": [{"from": "narrator", "value": "a"}]}], "turn 1 is from 'narrator'; use one"),
    "senders": ([{"conversations": [{"from": ["gpt"], "value": "a"}]}], r"turn 1 is from \['gpt'\]"),
    "value": ([{"conversations": [{"from": "human", "value": 3}]}], '"value" of turn 1 is of type int'),
    "call": ([{"conversations": [{"from": "function_call", "value": "f(x)"}]}], '"value" of turn 1 is not valid JSON'),
    "calls": ([{"messages": [*turns("q"), {"role": "assistant", "tool_calls": ["f"]}]}], '"tool_calls" are no'),
    "tools": ([{"messages": turns("q", "a"), "tools": "f"}], '"tools" is not valid JSON'),
    "tools alone": ([{"messages": turns("q", "a"), "tools": ["f"]}], '"tools" is no list'),
    "picture": ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "message 1 is of type list"),
    "completion alone": ([{"completion": "a"}], r'no key "prompt" \(found completion\)'),
    "prompt of two kinds": ([{"prompt": turns("q"), "completion": "a"}], '"prompt" or "completion" is of type list'),
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
        open_source(str(path), "eval_file").check(conversation_of_row if sft else text_of_row)
    assert str(error.value).startswith(f"eval_file: {path}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and "; " in str(error.value)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["qmsum_val", "squality_v1-3_dev", "oasst_en_100_tree"])
def test_real_rows_of_no_form_are_refused(name, shared_data):
    with pytest.raises(ValueError, match=r'line 1: no key "\w+" \(found '):
        open_source(str(shared_data / f"sft_long/{name}.jsonl"), "train_file").check(conversation_of_row)


ROWS = [{"text": "a, [b] {c} \\"}, {"text": 'say "d\\"', "meta": {"n": [1, 2]}}, {"text": "\u2028é\n", "meta": None}]


def write_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_an_array_is_read_by_the_place_of_its_rows(tmp_path, indent, is_ascii):
    path = tmp_path / "rows.json"
    for rows in (ROWS, ROWS[:1]):
        path.write_text("\ufeff \n" + json.dumps(rows, indent=indent, ensure_ascii=is_ascii) + "\n", encoding="utf-8")
        source = open_source(str(path), "train_file")
        assert rows_of(source) == rows and source.unit == "row"
    # What others call json is jsonl.
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert rows_of(open_source(str(path), "train_file")) == ROWS


BAD_ARRAYS = {
    "cut off": ('[{"text": "a"}, {"text": "b', "the JSON array does not end after row 1"),
    "cut at a row": ('[{"text": "a"}, {"text": "b"}', "does not end after row 1"),
    "goes on": ('[{"text": "a"}] {}', "is followed by something else after row 1"),
    "no object": ('[{"text": "a"}, 2]', "row 2: a JSON int, not an object"),
    "comma": ('[{"text": "a"},]', "row 2: not valid JSON"),
    "no comma": ('[{"text": "a"} {"text": "b"}]', "row 1: not valid JSON .*Extra data"),
    "key": ('[{"text": "a"}, {"txt": "b"}]', 'row 2: no key "text"'),
    "brackets": ('[{"text": "a"]]', "row 1: not valid JSON|followed by"),
    "none": ("[ ]", "is empty"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays(tmp_path, name):
    text, message = BAD_ARRAYS[name]
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=f"^train_file: .*rows.json.*({message})"):
        open_source(str(tmp_path / "rows.json"), "train_file").check(text_of_row)


def test_tables(tmp_path, monkeypatch):
    """A parquet file, and a data set by name: here a folder, which `datasets` reads as it reads the hub."""
    options = {"cache_dir": str(tmp_path / "cache")}
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": turns("q", "a"), "length": 3}, {"messages": turns("r", "b"), "length": 4}]
    parquet = open_source(str(write_parquet(tmp_path / "rows.parquet", rows)), "train_file", **options)
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_parquet(tmp_path / "org" / "name" / "train.parquet", rows)
    write_parquet(tmp_path / "org" / "name" / "test.parquet", rows[1:])
    named = [open_source(name, "train_file", **options) for name in ("org/name", "org/name:test", "org/name:train[1:]")]
    assert [rows_of(source) for source in (parquet, *named)] == [rows, rows, rows[1:], rows[1:]]
    assert len({source.content for source in (parquet, *named)}) == 4
    assert [conversation_of_row(row).messages for row in rows_of(parquet)] == [row["messages"] for row in rows]
    write_parquet(tmp_path / "other.parquet", [*rows, {"messages": turns("r"), "length": 4}])
    with pytest.raises(ValueError, match=r"eval_file: other.parquet row 3: the conversation ends with 'user'"):
        open_source("other.parquet", "eval_file", **options).check(conversation_of_row)


@pytest.mark.parametrize(
    "name,message",
    [("bad.parquet", "give a parquet file that is whole"), ("org/missing", "'org/missing:train' cannot .*org/na"),
     ("org/name:nosplit", "Unknown split"), ("nowhere.parquet", "no file at"), ("a/nowhere.jsonl", "no file at")],
)  # fmt: skip
def test_tables_that_cannot_be_read(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and more")
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_parquet(tmp_path / "org" / "name" / "train.parquet", [{"text": "a"}])
    with pytest.raises(ValueError, match=f"^train_file: .*{message}") as error:
        open_source(name, "train_file", cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(error.value)


def test_the_content_of_several_sources(tmp_path):
    for name, text in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    a, b, c = (open_source(str(tmp_path / f"{name}.jsonl"), "train_file") for name in "abc")
    assert joint_content([a]) == hashlib.sha256(b"1").hexdigest() == joint_content([c])
    assert len({joint_content(sources) for sources in ([a], [a, b], [b, a], [a, c])}) == 4
