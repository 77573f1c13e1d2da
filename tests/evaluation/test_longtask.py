"""Long tasks: the rows of the benchmarks, prompts that fit, and scores against SQuAD's, rouge-score's and L-Eval's."""

import json
import re
from dataclasses import replace
from os.path import commonprefix

import pytest
from conftest import sentences
from rigged_model import ask_all, rigged

from longqlora.data.prompt import encode_text
from longqlora.evaluation.longtask.prompts import PromptForm, prompt_text
from longqlora.evaluation.longtask.questions import IN_THE_STORY, Question, read_questions
from longqlora.evaluation.longtask.scores import (
    best_score,
    exact_match,
    f1,
    normalize_answer,
    parse_choice,
    parse_letters,
    rouge,
)
from longqlora.evaluation.longtask.task import LongTask, score_answer, summarize_lengths, summarize_tasks
from longqlora.inference.generation import encode_prompt

ASKED = {"context": "the quick brown fox", "question": "What is quick?"}
CHOICE = {**ASKED, "options": ["dog", "fox", "box"], "answer": "B"}
OPEN = {**ASKED, "answers": ["fox", "the fox"]}


# As Yale-LILY/QMSum (data/ALL/jsonl) and nyu-mll/SQuALITY (data/v1-3/txt) publish them.
QMSUM = {
    "topic_list": [{"topic": "Greetings", "relevant_text_span": [["0", "1"]]}],
    "general_query_list": [{"query": "Summarize.", "answer": "All."}],
    "specific_query_list": [{"query": "Who?", "answer": "PM.", "relevant_text_span": [["0", "1"]]}],
    "meeting_transcripts": [{"speaker": "PM", "content": "Hi {gap}"}, {"speaker": "Marketing", "content": "Bye ."}],
}
RESPONSES = [
    {"worker_id": str(k), "uid": "0c", "response_text": text} for k, text in enumerate(("A ship.", "The ship."))
]
SQUALITY = {
    "metadata": {"passage_id": "63833", "uid": "ea00", "license": "This eBook is for the use of anyone"},
    "document": "Jinx Ship",
    "questions": [{"question_text": "What is the plot?", "question_number": 1, "responses": RESPONSES}],
}


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
        # L-Eval, of which sci_fi asks by the story and by the real world.
        ({"instructions": ["q", "p"], "outputs": ["BC", "A"], "input": "c", "source": "tpo", "evaluation": "exam"},
         [{"id": "1-1", "task": "tpo", "question": "q", "references": ("BC",), "metric": "exam"},
          {"id": "1-2", "task": "tpo", "question": "p", "references": ("A",), "metric": "exam"}]),
        ({"instructions": ["q"], "outputs": ["a"], "input": "c", "evaluation": "rouge"}, {"metric": "rougeL"}),
        ({"instructions": ["q"], "outputs": ["a"], "input": "c", "evaluation": "LLM"}, {"id": "1-1", "metric": None}),
        ({"instructions": [f"True? {IN_THE_STORY}."], "outputs": ["True [fact: False]"], "input": "c"},
         [{"id": "1-1", "task": "rows", "context": "c", "question": f"True? {IN_THE_STORY}.", "references": ("True",)},
          {"id": "1-1-fact", "task": "rows (fact)", "context": "", "references": ("False",),
           "question": "True? based on facts of the real world."}]),
        ({"pid": "a_0", "input": "c", "query": "q", "output": "a", "query_examples": ["p ", "r"],
          "output_examples": ["b", "d"]}, {"examples": (("p ", "b"), ("r", "d")), "references": ("a",)}),
        # Rows that differ in their answer alone, and rows without a name.
        ([{"id": name, "input": "c", "query": "q", "output": answer}
          for name, answer in (("a", "fox"), ("b", "dog"), ("a", "the fox"), ("a", "fox"))],
         [{"id": "a", "references": ("fox", "the fox")}, {"id": "b", "references": ("dog",)}]),
        ([OPEN, OPEN], [{"id": "1"}, {"id": "2"}]),
        (QMSUM, [{"id": "1-1", "task": "QMSum", "question": "Summarize.", "references": ("All.",), "metric": "rougeL",
                  "context": "PM: Hi {gap}\nMarketing: Bye ."}, {"id": "1-2", "question": "Who?"}]),
        (SQUALITY, [{"id": "63833-1", "task": "SQuALITY", "context": "Jinx Ship", "question": "What is the plot?",
                     "references": ("A ship.", "The ship."), "metric": "rougeL"}]),
    ],
)  # fmt: skip
def test_rows_of_the_benchmarks(row, expected, tmp_path):
    rows, expected = (value if isinstance(value, list) else [value] for value in (row, expected))
    tasks = read_questions([write_rows(tmp_path / "rows.jsonl", *rows)], "--data_path")
    assert [{name: getattr(task, name) for name in of} for task, of in zip(tasks, expected, strict=True)] == expected


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
    few_shot = Question("1", "t", "Text.", "Why?", ("fox",), examples=(("Who? ", "me"), ("What?", "that")))
    examples = "Question: Who?\nAnswer: me\n\nQuestion: What?\nAnswer: that"
    assert prompt_text(few_shot, "Text.", []) == f"Text.\n\n{examples}\n\nQuestion: Why?\nAnswer:"
    assert prompt_text(few_shot, "", [shot]) == f"Question: Who?\nAnswer: me\n\n{examples}\n\nQuestion: Why?\nAnswer:"
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
        PromptForm(tiny_tokenizer, template, 56, 32).check(Question("1", "t", text, "Why? " * 20, ("x",)))


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


@pytest.mark.parametrize(("template", "answer"), [("none", "fox"), ("vicuna_v1.1", "fox\nQuestion: What?")])
def test_raw_answers_end_before_the_next_question(template, answer, tiny_tokenizer, tmp_path):
    loaded = rigged(tiny_tokenizer, lambda prompt: " fox\nQuestion: What?")
    task = LongTask([write_rows(tmp_path / "qa.jsonl", OPEN)], prompt_template=template)
    (row,) = ask_all(task, loaded, context_size=400)["rows"]
    assert row["answer"] == answer and row["score"] == (1 if answer == "fox" else 0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The  Quick, brown fox!", "quick brown fox"), ("an  apple and A pear", "apple and pear"), ("U.S.A.", "usa"),
     ("well-known $5 <b>", "wellknown 5 b"), ("“Größe” — 1", "größe 1"), ("北京，中国。", "北 京 中 国"),
     ("Ｆｕｌｌ１", "full1"), ("cafe\u0301", "café"), ("हिन्दी है।", "हिन्दी है"), ("theatre Anna", "theatre anna"),
     ("A", "a"), ("the", "the"), (" .!? ", "")],
)  # fmt: skip
def test_normalisation(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "match", "score"),
    [("The fox.", "fox", 1, 1), ("the quick brown fox", "brown dog", 0, 0.4), ("fox fox fox", "fox", 0, 0.5),
     ("fox", "dog", 0, 0), ("", "fox", 0, 0), ("", "...", 1, 1), ("北京", "北京市", 0, 0.8), ("B", "A", 0, 0),
     ("", "A", 0, 0)],
)  # fmt: skip
def test_exact_match_and_f1(prediction, reference, match, score):
    assert (exact_match(prediction, reference), f1(prediction, reference)) == (match, pytest.approx(score))


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_the_package_on_ascii(metric):
    from rouge_score.rouge_scorer import RougeScorer

    texts = ["The foxes were running_quickly, over 12 lazy dogs!", "a fox ran over the dog's 12 bodies", "",
             "cats don't", "his", "hi",
             "he was jumping; the foxes' jumps were higher than running dogs"]  # fmt: skip
    official, ours = RougeScorer([metric], use_stemmer=True), rouge(metric)
    pairs = [(a, b) for a in texts for b in texts]
    found = [ours(a, b) for a, b in pairs]
    assert found == [official.score(b, a)[metric].fmeasure for a, b in pairs] and 0 < sum(found) < len(found)


def test_rouge_of_other_scripts():
    pairs = [("北京很大", "北京大"), ("Größe zählt", "größe fehlt"), ("हिन्दी है", "हिन्दी था")]
    assert [best_score("rouge1", a, [b]) for a, b in pairs] == [pytest.approx(2 * 3 / 7), 0.5, 0.5]


def test_the_best_reference_counts():
    assert best_score("f1", "brown fox", ["dog", "the brown fox", "fox"]) == 1
    assert best_score("rougeL", "brown fox", ["dog", "fox"]) == pytest.approx(2 / 3)
    assert [best_score("exam", answer, ["ACD"]) for answer in ("A", "AC", "AB", "ACD")] == [0.25, 0.25, 0, 1]
    assert best_score("exam", "B", ["A", "B"]) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"), ("b", "B"), (" (b) ", "B"), ("B. because of A", "B"), ("**C**", "C"), ("A: the dog", "A"),
        ("A\nB", "A"),
        ("The answer is C", "C"), ("the correct answer is (b).", "B"), ("Answer: A", "A"), ("I choose option B", "B"),
        ("A good guess: the answer is B", "B"), ("I would say (C) here", "C"),
        ("either (A) or (B)", None),
        ("red fox", "B"), ("The Red Fox!", "B"), ("It was the red fox, surely", "B"), ("red fox or old dog", None),
        ("I think it is C", "C"), ("A dog I know", None), ("maybe B or C", None), ("", None), ("D", None),
        ("Because", None),
        ("bad", None), ("A's", None), ("answer is unclear", None), ("北京", "D"),
    ],
)  # fmt: skip
def test_the_letter_of_an_answer(text, expected):
    options = ["old dog", "red fox", "cat", "北京"][: 4 if text == "北京" else 3]
    assert parse_choice(text, options) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A. red\nC. blue", "AC"), ("(A) red\n\n(B) a\nBoth.", "AB"), ("The correct options are A, C, and D.", "ACD"),
     ("BC", "BC"), ("B, C", "BC"), ("(B) and (C)", "BC"), ("A.", "A"), ("The answer is D.", "D"), ("C\nA B", "C"),
     ("A good one", ""), ("", ""), ("none", "")],
)  # fmt: skip
def test_several_letters(text, expected):
    assert parse_letters(text) == set(expected)


FOX = Question("1", "t", "c", "q", ("fox",), ("dog", "fox"))
LETTERS = Question("1", "t", "c", "q", ("BC",), metric="exam")


@pytest.mark.parametrize(
    ("question", "metric", "result", "expected"),
    [
        (FOX, "auto", {"answer": "(B)"}, {"score": 1, "metric": "accuracy", "choice": "B", "right_choice": "B"}),
        (FOX, "auto", {"answer": "who knows"}, {"score": 0, "choice": None, "right_choice": "B"}),
        (FOX, "f1", {"answer": "the fox"}, {"score": 1, "metric": "f1"}),
        (LETTERS, "auto", {"answer": "C, B"}, {"score": 1, "metric": "exam", "choice": "BC"}),
        (LETTERS, "auto", {"answer": "B"}, {"score": 0.25}),
        (LETTERS, "accuracy", {"answer": "B"}, {"score": 0, "metric": "accuracy", "choice": "B"}),
        (LETTERS, "auto", {"answer": "no idea"}, {"score": 0, "choice": None}),
        (replace(LETTERS, references=("word " * 30,), metric=None), "auto", {"answer": "word"}, {"metric": "f1"}),
        (replace(LETTERS, references=("b", "word " * 31), metric=None), "auto", {"answer": "b"}, {"metric": "rougeL"}),
    ],
)
def test_an_answer_is_scored_by_letter_or_by_text(question, metric, result, expected):
    row = score_answer(question, result, metric)
    assert {name: row[name] for name in expected} == expected


# Answers of OpenLMLab/LEval in the form of its files, each with answers that are right, and that are wrong.
EXAMS = {
    "coursera": ("ACD", ["ACD", "D, A, C", "A. one\nC. two\nD. three"], ["", "B", "ABCD", "As a model, I can not"]),
    "coursera, one": ("A", ["A", "A. AVERAGE", "So the answer is A."], ["B", "AB", "C. AVERAGE"]),
    "quality": (
        "(B) Their subconscious knew it.",
        ["(B) Their subconscious knew it.", "B", "(B)", "B. Their", "Their subconscious knew it"],
        ["(C) Their subconscious knew it.", "A", "Nobody knew it", ""],
    ),
    "tpo": ("C", ["C", "C. carbonic acid", "(c)"], ["A", "B. carbonic acid"]),
    "sci_fi": ("False", ["False", "false.", "False [fact: True]", "It is **False**, not true"], ["True", "", "maybe"]),
    "gsm100": (
        "57500",
        ["57500", "The answer is $57,500.", "2 * 28750 = 57,500", "The answer is 57500.0\n\nQuestion: 1 + 2"],
        ["57501", "5750", "", "The answer is 3, not 57500"],
    ),
    "codeU": (
        "[[1 3][2 4]]",
        ["[[1 3][2 4]]", "So it is array([[1, 3],\n [2, 4]]).", "[1, 10) gives \\[\\[1. 3.\\] [2.0, 4]]"],
        ["[1 3 2 4]", "[[1 3][2 5]]", "1 3 2 4", ""],
    ),
    "codeU, text": ("level,deed", ["level,deed", "The output is 'Level, deed'."], ["level", ""]),
    "topic_retrieval": (
        "The role of art in society",
        ["the role of art in society", 'The first topic was "The role of art in society."'],
        ["The role of sports in society", "art"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMS)
def test_exams_as_l_eval_scores_them(name):
    reference, right, wrong = EXAMS[name]
    assert [answer for answer in right if best_score("exam", answer, [reference]) != 1] == []
    assert [answer for answer in wrong if best_score("exam", answer, [reference]) != 0] == []
