"""RULER: samples that a parser can solve, lengths, haystacks, scores, table and plot."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from conftest import sentences

from longqlora.evaluation.ruler.task import (
    FittedTask,
    fraction_found,
    mean_by_length,
    metric_table,
    plot_scores,
    score_table,
)
from longqlora.evaluation.ruler.tasks import TASKS, TextHaystack

LENGTH = 2600
TEXT = "One {sentence} here. Then a second, with “quotes.” 第三句。 " + sentences(30) + "."
NUM_OUTPUTS = {"vt": 5, "cwe": 10, "fwe": 3, "niah_multivalue": 4, "niah_multiquery": 4}


def solve(prompt: str) -> list[str]:
    """The right answer, from the last question of a prompt alone."""
    if "magic" in prompt:
        query = re.search(r"(?:is|are all) the special magic \w+ for (.+?) mentioned", prompt)[1]
        pairs = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", prompt)
        keys = re.split(r", and |, ", query)
        return [value for wanted in keys for key, value in pairs if key == wanted]
    if "VAR" in prompt:
        question = prompt.rsplit("Memorize and track", 1)[1]
        wanted = [re.search(r"assigned the value (\d+)", question)[1]]
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", question):
            wanted += [name] if source in wanted else []
        return wanted[1:]
    if "numbered list" in prompt:
        words = re.findall(r"\d+\. (\S+)", prompt.rsplit("Below is", 1)[1].split("\nQuestion")[0])
        return [word for word, _ in Counter(words).most_common(10)]
    words = prompt.split("coded words. ")[1].split("\nQuestion")[0].split()
    return [word for word, _ in Counter(words).most_common(4)[1:]]


@pytest.fixture(scope="module")
def count_tokens(tiny_tokenizer):
    return lambda text: len(tiny_tokenizer(text).input_ids)


def fit(name, count_tokens, length=LENGTH, *, num_samples=4, max_new_tokens=None, seed=1, text=None):
    return FittedTask(name, length, count_tokens, num_samples, max_new_tokens, seed, text)


@pytest.mark.parametrize("name", TASKS)
def test_samples_fill_the_length_and_can_be_solved(name, count_tokens):
    text = TextHaystack(TEXT)
    fitted = fit(name, count_tokens, text=text)
    samples = fitted.samples()
    for sample, num_tokens in samples:
        assert num_tokens == count_tokens(sample.prompt)
        assert 0.93 * LENGTH <= num_tokens + TASKS[name].max_new_tokens <= LENGTH
        assert sorted(solve(sample.prompt)) == sorted(sample.outputs)
        assert len(set(sample.outputs)) == NUM_OUTPUTS.get(name, 1)
        if name == "vt":
            links = re.findall(r"VAR (\w{5}) = VAR (\w{5})", sample.prompt)
            assert links == list(zip(sample.outputs[1:], sample.outputs, strict=False)), "from variable to variable"
    assert len({sample.outputs for sample, _ in samples}) == 4
    assert fit(name, count_tokens, text=text).samples() == samples
    assert fit(name, count_tokens, seed=2, text=text).samples()[0][0] != samples[0][0]


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe"])
def test_least_length_is_named_and_is_the_least(name, count_tokens):
    with pytest.raises(ValueError, match=rf"--lengths 128: {name} needs at least \d+ tokens") as caught:
        fit(name, count_tokens, 128, max_new_tokens=20)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    fitted = fit(name, count_tokens, least, max_new_tokens=20)
    assert least - 60 < max(num_tokens for _, num_tokens in fitted.samples()) <= least - 20
    with pytest.raises(ValueError, match=f"at least {least} tokens"):
        fit(name, count_tokens, least - 1, max_new_tokens=20)


def test_a_longer_answer_takes_room_from_the_haystack(count_tokens):
    short, long = (fit("niah_single_1", count_tokens, max_new_tokens=room) for room in (10, 1000))
    assert short.num_units - long.num_units >= 5
    assert long.samples()[0][1] + 1000 <= LENGTH


def test_a_sample_of_shorter_words_gets_more_units():
    first = fit("niah_single_1", len, num_samples=1).build(0, 1)[0].outputs[0]
    fitted = fit("niah_single_1", lambda text: len(text) * (2 if first in text else 1))
    sizes = [num_tokens for _, num_tokens in fitted.samples()]
    assert all(0.93 * LENGTH <= size + fitted.max_new_tokens <= LENGTH for size in sizes)


def test_keys_of_needle_haystacks_are_all_different(count_tokens, monkeypatch):
    monkeypatch.setattr("longqlora.evaluation.ruler.tasks.ADJECTIVES", ["big", "red", "old"])
    monkeypatch.setattr("longqlora.evaluation.ruler.tasks.NOUNS", [f"noun{number}" for number in range(30)])
    sample, _ = fit("niah_multikey_2", count_tokens).samples()[0]
    keys = re.findall(r"for (\S+) is: ", sample.prompt)
    assert len(keys) > 20 and len(set(keys)) == len(keys)


@pytest.mark.parametrize("num_words", [*range(TASKS["fwe"].min_units, 100), 1000])
def test_the_three_frequent_words_are_strictly_more_frequent(num_words):
    sample = TASKS["fwe"].build(random.Random(0), num_words, 512, None)
    text = sample.prompt.split("coded words. ")[1].split("\nQuestion")[0]
    counts = [count for _, count in Counter(text.split()).most_common()]
    assert set(solve(sample.prompt)) == set(sample.outputs)
    assert counts[0] > counts[1] and (len(counts) == 4 or counts[3] > counts[4])


def test_a_task_without_words_for_the_length_is_refused(count_tokens, monkeypatch):
    monkeypatch.setitem(TASKS, "cwe", replace(TASKS["cwe"], max_units=40))
    with pytest.raises(ValueError, match="cwe has words for about"):
        fit("cwe", count_tokens)
    least = fit("cwe", count_tokens, 1800)
    assert all(solve(sample.prompt) for sample, _ in least.samples()) and least.num_units <= 40


def test_needles_stand_at_ends_of_sentences_and_short_texts_repeat():
    haystack = TextHaystack(TEXT)
    assert haystack.span(0, len(haystack.pieces)) == " ".join(TEXT.split())
    size = len(haystack.pieces)
    for position in range(2 * size + 5):
        place = haystack.place(position)
        assert place <= position
        assert haystack.span(0, place)[-1:] in ("", ".", "。", "”")
    assert haystack.place(2 * size) == 2 * size
    assert TextHaystack("no end at all").place(2) == 2
    assert len(TextHaystack("字" * 100).pieces) == 7


def test_haystack_is_reported_as_what_it_is(count_tokens):
    for name, text, haystack in (("niah_multikey_1", None, "noise"), ("niah_multikey_1", TextHaystack(TEXT), "text"),
                                 ("niah_multikey_3", TextHaystack(TEXT), "needles")):  # fmt: skip
        fitted = fit(name, count_tokens, text=text, num_samples=1)
        assert fitted.result(fitted.samples(), [""])["haystack"] == haystack


@pytest.mark.parametrize(
    ("answer", "expected", "share"),
    [("It is 42.", ["42"], 1), ("ABC and xyz", ["abc", "XYZ", "no", "none"], 0.5), ("", ["1"], 0), ("4 2", ["42"], 0)],
)
def test_score_is_the_share_of_expected_strings(answer, expected, share):
    assert fraction_found(answer, expected) == share


def test_table_mean_and_plot(tmp_path, count_tokens):
    fitted = fit("vt", count_tokens, num_samples=2)
    samples = fitted.samples()
    result = fitted.result(samples, [" ".join(samples[0][0].outputs), "none"])
    assert (result["score"], result["stderr"], result["num_samples"]) == (50, pytest.approx(50), 2)
    assert fitted.result(samples[:1], [""])["stderr"] is None
    results = [result, {**result, "task": "fwe", "score": 0.0}, {**result, "length": 9000, "score": 100.0}]
    assert mean_by_length(results) == {LENGTH: 25, 9000: 100}
    assert [line.split() for line in score_table(results).splitlines()] == [
        ["score", "2600", "9000"], ["vt", "50.0", "100.0"], ["fwe", "0.0", "-"], ["mean", "25.0", "100.0"],
    ]  # fmt: skip
    plot_scores(results, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    lines = metric_table([{"metrics": {"t": {"acc,none": 0.5, "acc_stderr,none": 0.25, "f1,x": 1}}}]).splitlines()
    assert [line.split() for line in lines[1:]] == [["t", "acc,none", "0.5000", "0.2500"], ["t", "f1,x", "1.0000", "-"]]
