"""Long tasks: reading the rows of the benchmarks, prompts that fit, and the script from rows to scores."""

import json
import re
from os.path import commonprefix
from types import SimpleNamespace

import pytest
from conftest import sentences
from rigged_model import ask_all, rigged

from longqlora.data.prompt import encode_text
from longqlora.evaluation.longtask.prompts import PromptForm, letter_ids, log_likelihoods, prompt_text
from longqlora.evaluation.longtask.questions import Question, read_questions
from longqlora.evaluation.longtask.task import LongTask, summarize_lengths, summarize_tasks
from longqlora.inference.generation import encode_prompt

CHOICE = {
    "context": "the quick brown fox",
    "question": "What is quick?",
    "options": ["dog", "fox", "box"],
    "answer": "B",
}
OPEN = {"context": "the quick brown fox", "question": "What is quick?", "answers": ["fox", "the fox"]}


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (OPEN, {"id": "1", "task": "rows", "question": "What is quick?", "references": ("fox", "the fox")}),
        ({"document": "d", "query": "q", "outputs": "a", "_id": "x7", "dataset": "qa"}, {"id": "x7", "task": "qa"}),
        ({"context": "c", "input": "q", "answers": ["a"], "all_classes": None}, {"context": "c", "question": "q"}),
        ({"input": "c", "instruction": "q", "answer": 42}, {"context": "c", "question": "q", "references": ("42",)}),
        ({"input": "all of it", "output": "a"}, {"context": "all of it", "question": "", "references": ("a",)}),
        ({**OPEN, "metric": "rouge1", "id": 5, "task": "größe"}, {"metric": "rouge1", "id": "5", "task": "größe"}),
        (CHOICE, {"options": ("dog", "fox", "box"), "right_letter": "B", "references": ("fox",)}),
        ({**CHOICE, "answer": "box"}, {"right_letter": "C"}),
        ({**CHOICE, "answer": "(c)"}, {"right_letter": "C"}),
        ({**CHOICE, "answer": 0}, {"right_letter": "A"}),
        ({**CHOICE, "options": [], "answer": ["fox"]}, {"options": (), "references": ("fox",)}),  # InfiniteBench
        ({**CHOICE, "options": ["B", "A"], "answer": "B"}, {"right_letter": "A"}),
        ({**CHOICE, "options": [1, 2.5], "answer": "2.5"}, {"options": ("1", "2.5"), "right_letter": "B"}),
        ({"context": "c", "question": "q", "choice_A": "x", "choice_B": "y", "answer": "B"}, {"right_letter": "B"}),
        # What LongBench, LongBench v2 and ZeroSCROLLS write beside the question.
        ({**OPEN, "length": 9, "dataset": "trec", "language": "en", "all_classes": ["a b"], "_id": "x"}, {"id": "x"}),
        ({**OPEN, "_id": "x", "domain": "a b", "difficulty": "hard", "length": "short"}, {"id": "x", "task": "rows"}),
        ({**OPEN, "pid": "a_0", "document_start_index": 3, "truncation_seperator": "... [cut]"}, {"id": "1"}),
    ],
)  # fmt: skip
def test_rows_of_the_benchmarks(row, expected, tmp_path):
    (task,) = read_questions([write_rows(tmp_path / "rows.jsonl", row)], "--data_path")
    assert {name: getattr(task, name) for name in expected} == expected


def test_rows_of_l_eval(tmp_path):
    rows = [
        {"instructions": ["q1", "q2"], "outputs": ["BC", "A"], "input": "text", "source": "coursera",
         "evaluation": "exam"},
        {"instructions": ["q"], "outputs": ["long answer"], "input": "text", "source": "news", "evaluation": "rouge"},
        {"instructions": ["q"], "outputs": ["12"], "input": "text", "source": "gsm", "evaluation": "exam"},
        {"instructions": ["q"], "outputs": ["short"], "input": "text", "evaluation": "LLM"},
    ]  # fmt: skip
    tasks = read_questions([write_rows(tmp_path / "a.jsonl", *rows)], "--data_path")
    assert [(task.id, task.task, task.question, task.metric_for("auto")) for task in tasks] == [
        ("1-1", "coursera", "q1", "exam"), ("1-2", "coursera", "q2", "exam"), ("2-1", "news", "q", "rougeL"),
        ("3-1", "gsm", "q", "exam"), ("4-1", "a", "q", "f1"),
    ]  # fmt: skip
    assert len(read_questions([tmp_path / "a.jsonl"], "--data_path", max_rows=1)) == 2


def test_sci_fi_asks_by_the_story_and_by_the_real_world(tmp_path):
    question = "Sirius has a planet, True or False? Answer this question based on the world described in the document."
    row = {"instructions": [question], "outputs": ["True [fact: False]"], "input": "text", "evaluation": "exam"}
    story, fact = read_questions([write_rows(tmp_path / "sci_fi.jsonl", row)], "--data_path")
    assert (story.id, story.task, story.context, story.question, story.references) == (
        "1-1", "sci_fi", "text", question, ("True",)
    )  # fmt: skip
    assert (fact.id, fact.task, fact.context, fact.references) == ("1-1-fact", "sci_fi (fact)", "", ("False",))
    assert fact.question.endswith("Answer this question based on facts of the real world.")
    assert story.metric_for("auto") == fact.metric_for("auto") == "exam"
    assert prompt_text(fact, fact.context, []) == f"Question: {fact.question}\nAnswer:"


def test_few_shot_rows_bring_their_examples(tmp_path):
    row = {"id": "a", "pid": "a_0", "input": "Text.", "query": "Why?", "output": "fox",
           "query_examples": ["Who? ", "What?"], "output_examples": ["me", "that"]}  # fmt: skip
    (task,) = read_questions([write_rows(tmp_path / "rows.jsonl", row)], "--data_path")
    assert task.examples == (("Who? ", "me"), ("What?", "that")) and task.references == ("fox",)
    assert prompt_text(task, "Text.", []) == (
        "Text.\n\nQuestion: Who?\nAnswer: me\n\nQuestion: What?\nAnswer: that\n\nQuestion: Why?\nAnswer:"
    )
    shot = Question("s", "t", "", "When?", ("now",))
    assert prompt_text(task, "Text.", [shot]).startswith("Question: When?\nAnswer: now\n\nText.\n\nQuestion: Who?")


def test_rows_that_differ_in_their_answer_are_one_question(tmp_path):
    rows = [{"id": name, "input": "Text.", "query": "Why?", "output": answer}
            for name, answer in (("a", "fox"), ("b", "dog"), ("a", "the fox"), ("a", "fox"))]  # fmt: skip
    tasks = read_questions([write_rows(tmp_path / "rows.jsonl", *rows)], "--data_path")
    assert [(task.id, task.references) for task in tasks] == [("a", ("fox", "the fox")), ("b", ("dog",))]
    tasks = read_questions([write_rows(tmp_path / "rows.jsonl", OPEN, OPEN)], "--data_path")
    assert [task.id for task in tasks] == ["1", "2"], "rows without a name stay apart"


@pytest.mark.parametrize(
    ("metric", "fields"),
    [
        ("f1", {"references": ("fox",)}),
        ("f1", {"references": ("word " * 30,)}),
        ("rougeL", {"references": ("fox", "word " * 31)}),
        ("accuracy", {"references": ("a",), "options": ("a", "b")}),
        ("exact_match", {"references": ("word " * 31,), "metric": "exact_match"}),
    ],
)
def test_the_usual_metric_follows_the_references(metric, fields):
    assert Question("1", "t", "c", "q", **fields).metric_for("auto") == metric


BAD_ROWS = {
    "list": ("[]", "not an object"),
    "no context": ({"question": "q", "answer": "a"}, '"context"'),
    "empty context": ({**OPEN, "context": " \n"}, '"context" is empty'),
    "question type": ({**OPEN, "question": 3}, '"question" is of type int'),
    "no answers": ({"context": "c", "question": "q"}, "found context, question"),
    "null answers": ({**OPEN, "answers": None}, 'no "references"'),
    "empty answers": ({**OPEN, "answers": []}, '"answers" is empty'),
    "answer type": ({**OPEN, "answers": [["a"]]}, "type list"),
    "answer nan": ({**OPEN, "answers": float("nan")}, "type float"),
    "surrogate": ({**OPEN, "context": "a\ud800"}, "surrogate"),
    "metric": ({**OPEN, "metric": "bleu"}, "'bleu'"),
    "accuracy": ({**OPEN, "metric": "accuracy"}, "no \"options\""),
    "options type": ({**CHOICE, "options": "abc"}, '"options" is not a list'),
    "one option": ({**CHOICE, "options": ["fox"]}, "2 to 26"),
    "many options": ({**CHOICE, "options": [str(n) for n in range(27)]}, "2 to 26"),
    "option type": ({**CHOICE, "options": ["a", None]}, "NoneType"),
    "letter beyond": ({**CHOICE, "answer": "D"}, "'D', none of the 3 options"),
    "id type": ({**OPEN, "id": {}}, '"id" is of type dict'),
    "instructions": ({"instructions": "q", "outputs": ["a"], "input": "c"}, "are no lists of equal length"),
    "no instructions": ({"instructions": [], "outputs": [], "input": "c"}, '"instructions" is empty'),
    "examples": ({**OPEN, "query_examples": ["q"], "output_examples": []}, "no lists of equal length"),
    "lost text": ({**OPEN, "document": "more"}, 'the key "document" carries text that is not read'),
    "lost question": ({**OPEN, "instruction": "Be brief."}, 'the key "instruction" carries text'),
    "lost answer": ({**CHOICE, "outputs": ["none"]}, 'the key "outputs" carries text'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_one_line_with_its_number(name, tmp_path):
    row, words = BAD_ROWS[name]
    text = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(OPEN).encode() + b"\r\n\r\n" + text.encode() + b"\n")
    with pytest.raises(ValueError) as caught:
        read_questions([path], "--data_path")
    message = str(caught.value)
    assert message.startswith(f"--data_path: {path} line 3: ") and words in message and "\n" not in message, message
    assert len(read_questions([path], "--data_path", max_rows=1)) == 1, "rows behind the last are not read"


def test_prompts_with_options_and_examples():
    task = Question("1", "t", "Text.\n", "Why?", ("fox",), ("dog", "fox"))
    asked = "Question: Why?\n(A) dog\n(B) fox\nAnswer with the letter of the right option.\nAnswer:"
    assert prompt_text(task, "Text.\n", []) == f"Text.\n\n{asked}"
    shot = Question("s", "t", "", "Who?", ("me", "I"))
    two_shots = f"Question: Who?\nAnswer: me\n\nText.\n\n{asked} B\n\nText.\n\n{asked}"
    assert prompt_text(task, "Text.", [shot, task]) == two_shots
    assert prompt_text(Question("1", "t", "Sum up: x", "", ("y",)), "Sum up: x", []) == "Sum up: x"
    form = PromptForm(None, "none", 100, 10, (task, shot), 1)
    assert form.shots_for(task) == [shot] and form.shots_for(shot) == [task], "never the question itself"


@pytest.mark.parametrize("template", ["none", "vicuna_v1.1"])
@pytest.mark.parametrize("text", [sentences(400), "größe 読む 😀 " * 60])
def test_a_long_context_loses_its_middle(template, text, tiny_tokenizer):
    task = Question("1", "t", f"START {text} END", "Why?", ("x",))
    for size in range(240, 257):
        ids, num_context, num_cut = PromptForm(tiny_tokenizer, template, size, 32).fit(task)
        prompt = tiny_tokenizer.decode(ids, skip_special_tokens=True)
        assert size - 36 <= len(ids) <= size - 32 and num_context == len(encode_text(tiny_tokenizer, task.context))
        kept = re.search(r"START.*END(?=\n\nQuestion: Why\?\nAnswer:)", prompt)[0]
        assert "\ufffd" not in kept
        assert ids == encode_prompt(tiny_tokenizer, f"{kept}\n\nQuestion: Why?\nAnswer:", template=template)
    head = commonprefix([kept, task.context])
    num_head = len(encode_text(tiny_tokenizer, head))
    assert abs(num_head - (num_context - num_cut) / 2) < 6, "head and tail are equally long"
    ids, _, num_cut = PromptForm(tiny_tokenizer, template, 256, 32).fit(Question("1", "t", "brief", "Why?", ("x",)))
    assert num_cut == 0 and "brief\n\nQ" in tiny_tokenizer.decode(ids)
    with pytest.raises(ValueError, match="question 1 of t: .* 24 fit in the context of 56"):
        PromptForm(tiny_tokenizer, template, 56, 32).fit(Question("1", "t", text, "Why? " * 20, ("x",)))


@pytest.fixture(scope="module")
def tiny_model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.mark.parametrize("continuations", [[[7], [9]], [[5, 7], [5, 9], [5, 8]], [[5, 7], [6, 7, 9]]])
def test_log_likelihoods_equal_whole_passes(continuations, tiny_model):
    import torch

    prompt = [1, 20, 30, 40]
    expected = []
    for ids in continuations:
        logits = tiny_model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        expected.append(sum(logits[len(prompt) - 1 + n, token].item() for n, token in enumerate(ids)))
    found = log_likelihoods(tiny_model, prompt, continuations)
    assert [a - found[0] for a in found] == pytest.approx([a - expected[0] for a in expected], abs=1e-4)


@pytest.mark.parametrize("template", ["none", "vicuna_v1.1", "vicuna_v1.1_fastchat"])
def test_letters_follow_the_prompt_as_answers_do(template, tiny_tokenizer):
    task = Question("1", "t", "Text.", "Why?", ("a",), ("a", "b"))
    prompt, _, _ = PromptForm(tiny_tokenizer, template, 1000, 5).fit(task)
    letters = letter_ids(tiny_tokenizer, 2, template)
    assert [tiny_tokenizer.decode([*prompt, *ids])[-3:] for ids in letters] == [": A", ": B"]


def test_means_by_task_and_length():
    names = ("task", "metric", "score", "num_context_tokens", "num_tokens_cut")
    rows = [("b", "f1", 0.5, 1023, 0), ("a", "accuracy", 0.0, 1024, 0), ("b", "f1", 1.0, 2047, 3)]
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    rows[1]["choice"] = None
    first, second = summarize_tasks(rows)
    assert (first["task"], first["score"], first["num_rows"], first["num_rows_cut"]) == ("b", 0.75, 2, 1)
    assert (second["score"], second["num_rows_without_choice"], second["mean_context_tokens"]) == (0.0, 1, 1024)
    bins = [tuple(entry.values()) for entry in summarize_lengths(rows)]
    assert bins == [("accuracy", 1024, 2048, 0.0, 1), ("f1", 512, 1024, 0.5, 1), ("f1", 1024, 2048, 1.0, 1)]


def test_from_rows_to_scores(tiny_model, tiny_tokenizer, tmp_path):
    qa = write_rows(tmp_path / "qa.jsonl", {**OPEN, "context": sentences(900)}, {**OPEN, "metric": "rouge2"}, OPEN)
    exam = write_rows(tmp_path / "exam.jsonl", CHOICE, {**CHOICE, "answer": "A"})
    shots = write_rows(tmp_path / "shots.jsonl", {"question": "Who?", "answer": "me"}, CHOICE)
    task = LongTask([qa, exam], max_rows=2, num_shots=1, shots_file=shots, choice_scoring="loglikelihood",
                    max_new_tokens=6, prompt_template="none")  # fmt: skip
    result = ask_all(task, SimpleNamespace(model=tiny_model, tokenizer=tiny_tokenizer), context_size=400)
    rows = result["rows"]
    assert [(row["task"], row["id"], row["metric"]) for row in rows] == [
        ("qa", "1", "f1"), ("qa", "2", "rouge2"), ("exam", "1", "accuracy"), ("exam", "2", "accuracy"),
    ]  # fmt: skip
    assert rows[0]["num_tokens_cut"] > 0 == rows[1]["num_tokens_cut"] and rows[0]["num_prompt_tokens"] <= 394
    assert all(0 <= row["score"] <= 1 and row["num_prompt_tokens"] > row["num_context_tokens"] for row in rows[1:])
    likely = rows[2]["log_likelihoods"]
    assert rows[2]["choice"] == "ABC"[likely.index(max(likely))] and rows[2]["right_choice"] == "B"
    assert sum(entry["score"] for entry in result["tasks"] if entry["task"] == "exam") <= 0.5, "one letter for both"
    assert result["settings"]["num_shots"] == 1


@pytest.mark.parametrize(("template", "answer"), [("none", "fox"), ("vicuna_v1.1", "fox\nQuestion: What?")])
def test_raw_answers_end_before_the_next_question(template, answer, tiny_tokenizer, tmp_path):
    loaded = rigged(tiny_tokenizer, lambda prompt: " fox\nQuestion: What?")
    task = LongTask([write_rows(tmp_path / "qa.jsonl", OPEN)], prompt_template=template)
    (row,) = ask_all(task, loaded, context_size=400)["rows"]
    assert row["answer"] == answer and row["score"] == (1 if answer == "fox" else 0.5)
