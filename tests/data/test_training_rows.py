"""Rows of training files: every published form is read whole, and text that is not read is refused by name."""

import json

import pytest

from longqlora.data.dataset import build_dataset
from longqlora.data.jsonl import check_data_file, messages_of_row, parse_line, text_of_row
from longqlora.settings.config import DataConfig


def turns(*texts, system=None):
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


ALPACA = {"instruction": "Add the numbers.", "input": "1 2", "output": "3"}
ALPACA_PROMPT = "Below is ...\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n1 2\n\n### Response:\n3"
ROWS = {
    "alpaca": (ALPACA, turns("Add the numbers.\n1 2", "3")),
    "alpaca without input": ({"instruction": "Name it.", "input": "", "output": "Paris."}, turns("Name it.", "Paris.")),
    "alpaca, input is null": ({"instruction": "Name it.", "input": None, "output": "P"}, turns("Name it.", "P")),
    "alpaca, input alone": ({"instruction": "", "input": "1 2", "output": "3"}, turns("1 2", "3")),
    "tatsu-lab/alpaca": ({**ALPACA, "text": ALPACA_PROMPT}, turns("Add the numbers.\n1 2", "3")),
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


def test_no_instruction_is_lost_on_the_way_to_the_ids(tiny_tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [ALPACA, {"input": "only a question", "output": "x"}, {"messages": turns("the fox", "jumps")}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(str(path), sft=True, data_cache_dir=str(tmp_path / "cache"))
    dataset, _ = build_dataset(path, tiny_tokenizer, config)
    found = [tiny_tokenizer.decode(ids) for ids in dataset["input_ids"]]
    assert [text[text.index("USER") :] for text in found] == [
        "USER: Add the numbers.\n1 2\nASSISTANT: 3</s>",
        "USER: only a question\nASSISTANT: x</s>",
        "USER: the fox\nASSISTANT: jumps</s>",
    ]


PAIR = {"input": "q", "output": "a"}
LOST = {
    "ChunkLlama few-shot": ({**PAIR, "query": "What?", "query_examples": ["x"]}, '"query"'),
    "examples": ({**PAIR, "output_examples": ["x"]}, '"output_examples"'),
    "two forms": ({"messages": turns("q", "a"), "instruction": "b"}, '"instruction"'),
    "two conversations": ({"conversation": turns("q", "a"), "messages": turns("q", "b")}, '"messages"'),
    "context": ({"instruction": "q", "context": "c", "output": "a"}, '"context"'),
    "another answer": ({**ALPACA, "answer": "4"}, '"answer"'),
    "another text": ({**PAIR, "text": "something else"}, '"text"'),
    "nested": ({**PAIR, "passages": [{"body": "lost"}]}, '"passages"'),
    "reasoning": (
        {"messages": [turns("q")[0], {"role": "assistant", "content": "a", "reasoning_content": "because"}]},
        'turn 2 of "messages": the key "reasoning_content"',
    ),
    "system of a turn": ({"conversation": [{"human": "q", "assistant": "a", "system": "S"}]}, 'turn 1 .*"system"'),
    "two systems": ({"system": "S", "messages": turns("q", "a", system="T")}, '"system" beside a system message'),
    "ShareGPT and Alpaca": (
        {"conversations": [{"from": "human", "value": "q"}], **ALPACA}, '"conversations" carries text'
    ),
    "bad history": ({**ALPACA, "history": ["q", "a"]}, '"history" is no list of'),
    "bad lists": ({"inputs": ["q", "r"], "outputs": ["a"]}, "lists of equal length"),
    "input of a wrong type": ({**ALPACA, "input": 3}, '"input" is of type int'),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_sft_text_that_is_not_read_is_refused_by_line(name, tmp_path):
    row, words = LOST[name]
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"^train_file: .*train.jsonl line 2: .*{words}"):
        check_data_file(path, sft=True, flag="train_file")


@pytest.mark.parametrize("extra", [{"input": "b"}, {"summary": "b"}, {"parts": [{"x": "b"}]}, {"messages": ["b"]}])
def test_text_beside_a_pretraining_text_is_refused(extra):
    with pytest.raises(ValueError, match=f'the key "{[*extra][0]}" carries text that is not read beside text; remove'):
        text_of_row({"text": "a", **extra})


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
    "extra", [{"more": {"title": "a", "body": "lost"}}, {"x": [{"id": "lost"}]}, {"script": "lost"}]
)
def test_only_an_object_of_descriptions_is_one(extra):
    with pytest.raises(ValueError, match=f'"{[*extra][0]}" carries text'):
        text_of_row({"text": "a", **extra})


def test_every_key_that_is_not_read_is_named_at_once():
    words = (
        'the keys "summary", "prompt" carry text that is not read beside text; remove them, or put them under "meta"'
    )
    with pytest.raises(ValueError, match=f"^{words}$"):
        text_of_row({"text": "a", "summary": "b", "id": "c", "prompt": "d"})


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["qmsum_val", "squality_v1-3_dev", "oasst_en_100_tree"])
def test_real_rows_of_no_form_are_refused(name, shared_data):
    with pytest.raises(ValueError, match=r'line 1: no key "\w+" \(found '):
        check_data_file(shared_data / f"sft_long/{name}.jsonl", sft=True, flag="train_file")


def test_a_whole_row_repeated_under_text_is_the_one_exception():
    row = parse_line(json.dumps({**ALPACA, "text": "Add the numbers."}).encode())
    assert messages_of_row(row) == ROWS["alpaca"][1], "the same text twice"
    with pytest.raises(ValueError, match='"text" carries'):
        messages_of_row({**ALPACA, "text": "Add the numbers. 1 2"})
