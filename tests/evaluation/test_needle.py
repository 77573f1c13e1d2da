"""Needle in a haystack: the user's text, prompts of exact length, scoring without a judge, the script."""

import copy

import pytest
from conftest import SHARED, sentences
from rigged_model import ask_all, rigged

from longqlora.evaluation.retrieval.haystack import MAX_PIECE_CHARACTERS, Haystack, pieces, read_haystack
from longqlora.evaluation.retrieval.needle import (
    ANSWER,
    NEEDLE,
    QUESTION,
    Needle,
    contains,
    ids_around,
    needle_prompt,
    word_recall,
)

# Sentences of different lengths, with numbers that tell where they are.
TEXT = " ".join(f"This is sentence number {n}{', which is rather long' * (n % 3)}." for n in range(60))
CHAT = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}<|assistant|>\n"


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def llama2_tokenizer():
    from transformers import AutoTokenizer

    if not (SHARED / "data/llama2_tokenizer").is_dir():
        pytest.skip("no ../shared/data/llama2_tokenizer beside the checkout")
    return AutoTokenizer.from_pretrained(SHARED / "data/llama2_tokenizer")


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def make_prompt(tokenizer, needle=NEEDLE, question=QUESTION, template="none"):
    return needle_prompt(Haystack(tokenizer, TEXT), needle, question, template=template)


def test_pieces_are_cut_at_sentence_borders_and_lose_nothing():
    text = 'One. "Two!" (Three?) four\nFive e.g.this 3.5\n\nSix\u3002Seven\uff01 Eight'
    assert list(pieces(text)) == [
        "One.", ' "Two!"', " (Three?)", " four", "\nFive e.g.this 3.5", "\n\nSix\u3002", "Seven\uff01", " Eight"
    ]  # fmt: skip
    assert list(pieces("")) == [] and list(pieces("no border")) == ["no border"] and "".join(pieces(TEXT)) == TEXT
    text = sentences(1000) + "." + "x" * 2500
    found = list(pieces(text))
    assert "".join(found) == text and max(map(len, found)) <= MAX_PIECE_CHARACTERS
    assert all(piece[0] == " " for piece in found[1:5]) and len(found) > 7, "without borders, at spaces"


@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 0.77, 1])
@pytest.mark.parametrize("template", ["none", "vicuna_v1.1", "vicuna_v1.1_fastchat", "chat_template"])
def test_prompts_have_the_length_and_hold_the_needle(chat_tokenizer, template, depth):
    prompt = make_prompt(chat_tokenizer, template=template)
    for length in (prompt.min_length, prompt.min_length + 1, 900, 5000):
        ids = prompt.build(length=length, depth=depth)
        text = text_of(chat_tokenizer, ids)
        assert len(ids) == length and ids[0] == chat_tokenizer.bos_token_id
        assert text.count(NEEDLE) == 1 and text.count(f"\n{QUESTION}") + text.count(f"Question: {QUESTION}") == 1
        assert not any(mark in text for mark in ("Apple", "zoo"))
        end = {"none": "Answer:", "chat_template": "<|assistant|>"}.get(template, "ASSISTANT:")
        assert text.rstrip(" ").endswith(end)
    with pytest.raises(
        ValueError, match=f"length {prompt.min_length - 1} is too short .* need {prompt.min_length} tok"
    ):
        prompt.build(length=prompt.min_length - 1, depth=0)


def test_prompt_of_sentencepiece_has_the_ids_of_its_text(llama2_tokenizer):
    ids = make_prompt(llama2_tokenizer).build(length=500, depth=0.5)
    text = text_of(llama2_tokenizer, ids)
    assert len(ids) == 500 and f".\n{NEEDLE}\n This is sentence" in text
    assert text.startswith("Read this text. A question about it follows.\n\nThis is sentence number 0. This is")


@pytest.mark.parametrize("depth", [0.2, 0.5, 0.9])
def test_the_needle_lies_at_the_nearest_sentence_border(tiny_tokenizer, depth):
    haystack = Haystack(tiny_tokenizer, TEXT)
    before, after = haystack.split(600, depth)
    assert len(before) + len(after) == 600 and before + after == haystack.ids[:600]
    assert text_of(tiny_tokenizer, before).endswith(".") and text_of(tiny_tokenizer, after).startswith(" This")
    distances = [abs(border - depth * 600) for border in haystack.borders if border < 600]
    assert abs(len(before) - depth * 600) == min(distances)
    assert haystack.split(333, 0) == ([], haystack.ids[:333]) and haystack.split(333, 1) == (haystack.ids[:333], [])
    assert haystack.split(0, 0.5) == ([], [])


def test_a_short_haystack_is_repeated(tiny_tokenizer):
    haystack = Haystack(tiny_tokenizer, "One day. Two days.")
    num_tokens = len(tiny_tokenizer("One day. Two days.", add_special_tokens=False)["input_ids"])
    assert haystack.num_repeats(num_tokens) == 1 and haystack.num_repeats(0) == 1
    assert text_of(tiny_tokenizer, haystack.split(200, 1)[0]).startswith(
        "One day. Two days.\n\nOne day. Two days.\n\nO"
    )
    assert haystack.num_tokens_once == num_tokens and haystack.num_repeats(200) == -(-200 // num_tokens)
    fresh = Haystack(tiny_tokenizer, TEXT)
    assert fresh.num_repeats(10) == 1 and len(fresh.ids) < 100


def test_a_tokenizer_that_tells_no_words_apart_is_refused(tiny_tokenizer):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(ValueError, match="does not tell one word from another"):
        ids_around(tokenizer, "a ", " b", template="none")


@pytest.mark.parametrize(
    ("expected", "answer", "recall", "is_contained"),
    [("Ines Vogel", "It is INES, Vogel!", 1, True), ("Ines Vogel", "Vogel, Ines", 1, False),
     ("a b a b", "a b b b", 0.75, False), ("Ines Vogel", "Inesita", 0, False), ("art", "the party", 0, False),
     ("Straße 5", "STRASSE 5.", 1, True), ("one two", "", 0, False)],
)  # fmt: skip
def test_scores(expected, answer, recall, is_contained):
    assert word_recall(expected, answer) == recall
    assert contains(expected, answer) is is_contained


def test_every_cell_is_scored(tiny_tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    loaded = rigged(tiny_tokenizer, lambda prompt: f" To {ANSWER}." if len(prompt) < 1500 else " eat a sandwich")
    task = Needle([700, 2600], [0, 1], [tmp_path / "text.txt"], prompt_template="none")
    cells = ask_all(task, loaded)["cells"]
    assert loaded.model.lengths == [700, 700, 2600, 2600]
    assert [cell["score"] for cell in cells] == [1, 1, 3 / 12, 3 / 12]
    assert [cell["is_contained"] for cell in cells] == [True, True, False, False]
    assert [cell["num_repeats"] for cell in cells] == [1, 1, 2, 2]


def test_needle_with_braces_and_line_breaks_is_taken_as_it_is(tiny_tokenizer):
    prompt = make_prompt(tiny_tokenizer, "A {curly}\nn\u00e9edle \U0001f600.\n", "What {x}?")
    text = text_of(tiny_tokenizer, prompt.build(length=400, depth=0.5))
    assert "\nA {curly}\nn\u00e9edle \U0001f600.\n" in text and text.endswith("\n\nQuestion: What {x}?\nAnswer:")


def test_files_and_folders_are_read_in_order(tmp_path):
    (tmp_path / "texts/sub").mkdir(parents=True)
    files = {"texts/b.txt": b"\xef\xbb\xbfB one.\r\nB two.\r\n", "texts/a.txt": b"A one.", "texts/sub/c.txt": b"C.\n",
             "texts/d.md": b"not read", "texts/empty.txt": b""}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    folder = tmp_path / "texts"
    assert read_haystack([folder]) == "A one.\n\nB one.\nB two.\n\nC."
    assert read_haystack([folder / "d.md", folder / "a.txt"]) == "not read\n\nA one."


@pytest.mark.parametrize(("requested", "used"), [("auto", "chat_template"), ("none", "none")])
def test_the_chat_template_is_used_unless_told_otherwise(chat_tokenizer, tmp_path, requested, used, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    task = Needle([300], [0.5], [tmp_path / "text.txt"], answer="SENTENCE number", prompt_template=requested)
    record = ask_all(task, rigged(chat_tokenizer, lambda prompt: "no"))
    assert record["protocol"]["template"] == used
    assert "warning: the haystack itself contains the answer" in capsys.readouterr().out
