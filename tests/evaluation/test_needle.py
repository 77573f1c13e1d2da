"""Needle in a haystack: the user's text, prompts of exact length, scoring without a judge, the script."""

import copy
import json
import re
import shutil

import pytest
from conftest import SHARED, sentences
from rigged_model import ask_all, rigged

from longqlora.evaluation.retrieval.haystack import MAX_PIECE_CHARACTERS, Haystack, pieces, read_haystack
from longqlora.evaluation.retrieval.needle import (
    ANSWER,
    NEEDLE,
    QUESTION,
    Needle,
    NeedlePrompt,
    contains,
    ids_around,
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
    return NeedlePrompt(tokenizer, Haystack(tokenizer, TEXT), needle, question, template=template)


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
    [
        ("Ines Vogel", "It is INES, Vogel!", 1, True),
        ("Ines Vogel", "Vogel, Ines", 1, False),
        ("a b a b", "a b b b", 0.75, False),
        ("Ines Vogel", "Inesita", 0, False),
        ("art", "the party", 0, False),
        ("Straße 5", "STRASSE 5.", 1, True),
        ("one two", "", 0, False),
    ],
)
def test_scores(expected, answer, recall, is_contained):
    assert word_recall(expected, answer) == recall
    assert contains(expected, answer) is is_contained


def test_evaluation_scores_every_cell_and_resumes(tiny_tokenizer, tmp_path):
    def run(text, **options):
        (tmp_path / "text.txt").write_text(text)
        task = Needle([700, 2600], [0, 1], [tmp_path / "text.txt"], prompt_template="none", **options)
        return ask_all(task, loaded, tmp_path / "out.json")

    loaded = rigged(tiny_tokenizer, lambda prompt: f" To {ANSWER}." if len(prompt) < 1500 else " eat a sandwich")
    result = run(TEXT)
    assert loaded.model.lengths == [700, 700, 2600, 2600]
    assert [cell["score"] for cell in result["cells"]] == [1, 1, 3 / 12, 3 / 12]
    assert [cell["is_contained"] for cell in result["cells"]] == [True, True, False, False]
    assert [cell["num_repeats"] for cell in result["cells"]] == [1, 1, 2, 2]
    assert run(TEXT) == result and len(loaded.model.lengths) == 4
    other = run(TEXT + " More.")
    assert len(loaded.model.lengths) == 8
    assert other["protocol"]["haystack_sha256"] != result["protocol"]["haystack_sha256"]
    run(TEXT + " More.", max_new_tokens=9)
    assert len(loaded.model.lengths) == 12


def test_needle_with_braces_and_line_breaks_is_taken_as_it_is(tiny_tokenizer):
    prompt = make_prompt(tiny_tokenizer, "A {curly}\nn\u00e9edle \U0001f600.\n", "What {x}?")
    text = text_of(tiny_tokenizer, prompt.build(length=400, depth=0.5))
    assert "\nA {curly}\nn\u00e9edle \U0001f600.\n" in text and text.endswith("\n\nQuestion: What {x}?\nAnswer:")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts/sub").mkdir(parents=True)
    (tmp_path / "texts/b.txt").write_bytes(b"\xef\xbb\xbfB one.\r\nB two.\r\n")
    (tmp_path / "texts/a.txt").write_text("A one.")
    (tmp_path / "texts/sub/c.txt").write_text("C.\n")
    (tmp_path / "texts/d.md").write_text("not read")
    (tmp_path / "texts/empty.txt").touch()
    return tmp_path / "texts"


def test_files_and_folders_are_read_in_order(folder):
    assert read_haystack([folder]) == "A one.\n\nB one.\nB two.\n\nC."
    assert read_haystack([folder / "d.md", folder / "a.txt"]) == "not read\n\nA one."


def test_script_writes_table_file_and_plot(evaluate, tiny_model_dir, folder, tmp_path):
    out = tmp_path / "out.json"
    code, stdout, _ = evaluate(
        "needle", "--model_name_or_path", tiny_model_dir, "--haystack", folder, "--lengths", 300, "--depths", 0, 1,
        "--needle", "Ines Vogel bakes.", "--question", "Who bakes?", "--max_new_tokens", 4,
        "--output_file", out, "--plot", tmp_path / "map.png",
    )  # fmt: skip
    assert code == 0
    assert "warning: length 300 is beyond the model's context of 64 tokens" in stdout
    assert re.search(r"length 300: the haystack is shorter and was used \d+ times", stdout)
    assert "depth  300" in stdout and "itself contains" not in stdout
    written = json.loads(out.read_text())
    assert written["protocol"]["answer"] == "Ines Vogel bakes." and written["protocol"]["template"] == "none"
    assert [cell["depth"] for cell in written["cells"]] == [0, 1] and written["context_size"] == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.png", "out.json", "texts"]


def test_script_uses_the_chat_template_unless_told_otherwise(
    evaluate, tiny_model_dir, chat_tokenizer, folder, tmp_path
):
    shutil.copytree(tiny_model_dir, tmp_path / "chat")
    chat_tokenizer.save_pretrained(tmp_path / "chat")
    for extra, template in (([], "chat_template"), (["--prompt_template", "none"], "none")):
        code, stdout, _ = evaluate(
            "needle", "--model_name_or_path", tmp_path / "chat", "--haystack", folder, "--lengths", 300, "--num_depths",
            1, "--max_new_tokens", 1, "--answer", "b TWO", "--output_file", tmp_path / "out.json", *extra,
        )  # fmt: skip
        assert code == 0 and "warning: the haystack itself contains the answer" in stdout
        assert json.loads((tmp_path / "out.json").read_text())["protocol"]["template"] == template
