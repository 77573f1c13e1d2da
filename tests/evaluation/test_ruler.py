"""RULER: samples that a parser can solve, their scores, and a user's own tasks asked through lm-eval."""

import json
import os
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import save_tiny_model, sentences, tiny_config
from peft import LoraConfig, get_peft_model
from rigged_model import ask_all

from longqlora.cli import go_offline_unless_reachable
from longqlora.evaluation.lm_eval_harness import load_task, wrap_model
from longqlora.evaluation.ruler.task import (
    FittedTask,
    Ruler,
    fraction_found,
    mean_by_length,
    metric_table,
    score_table,
)
from longqlora.evaluation.ruler.tasks import TASKS, TextHaystack
from longqlora.inference.load import load_for_inference
from longqlora.inference.source import ModelSource

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


def test_a_task_that_a_length_is_too_short_for_is_skipped_by_name(tiny_tokenizer, capsys):
    source, least = ModelSource(tiny_tokenizer, None, "base", None, 4096), {}
    for name in ("vt", "niah_single_1"):
        with pytest.raises(ValueError, match=f"--lengths 64: {name} needs at least") as caught:
            Ruler([name], lengths=[64], num_samples=1).make_trials(source)
        least[name] = int(re.search(r"at least (\d+) tokens", str(caught.value))[1])
    (first, length), (other, needed) = sorted(least.items(), key=lambda item: item[1])
    task = Ruler([other, first], lengths=[length, needed], num_samples=1)
    trials = [(trial["task"], trial["length"]) for trial in task.make_trials(source)[0]]
    assert length < needed and trials == [(other, needed), (first, length), (first, needed)]
    assert f"skipped: --lengths {length}: {other} needs at least {needed}" in capsys.readouterr().out
    (skipped,) = task.score([])["skipped"]
    assert (skipped["task"], skipped["length"]) == (other, length) and str(needed) in skipped["reason"]


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


def test_table_and_mean(count_tokens):
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
    lines = metric_table([{"metrics": {"t": {"acc,none": 0.5, "acc_stderr,none": 0.25, "f1,x": 1}}}]).splitlines()
    assert [line.split() for line in lines[1:]] == [["t", "acc,none", "0.5000", "0.2500"], ["t", "f1,x", "1.0000", "-"]]


@pytest.mark.parametrize(("knows", "score"), [(True, 100), (False, 0)])
def test_a_model_that_knows_scores_all(tiny_model_dir, tmp_path, knows, score):
    loaded = load_for_inference(str(tiny_model_dir))
    tokenizer = loaded.tokenizer

    def generate(input_ids, attention_mask, max_length, **_):
        assert max_length - input_ids.shape[1] in (30, 128), "the room of vt, and of the needles"
        prompts = [tokenizer.decode(row[mask.bool()], skip_special_tokens=True)
                   for row, mask in zip(input_ids, attention_mask, strict=True)]  # fmt: skip
        answers = [" ".join(solve(prompt)) if knows else "no idea" for prompt in prompts]
        ids = tokenizer(answers, add_special_tokens=False, padding=True, return_tensors="pt").input_ids
        return torch.cat([input_ids, ids], dim=1)

    loaded.model.generate = generate
    (tmp_path / "ä.txt").write_text("One text. Another one.")
    options = {"lengths": [2048, 1800, 1800], "num_samples": 3, "batch_size": 2, "haystack": [tmp_path / "ä.txt"]}
    record = ask_all(Ruler(["niah_multiquery", "vt"], **options), loaded)
    assert [(r["task"], r["length"], r["score"], r["haystack"]) for r in record["results"]] == [
        (task, length, score, haystack)
        for task, haystack in (("niah_multiquery", "text"), ("vt", "noise")) for length in (1800, 2048)
    ]  # fmt: skip
    assert record["mean"] == {1800: score, 2048: score}
    assert record["settings"]["haystack"]["files"] == ["ä.txt"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def own_tasks(tmp_path):
    """Folder of a user's own task files with local data, one of them with data of the hub."""
    folder = tmp_path / "tässks"
    folder.mkdir()
    rows = [{"q": f"{number} or more? ", "answer": number % 2} for number in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: ['yes', 'no']\n"
    local = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
    (folder / "own.yaml").write_text(f"task: own_task\n{local}{common}doc_to_target: answer\n", encoding="utf-8")
    (folder / "broken.yaml").write_text(f"task: broken\n{local}{common}doc_to_target: '{{{{no_such_field}}}}'\n")
    (folder / "hub.yaml").write_text(f"task: hub_task\ndataset_path: cais/mmlu\n{common}doc_to_target: answer\n")
    generate = common.replace("multiple_choice", "generate_until").replace("doc_to_choice: ['yes', 'no']\n", "")
    (folder / "long.yaml").write_text(f"task: long_answers\n{local}{generate}doc_to_target: answer\n")
    return folder


def test_own_lm_eval_task(evaluate, own_tasks, tiny_model_dir, tmp_path):
    output = tmp_path / "r.json"
    code, out, err = evaluate("ruler", "--model_name_or_path", tiny_model_dir, "--tasks", "own_task", "--include_path",
                              own_tasks, "--limit", 4, "--num_fewshot", 1, "--output_file", output)  # fmt: skip
    assert code == 0 and "own_task  acc,none" in out, err
    (result,) = json.loads(output.read_text())["results"]
    assert result["num_samples"] == {"own_task": 4}
    assert result["metrics"]["own_task"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub_task", r"hub_task: its data is not on this machine .*cais/mmlu.*run it once where"),
        ("broken", r"broken: lm-eval cannot load it \(UndefinedError: .*no_such_field"),
        ("long_answers", r"long_answers: answers of 256 tokens do not fit a context of 64"),
        ("nowhere", r"no task 'nowhere' here .* in lm-eval"),
    ],
)
def test_tasks_that_cannot_be_run_are_told_before_the_model_loads(own_tasks, name, message):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=own_tasks, include_defaults=False)
    with pytest.raises(ValueError, match=message) as caught:
        load_task(manager, name, max_new_tokens=None, context_size=64)
    assert "\n" not in str(caught.value)


def test_wrapping_leaves_the_model_alone(tmp_path, tiny_tokenizer):
    config = tiny_config(tie_word_embeddings=True)
    loaded = load_for_inference(save_tiny_model(tmp_path / "tied", tiny_tokenizer, config))
    loaded.model = get_peft_model(loaded.model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    loaded.model.get_input_embeddings().weight.data += 0.5
    loaded.model.generation_config.repetition_penalty = 1.5
    ids = torch.arange(5, 25)[None]
    before = loaded.model.eval()(input_ids=ids).logits
    model = wrap_model(loaded, batch_size=1, max_length=64)
    assert model.model is loaded.model and torch.equal(loaded.model(input_ids=ids).logits, before)
    assert (model.rank, model.world_size, model.max_length) == (0, 1, 64)
    assert loaded.model.generation_config.repetition_penalty in (None, 1.0)
    assert 2 in loaded.model.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("given", "proxies", "found"),
    [({"HF_HUB_OFFLINE": "0"}, {}, "0"), ({}, {}, "1"), ({}, {"https": "http://127.0.0.1:1"}, None)],
)
def test_hub_is_given_up_where_nothing_answers(given, proxies, found, monkeypatch):
    """What the user set stays, and behind a proxy the hub is taken to answer."""
    monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    monkeypatch.setattr("os.environ", {**environment, "HF_ENDPOINT": "https://127.0.0.1:9/x", **given})
    go_offline_unless_reachable()
    assert os.environ.get("HF_HUB_OFFLINE") == found


def test_tasks_are_listed(evaluate):
    code, out, _ = evaluate("ruler", "--list_tasks")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == list(TASKS)
