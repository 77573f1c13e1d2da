"""What rows hold: every published form is read whole, and what is bad or not read is refused."""

import json

import pytest

from longqlora.data.row import conversation_of_row, text_of_row


def turns(*texts, system=None):
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def calls(*names):
    functions = [{"name": name, "arguments": {"city": "Oslo"}} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": f} for f in functions]}


ALPACA = {"instruction": "Add the numbers.", "input": "1 2", "output": "3"}
ALPACA_PROMPT = "Below is ...\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n1 2\n\n### Response:\n3"
ALPACA_TURNS = turns("Add the numbers.\n1 2", "3")
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tell the weather."}}]
RESULT = {"role": "tool", "content": "wet"}
NAMED_CALL = {**calls(), "tool_calls": [{"id": "c1", **calls("weather")["tool_calls"][0]}]}
NAMED_RESULT = {**RESULT, "tool_call_id": "c1", "name": "weather"}
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
    "ShareGPT": (
        {"id": "x_0", "conversations": [{"from": "human", "value": "q", "markdown": None},
                                        {"from": "gpt", "value": "a"}]},
        turns("q", "a"),
    ),
    "ShareGPT of other names": (
        {"conversation": [{"from": "system", "value": "S"}, {"from": "user", "value": "q"},
                          {"from": "chatgpt", "value": "a"}]},
        turns("q", "a", system="S"),
    ),
    "ShareGPT with tools": (
        {"conversations": [{"from": "human", "value": "Rain?"},
                           {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
                           {"from": "observation", "value": "wet"}, {"from": "gpt", "value": "Yes"}],
         "system": "S", "tools": json.dumps(TOOLS)},
        [*turns("Rain?", system="S"), calls("weather"), RESULT, {"role": "assistant", "content": "Yes"}],
    ),
    "OpenAI with tools": (
        {"messages": [{"role": "developer", "content": "S"},
                      {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
                      {"role": "assistant", "content": None, "refusal": None, "tool_calls": [
                          {"id": "", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
                      {**RESULT, "tool_call_id": "1"}, {"role": "assistant", "content": "Yes", "tool_calls": []}],
         "tools": TOOLS, "parallel_tool_calls": False},
        [*turns("Rain?", system="S"), calls("weather"), {**RESULT, "tool_call_id": "1"},
         {"role": "assistant", "content": "Yes"}],
    ),
    "OpenAI, a call by its id": (
        {"messages": [*turns("Rain?"), NAMED_CALL, NAMED_RESULT, {"role": "assistant", "content": "Yes"}]},
        [*turns("Rain?"), NAMED_CALL, NAMED_RESULT, {"role": "assistant", "content": "Yes"}],
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, turns("q", "a")),
    "prompt and completion of messages": (
        {"prompt": turns("q", system="S"), "completion": turns("q", "a")[1:]}, turns("q", "a", system="S")
    ),
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
    conversation = conversation_of_row(row)
    assert conversation.messages == messages
    assert conversation.tools == (TOOLS if "with tools" in name else None)


FORMS = {
    "ShareGPT": "ShareGPT (from/value)", "LongAlign": "messages (role/content)",
    "LongQLoRA": "turns (human/assistant)", "LongAlpaca": "Alpaca (instruction/output)",
    "null for other forms": "input/output",
    "chunkllama-long-dialog": "ChunkLlama (inputs/outputs)", "prompt and completion": "prompt/completion",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_form_has_a_name(name):
    assert conversation_of_row(ROWS[name][0]).form == FORMS[name]


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
