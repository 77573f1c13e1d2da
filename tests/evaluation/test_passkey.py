"""Passkey retrieval: prompts of exact length, scoring, the grid and its heat map, the script."""

import copy
import re
from collections import Counter

import pytest
from conftest import SHARED
from rigged_model import ask_all, load_script, rigged

from longqlora.evaluation.retrieval.grid import (
    by_place,
    draw_panel,
    even_depths,
    grid_cells,
    grid_table,
    percent,
    plot_heatmap,
)
from longqlora.evaluation.retrieval.passkey import (
    DESCRIPTION,
    FILLER,
    QUESTION,
    Passkey,
    PasskeyTemplate,
    accuracy_cells,
    answer_trial,
    first_number,
    make_trials,
)

KEY = "40817"
NEEDLE = f"The pass key is {KEY}. Remember it. {KEY} is the pass key."


def key_in(prompt: str) -> str:
    return re.search(r"The pass key is (\d+)\. Remember", prompt)[1]


@pytest.fixture(scope="module", params=["tiny", "tiny without bos", "tiny-llama", "llama2"])
def tokenizer(request, tiny_tokenizer, repo):
    """Byte-level BPE with and without BOS, a larger one, and SentencePiece-like where its file is at hand."""
    from transformers import AutoTokenizer

    if request.param == "tiny-llama":
        return AutoTokenizer.from_pretrained(repo / "data/tiny-llama")
    if request.param == "llama2":
        if not (SHARED / "data/llama2_tokenizer").is_dir():
            pytest.skip("no ../shared/data/llama2_tokenizer beside the checkout")
        return AutoTokenizer.from_pretrained(SHARED / "data/llama2_tokenizer")
    plain = copy.deepcopy(tiny_tokenizer)
    if request.param == "tiny without bos":
        plain.bos_token = None
    return plain


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_prompts_have_the_length_the_words_and_the_depth(tokenizer, depth):
    template = PasskeyTemplate(tokenizer)
    prompt, num_bos = template.prompt(KEY), int(tokenizer.bos_token_id is not None)
    shortest = prompt.min_length
    for length in (shortest, shortest + 1, shortest + 401, 1500):
        ids = prompt.build(length=length, depth=depth)
        text = text_of(tokenizer, ids)
        lines = text.split("\n")
        assert len(ids) == length and len(lines) == 5
        assert (lines[0], lines[2], lines[4]) == (DESCRIPTION, NEEDLE, QUESTION)
        assert all((" ".join([FILLER] * 200)).startswith(lines[place]) for place in (1, 3))
        assert ids[:num_bos] == [tokenizer.bos_token_id] * num_bos
        start = len(prompt.before) + round(depth * (length - shortest))
        assert ids[start : start + len(prompt.needle)] == prompt.needle
    ids = prompt.build(length=700, depth=depth)
    if depth == 0.5:
        assert ids[num_bos:] == tokenizer(text_of(tokenizer, ids), add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match=f"length {shortest - 1} is too short.* need {shortest} "):
        prompt.build(length=shortest - 1, depth=depth)


def trials(lengths, depths, num_trials, seed=0, **options):
    return make_trials(grid_cells(lengths, depths), num_trials=num_trials, seed=seed, **options)


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
    ("text", "number"),
    [(" 123. 9", "123"), ("12,345", "12"), ("none", None), ("", None), ("is\n007!", "007"), ("\u0661 5", "5")],
)
def test_first_number(text, number):
    assert first_number(text) == number


@pytest.mark.parametrize(
    ("reply", "is_correct"),
    [("{}. Remember it.", True), ("{}", True), ("\n{}\n1", True), ("{}0", False), ("1 {}", False), ("", False)],
)
def test_an_answer_counts_if_its_first_number_is_the_key(tiny_tokenizer, reply, is_correct):
    loaded = rigged(tiny_tokenizer, lambda prompt: " " + reply.format(key_in(prompt)))
    trial = {"length": 600, "depth": 0.9, "key": KEY}
    result = answer_trial(loaded, trial)
    assert result["is_correct"] is is_correct and {name: result[name] for name in trial} == trial
    assert loaded.model.lengths == [600]


def test_every_cell_is_counted(tiny_tokenizer):
    def reply(prompt):
        key = key_in(prompt)
        return f" {key}" if int(key) % 2 else " 0"

    loaded = rigged(tiny_tokenizer, reply)
    task = Passkey([500, 700], [0, 1], num_trials=6, seed=1)
    result = ask_all(task, loaded)
    assert len(loaded.model.lengths) == 24
    assert [(cell["length"], cell["depth"]) for cell in result["cells"]] == [(500, 0), (500, 1), (700, 0), (700, 1)]
    for number, cell in enumerate(result["cells"]):
        odd = sum(int(t["key"]) % 2 for t in result["trials"][6 * number : 6 * number + 6])
        assert (cell["num_trials"], cell["num_correct"], cell["accuracy"]) == (6, odd, odd / 6)
    assert 0 < sum(cell["num_correct"] for cell in result["cells"]) < 24
    with pytest.raises(ValueError, match="length 20 is too short"):
        ask_all(Passkey([600, 20], [0]), loaded)
    assert len(loaded.model.lengths) == 24, "found before any trial"


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


def test_trained_model_solves_its_own_test_by_construction():
    """Rows of the training script are prompts of the test with their answers."""
    import numpy as np

    script = load_script("benchmark/train_passkey_llama.py")
    tokenizer = script.train_tokenizer()
    rows = script.RowMaker(tokenizer, np.random.default_rng(0))
    lengths = (rows.min_length, 150, 256)
    made = [rows.row(length) for length in lengths]
    texts = [text_of(tokenizer, ids) for ids, _ in made]
    for length, (ids, weights), text in zip(lengths, made, texts, strict=True):
        assert len(ids) == len(weights) == length and text.endswith(f"{QUESTION} {key_in(text)}.")
        assert ids[-1] == tokenizer.eos_token_id
        # First mention free, second and answer (with its space, full stop and end) count in full.
        assert Counter(weights)[0.0] == 5 and Counter(weights)[1.0] == 5 + len(rows.answer(key_in(text)))
    assert texts[1].startswith(DESCRIPTION) and len(set(map(key_in, texts))) == 3
    unknown = "naïve 日本 \U0001f600 x_1"
    assert text_of(tokenizer, tokenizer(unknown)["input_ids"]) == unknown
    assert [tokenizer.decode([token]) for token in rows.digits] == list("0123456789")
