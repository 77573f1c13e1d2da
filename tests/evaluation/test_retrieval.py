"""Passkey and needle in a haystack: prompts of exact length, the user's text, scores, the grid and its heat map."""

import re
from collections import Counter

import pytest
from conftest import sentences
from rigged_model import ask_all, rigged
from train_passkey_llama import RowMaker, train_tokenizer
from train_retrieval_llama import TINY_LLAMA, load_tokenizer
from transformers import AutoTokenizer

from longqlora.evaluation.retrieval import needle, passkey
from longqlora.evaluation.retrieval.grid import (
    by_place,
    draw_panel,
    even_depths,
    grid_table,
    percent,
    plot_heatmap,
)
from longqlora.evaluation.retrieval.haystack import MAX_PIECE_CHARACTERS, Haystack, pieces, read_haystack
from longqlora.evaluation.retrieval.needle import Needle, contains, ids_around, needle_prompt, word_recall
from longqlora.evaluation.retrieval.passkey import Passkey, PasskeyTemplate, accuracy_cells

KEY = "40817"
# Sentences of different lengths, with numbers that tell where they are.
TEXT = " ".join(f"This is sentence number {n}{', which is rather long' * (n % 3)}." for n in range(60))
CHAT = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}<|assistant|>\n"


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def key_in(prompt: str) -> str:
    return re.search(r"The pass key is (\d+)\. Remember", prompt)[1]


def make_prompt(tokenizer, text=needle.NEEDLE, question=needle.QUESTION, template="none"):
    return needle_prompt(Haystack(tokenizer, TEXT), text, question, template=template)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def llama2_tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "llama2_tokenizer")


@pytest.fixture(params=["tiny", "tiny without bos", "tiny-llama", "llama2"])
def any_tokenizer(request, tokenizer, repo):
    """Byte-level BPE with and without BOS, a larger one, and SentencePiece's."""
    if request.param == "llama2":
        return request.getfixturevalue("llama2_tokenizer")
    if request.param == "tiny-llama":
        return AutoTokenizer.from_pretrained(repo / "data/tiny-llama")
    if request.param == "tiny without bos":
        tokenizer.bos_token = None
    return tokenizer


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_passkey_prompts_have_the_length_the_words_and_the_depth(any_tokenizer, depth):
    template = PasskeyTemplate(any_tokenizer)
    prompt, num_bos = template.prompt(KEY), int(any_tokenizer.bos_token_id is not None)
    shortest = prompt.min_length
    for length in (shortest, shortest + 1, shortest + 401, 1500):
        ids = prompt.build(length=length, depth=depth)
        text = text_of(any_tokenizer, ids)
        lines = text.split("\n")
        assert len(ids) == length and len(lines) == 5
        assert (lines[0], lines[2], lines[4]) == (passkey.DESCRIPTION, passkey.NEEDLE.format(key=KEY), passkey.QUESTION)
        assert all(" ".join([passkey.FILLER] * 200).startswith(lines[place]) for place in (1, 3))
        assert ids[:num_bos] == [any_tokenizer.bos_token_id] * num_bos
        start = len(prompt.before) + round(depth * (length - shortest))
        assert ids[start : start + len(prompt.needle)] == prompt.needle
    ids = prompt.build(length=700, depth=depth)
    if depth == 0.5:
        assert ids[num_bos:] == any_tokenizer(text_of(any_tokenizer, ids), add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match=f"length {shortest - 1} is too short.* need {shortest} "):
        prompt.build(length=shortest - 1, depth=depth)


def trials(lengths, depths, num_trials, seed=0, **options):
    return Passkey(lengths, depths, num_trials=num_trials, seed=seed, **options).trials()


def test_trials_are_seeded_and_independent_of_each_other():
    found = trials([100, 200], [0, 0.5], 3, 7)
    assert [(t["length"], t["depth"]) for t in found[::3]] == [(100, 0.0), (100, 0.5), (200, 0.0), (200, 0.5)]
    assert found[0] == {"length": 100, "depth": 0.0, "key": "61700"}, "the same on every machine"
    assert trials([200, 200], [0.5, 0.5], 3, 7) == found[9:] and trials([100, 200], [0, 0.5], 3, 8) != found
    assert len({t["key"] for t in found}) == 12 and all(len(t["key"]) == 5 and t["key"][0] != "0" for t in found)
    for num_digits in (1, 2, 50):
        keys = [t["key"] for t in trials([9], [1], 40, num_digits=num_digits)]
        assert Counter(map(len, keys)) == {num_digits: 40}


@pytest.mark.parametrize(
    ("reply", "is_correct"),
    [("{}. Remember it.", True), ("{}", True), ("\n{}\n1", True), ("\u0661 {}, 5", True), ("is 0{}", False),
     ("{}0", False), ("1 {}", False), ("none", False), ("", False)],
)  # fmt: skip
def test_an_answer_counts_if_its_first_number_is_the_key(tiny_tokenizer, reply, is_correct):
    loaded = rigged(tiny_tokenizer, lambda prompt: " " + reply.format(key_in(prompt)))
    task, trial = Passkey([600], [0.9]), {"length": 600, "depth": 0.9, "key": KEY}
    task.use(loaded)
    result = task.ask(trial)
    assert result["is_correct"] is is_correct and {name: result[name] for name in trial} == trial
    assert loaded.model.lengths == [600]


def test_every_key_is_counted(tiny_tokenizer):
    loaded = rigged(tiny_tokenizer, lambda prompt: f" {key_in(prompt)}" if int(key_in(prompt)) % 2 else " 0")
    record = ask_all(Passkey([500, 700], [0, 1], num_trials=6, seed=1), loaded)
    is_odd = [int(trial["key"]) % 2 for trial in record["trials"]]
    places = [(cell["length"], cell["depth"], cell["num_correct"]) for cell in record["cells"]]
    assert places == [(length, depth, sum(is_odd[6 * number : 6 * number + 6]))
                      for number, (length, depth) in enumerate([(500, 0), (500, 1), (700, 0), (700, 1)])]  # fmt: skip
    assert len(loaded.model.lengths) == 24 > sum(is_odd) > 0


def test_table_has_a_row_for_each_depth_and_means():
    places = [(64, 0.0, True), (64, 0.0, False), (64, 0.125, True), (1024, 0.0, False), (1024, 0.125, True)]
    cells = accuracy_cells([{"length": a, "depth": b, "is_correct": c} for a, b, c in places])
    assert cells[0] == {"length": 64, "depth": 0.0, "num_trials": 2, "num_correct": 1, "accuracy": 0.5}
    assert grid_table(cells, "accuracy").split("\n") == [
        "depth     64   1024",
        "   0%   50.0    0.0",
        "12.5%  100.0  100.0",
        " mean   75.0   50.0",
    ]
    assert even_depths(1) == [0.5] and even_depths(2) == [0, 1] and even_depths(4) == [0, 0.3333, 0.6667, 1]
    assert percent(0) == "0%" and percent(0.3333) == "33.33%" and percent(1) == "100%"


def test_heatmap_draws_values_at_their_places_on_one_scale(tmp_path):
    from matplotlib.figure import Figure

    cells = [{"length": length, "depth": depth, "score": score}
             for length, depth, score in ((512, 1, 0.9), (64, 0, 0.1), (64, 1, 0.3), (512, 0, 0))]  # fmt: skip
    axis = Figure().subplots()
    assert draw_panel(axis, *by_place(cells, "score")).get_clim() == (0, 1)
    drawn = {(text.get_position(), text.get_text(), text.get_color()) for text in axis.texts}
    assert {((0, 0), "0.10", "white"), ((1, 1), "0.90", "black")} < drawn and len(drawn) == 4
    panels = {"one $x_$": cells, "two": cells[:1], "three": cells, "four": cells}
    plot_heatmap(panels, tmp_path / "map.svg", value="score", label="score")
    assert (tmp_path / "map.svg").read_bytes().startswith(b"<?xml")


def tiny_llama_with_digits():
    """tiny-llama's tokenizer as train_retrieval_llama.py takes it: text without digits keeps its ids."""
    tokenizer, text = load_tokenizer(TINY_LLAMA), "def f(x):\n    "
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(TINY_LLAMA)(text)["input_ids"]
    return tokenizer


@pytest.mark.parametrize("make_tokenizer", [train_tokenizer, tiny_llama_with_digits])
def test_trained_model_solves_its_own_test_by_construction(make_tokenizer):
    """Rows of the training scripts are prompts of the test with their answers."""
    import numpy as np

    tokenizer = make_tokenizer()
    rows = RowMaker(tokenizer, np.random.default_rng(0))
    lengths = (rows.min_length, 150, 256)
    made = [rows.row(length) for length in lengths]
    texts = [text_of(tokenizer, ids) for ids, _ in made]
    for length, (ids, weights), text in zip(lengths, made, texts, strict=True):
        assert len(ids) == len(weights) == length and text.endswith(f"{passkey.QUESTION} {key_in(text)}.")
        assert ids[-1] == tokenizer.eos_token_id
        # First mention free, second and answer (with its space, full stop and end) count in full.
        assert Counter(weights)[0.0] == 5 and Counter(weights)[1.0] == 5 + len(rows.answer(key_in(text)))
    assert texts[1].startswith(passkey.DESCRIPTION) and len(set(map(key_in, texts))) == 3
    assert [tokenizer.decode([token]) for token in rows.digits] == list("0123456789")


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
def test_needle_prompts_have_the_length_and_hold_the_needle(chat_tokenizer, template, depth):
    prompt = make_prompt(chat_tokenizer, template=template)
    for length in (prompt.min_length, prompt.min_length + 1, 900, 5000):
        ids = prompt.build(length=length, depth=depth)
        text = text_of(chat_tokenizer, ids)
        assert len(ids) == length and ids[0] == chat_tokenizer.bos_token_id
        assert text.count(needle.NEEDLE) == 1 and text.count(needle.QUESTION) == 1
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
    assert len(ids) == 500 and f".\n{needle.NEEDLE}\n This is sentence" in text
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


def test_every_cell_is_scored(chat_tokenizer, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    loaded = rigged(chat_tokenizer, lambda prompt: " A sentence number." if len(prompt) < 1500 else " One number")
    record = ask_all(Needle([700, 2900], [0, 1], [tmp_path / "text.txt"], answer="SENTENCE number"), loaded)
    assert loaded.model.lengths == [700, 700, 2900, 2900]
    assert [cell["score"] for cell in record["cells"]] == [1, 1, 1 / 2, 1 / 2]
    assert [cell["is_contained"] for cell in record["cells"]] == [True, True, False, False]
    assert [cell["num_repeats"] for cell in record["cells"]] == [1, 1, 2, 2]
    assert record["protocol"]["template"] == "chat_template", "unless told otherwise"
    assert "warning: the haystack itself contains the answer" in capsys.readouterr().out


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
