"""Passkey retrieval: prompts of exact length, scoring, the grid and its heat map, the script."""

import json
import re
from collections import Counter

import pytest
from conftest import SHARED
from rigged_model import load_script, rigged, run_main_of

from longqlora.evaluation.retrieval.grid import check_grid, context_warnings, even_depths, grid_table, percent
from longqlora.evaluation.retrieval.heatmap import plot_heatmap
from longqlora.evaluation.retrieval.passkey import (
    DESCRIPTION,
    FILLER,
    QUESTION,
    PasskeyTemplate,
    accuracy_cells,
    accuracy_table,
    answer_trial,
    build_prompt,
    evaluate_passkey,
    first_number,
    make_trials,
)

KEY = "40817"
NEEDLE = f"The pass key is {KEY}. Remember it. {KEY} is the pass key."


def trial(length, depth=0.5, key=KEY):
    return {"length": length, "depth": depth, "key": key}


def key_in(prompt: str) -> str:
    return re.search(r"The pass key is (\d+)\. Remember", prompt)[1]


@pytest.fixture(scope="module", params=["tiny", "tiny without bos", "tiny-llama", "llama2"])
def tokenizer(request, tiny_tokenizer, repo):
    """Byte-level BPE with and without BOS, a larger one, and SentencePiece-like where its file is at hand."""
    import copy

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


@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_prompts_have_the_length_and_the_words(tokenizer, depth):
    shortest = PasskeyTemplate(tokenizer).min_length(KEY)
    for length in (shortest, shortest + 1, shortest + 38, 1500):
        ids = build_prompt(tokenizer, trial(length, depth))
        text = text_of(tokenizer, ids)
        assert len(ids) == length
        lines = text.split("\n")
        assert len(lines) == 5
        assert (lines[0], lines[2], lines[4]) == (DESCRIPTION, NEEDLE, QUESTION)
        assert all((" ".join([FILLER] * 200)).startswith(lines[place]) for place in (1, 3))
        if tokenizer.bos_token_id is not None:
            assert ids[0] == tokenizer.bos_token_id


def test_ids_are_those_of_the_whole_text(tokenizer):
    ids = build_prompt(tokenizer, trial(700, 0.5))
    whole = tokenizer(text_of(tokenizer, ids), add_special_tokens=False)["input_ids"]
    num_bos = int(tokenizer.bos_token_id is not None)
    assert ids[num_bos:] == whole


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_depth_divides_the_filler(tokenizer, depth):
    template = PasskeyTemplate(tokenizer)
    num_filler = 401
    ids = build_prompt(tokenizer, trial(template.min_length(KEY) + num_filler, depth))
    start = len(template.opening) + round(depth * num_filler) + len(template.newline)
    needle = template.needle(KEY)
    assert ids[start : start + len(needle)] == needle


def test_too_short_a_length_names_the_least(tokenizer):
    shortest = PasskeyTemplate(tokenizer).min_length(KEY)
    with pytest.raises(
        ValueError, match=f"length {shortest - 1} is too short.* 5 digits it needs at least {shortest} "
    ):
        build_prompt(tokenizer, trial(shortest - 1))


def test_trials_are_seeded_and_independent_of_each_other():
    trials = make_trials([100, 200], [0, 0.5], 3, 7)
    assert [(t["length"], t["depth"]) for t in trials[::3]] == [(100, 0.0), (100, 0.5), (200, 0.0), (200, 0.5)]
    assert make_trials([200, 200], [0.5, 0.5], 3, 7) == trials[9:]
    assert make_trials([100, 200], [0, 0.5], 3, 8) != trials
    assert len({t["key"] for t in trials}) == 12
    assert all(len(t["key"]) == 5 and t["key"][0] != "0" for t in trials)
    assert Counter(len(t["key"]) for t in make_trials([9], [1], 40, 0, num_digits=1)) == {1: 40}
    assert Counter(len(t["key"]) for t in make_trials([9], [1], 200, 0, num_digits=2)) == {2: 200}
    assert len(make_trials([9], [1], 1, 0, num_digits=50)[0]["key"]) == 50
    json.dumps(trials)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(lengths=[]), "at least one length"),
        (dict(depths=[]), "at least one length"),
        (dict(lengths=[10, 0]), "--lengths: must be at least 1 token, got 0"),
        (dict(depths=[0.5, 1.01]), "--depths: .* got 1.01"),
        (dict(depths=[-0.1]), "--depths"),
        (dict(depths=[float("nan")]), "--depths"),
        (dict(num_trials=0), "--num_trials: must be at least 1, got 0"),
        (dict(num_digits=0), "--num_digits: must be between 1 and 50, got 0"),
        (dict(num_digits=51), "--num_digits"),
    ],
)
def test_trials_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        make_trials(**{"lengths": [10], "depths": [0], "num_trials": 1, "seed": 0, **values})


@pytest.mark.parametrize(
    ("text", "number"),
    [(" 123. 9", "123"), ("12,345", "12"), ("none", None), ("", None), ("is\n007!", "007"), ("\u0661 5", "5")],
)
def test_first_number(text, number):
    assert first_number(text) == number


@pytest.mark.parametrize(
    ("reply", "is_correct"),
    [
        (lambda key: f" {key}. Remember it.", True),
        (lambda key: f" {key}", True),
        (lambda key: f"\n{key}\n1", True),
        (lambda key: f" {key}0", False),
        (lambda key: f" 1 {key}", False),
        (lambda key: f" {key[:-1]}", False),
        (lambda key: "", False),
    ],
)
def test_an_answer_counts_if_its_first_number_is_the_key(tiny_tokenizer, reply, is_correct):
    loaded = rigged(tiny_tokenizer, lambda prompt: reply(key_in(prompt)))
    result = answer_trial(loaded, trial(600, 0.9))
    assert result["is_correct"] is is_correct
    assert {name: result[name] for name in trial(0)} == trial(600, 0.9)
    assert loaded.model.lengths == [600]


def test_evaluation_counts_and_resumes(tiny_tokenizer, tmp_path):
    def reply(prompt):
        key = key_in(prompt)
        return f" {key}" if int(key) % 2 else " 0"

    loaded = rigged(tiny_tokenizer, reply)
    options = dict(lengths=[500, 700], depths=[0, 1], num_trials=6, seed=1, fingerprint={"model": 1})
    result = evaluate_passkey(loaded, output_file=tmp_path / "out.json", **options)
    assert len(loaded.model.lengths) == 24
    assert [(cell["length"], cell["depth"]) for cell in result["cells"]] == [(500, 0), (500, 1), (700, 0), (700, 1)]
    for number, cell in enumerate(result["cells"]):
        odd = sum(int(t["key"]) % 2 for t in result["trials"][6 * number : 6 * number + 6])
        assert (cell["num_trials"], cell["num_correct"], cell["accuracy"]) == (6, odd, odd / 6)
    assert 0 < sum(cell["num_correct"] for cell in result["cells"]) < 24
    assert evaluate_passkey(loaded, output_file=tmp_path / "out.json", **options) == result
    assert len(loaded.model.lengths) == 24
    json.dumps(result)


def test_a_length_that_cannot_be_is_found_before_any_trial(tiny_tokenizer):
    loaded = rigged(tiny_tokenizer, lambda prompt: "")
    with pytest.raises(ValueError, match="length 20 is too short"):
        evaluate_passkey(
            loaded, lengths=[600, 20], depths=[0], num_trials=1, seed=0, output_file=None, fingerprint={}
        )  # fmt: skip
    assert loaded.model.lengths == []


def result(length, depth, is_correct):
    return {"length": length, "depth": depth, "is_correct": is_correct}


def test_table_has_a_row_for_each_depth_and_means():
    results = [result(64, 0.0, True), result(64, 0.0, False), result(64, 0.125, True), result(1024, 0.125, True)]
    assert accuracy_cells(results)[0] == {
        "length": 64, "depth": 0.0, "num_trials": 2, "num_correct": 1, "accuracy": 0.5
    }  # fmt: skip
    assert accuracy_table(results).split("\n") == [
        "depth     64   1024",
        "   0%   50.0      -",
        "12.5%  100.0  100.0",
        " mean   75.0  100.0",
    ]


def test_grid_pieces():
    assert even_depths(1) == [0.5] and even_depths(2) == [0, 1] and even_depths(4) == [0, 0.3333, 0.6667, 1]
    with pytest.raises(ValueError, match="--num_depths: must be at least 1, got 0"):
        even_depths(0)
    assert percent(0) == "0%" and percent(0.3333) == "33.33%" and percent(1) == "100%"
    assert context_warnings([10, 20, 30], 20) == ["warning: length 30 is beyond the model's context of 20 tokens"]
    check_grid([1], [0, 1])
    assert grid_table([{"length": 1, "depth": 0, "score": 0.25}], "score").split("\n")[1] == "   0%  25.0"


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_heatmap_is_an_image(tmp_path, suffix):
    cells = [{"length": n, "depth": d, "accuracy": None if n == 64 and d else d} for n in (64, 512) for d in (0, 0.5)]
    panels = {"one $x_$": cells, "two": cells[:1], "three": cells, "four": cells[:3]}
    path = tmp_path / f"map.{suffix}"
    plot_heatmap(panels, path)
    data = path.read_bytes()
    assert data.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    assert list(tmp_path.iterdir()) == [path]
    if suffix == "png":
        plot_heatmap({"one": cells}, tmp_path / "one.png")
        size = [int.from_bytes(file.read_bytes()[16:20], "big") for file in (path, tmp_path / "one.png")]
        assert size[0] > 2 * size[1]


def test_heatmap_draws_values_at_their_places_on_one_scale(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, shown = [], []
    text, imshow = Axes.text, Axes.imshow
    monkeypatch.setattr(Axes, "text", lambda *args, **kw: drawn.append((*args[1:4], kw["color"])) or text(*args, **kw))
    monkeypatch.setattr(Axes, "imshow", lambda *args, **kw: shown.append(kw) or imshow(*args, **kw))
    cells = [{"length": 512, "depth": 1, "score": 0.9}, {"length": 64, "depth": 0, "score": 0.1}]
    plot_heatmap({"title": cells}, tmp_path / "map.png", value="score")
    assert sorted(drawn) == [(0, 0, "0.10", "white"), (1, 1, "0.90", "black")]
    assert (shown[0]["vmin"], shown[0]["vmax"]) == (0, 1)
    with pytest.raises(ValueError, match="no cells"):
        plot_heatmap({"title": []}, tmp_path / "none.png")


@pytest.fixture
def passkey(monkeypatch, capsys):
    script = load_script("script/evaluate/passkey.py")
    return lambda *args: run_main_of(script, args, monkeypatch, capsys)


def test_script_writes_table_file_and_plot(passkey, tiny_model_dir, tmp_path):
    out = tmp_path / "new" / "out.json"
    code, stdout, _ = passkey(
        "--model_name_or_path", tiny_model_dir, "--lengths", 300, 330, "--depths", 0, 1, 0, "--num_trials", 2,
        "--output_file", out, "--plot", tmp_path / "new" / "map.png",
    )  # fmt: skip
    assert code == 0
    assert "warning: length 300 is beyond the model's context of 64 tokens" in stdout
    assert "depth  300  330" in stdout and " mean" in stdout
    written = json.loads(out.read_text())
    assert len(written["cells"]) == 4 and len(written["trials"]) == 8
    assert written["protocol"]["num_digits"] == 5 and written["context_size"] == 64 and "torch" in written["versions"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["map.png", "out.json"]


BAD_INPUT = {
    "no model": (["--model_name_or_path", ""], "give a model"),
    "length": (["--lengths", "0"], "--lengths: must be at least 1 token"),
    "short": (["--lengths", "40"], "length 40 is too short for a passkey prompt"),
    "depth": (["--depths", "nan"], "--depths: must be between 0"),
    "depths": (["--num_depths", "0"], "--num_depths: must be at least 1"),
    "trials": (["--num_trials", "-1"], "--num_trials: must be at least 1"),
    "digits": (["--num_digits", "99"], "--num_digits"),
    "plot": (["--plot", "map.txt"], "--plot: 'map.txt' must end in"),
    "plot folder": (["--plot", "/proc/absent/map.png"], "--plot: cannot write"),
    "output": (["--output_file", "."], "--output_file: '.' is a folder"),
    "output folder": (["--output_file", "/proc/absent/out.json"], "--output_file: cannot write"),
    "absent model": (["--model_name_or_path", "/absent/model"], "/absent/model"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_one_line(passkey, tiny_model_dir, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD_INPUT[name]
    code, _, stderr = passkey("--model_name_or_path", tiny_model_dir, "--num_trials", 1, "--lengths", 300, *arguments)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0]
    assert "Traceback" not in stderr and list(tmp_path.iterdir()) == []


def test_trained_model_solves_its_own_test_by_construction(repo, tiny_tokenizer):
    """Rows of the training script are prompts of the test with their answers."""
    import numpy as np

    script = load_script("benchmark/train_passkey_llama.py")
    tokenizer = script.train_tokenizer()
    rows = script.RowMaker(tokenizer, np.random.default_rng(0))
    texts = []
    for length in (rows.min_length, 150, 256):
        ids, weights = rows.row(length)
        text = text_of(tokenizer, ids)
        key = key_in(text)
        assert len(ids) == len(weights) == length and text.endswith(f"{QUESTION} {key}.")
        assert ids[-1] == tokenizer.eos_token_id
        # First mention free, second and answer (with its space, full stop and end) count in full.
        assert Counter(weights)[0.0] == 5 and Counter(weights)[1.0] == 5 + len(rows.answer(key))
        texts.append(text)
    assert texts[1].startswith(DESCRIPTION) and len(set(map(key_in, texts))) == 3
    unknown = "naïve 日本 \U0001f600 x_1"
    assert text_of(tokenizer, tokenizer(unknown)["input_ids"]) == unknown
    assert [tokenizer.decode([token]) for token in rows.digits] == list("0123456789")
