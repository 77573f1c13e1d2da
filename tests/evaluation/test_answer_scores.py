"""Scores of answers: SQuAD's normalisation and F1, ROUGE against its own package, letters of multiple choices."""

import pytest

from longqlora.evaluation.longtask.questions import Question
from longqlora.evaluation.longtask.scores import (
    best_score,
    exact_match,
    f1,
    normalize_answer,
    parse_choice,
    parse_letters,
    rouge,
)
from longqlora.evaluation.longtask.task import score_answer


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


@pytest.mark.parametrize("use_stemmer", [True, False])
@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_the_package_on_ascii(metric, use_stemmer):
    from rouge_score.rouge_scorer import RougeScorer

    texts = ["The foxes were running_quickly, over 12 lazy dogs!", "a fox ran over the dog's 12 bodies", "",
             "cats don't", "his", "hi",
             "he was jumping; the foxes' jumps were higher than running dogs"]  # fmt: skip
    official, ours = RougeScorer([metric], use_stemmer=use_stemmer), rouge(metric, use_stemmer=use_stemmer)
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
        (FOX, "auto", {"answer": "(B)"}, {"score": 1, "choice": "B", "right_choice": "B"}),
        (FOX, "auto", {"answer": "B", "choice": "A"}, {"score": 0, "choice": "A"}),  # the likelihoods chose
        (FOX, "auto", {"answer": "who knows"}, {"score": 0, "choice": None, "right_choice": "B"}),
        (FOX, "f1", {"answer": "the fox"}, {"score": 1, "metric": "f1"}),
        (LETTERS, "auto", {"answer": "C, B"}, {"score": 1, "metric": "exam", "choice": "BC"}),
        (LETTERS, "auto", {"answer": "B"}, {"score": 0.25}),
        (LETTERS, "accuracy", {"answer": "B"}, {"score": 0, "metric": "accuracy", "choice": "B"}),
        (LETTERS, "auto", {"answer": "no idea"}, {"score": 0, "choice": None}),
    ],
)
def test_a_choice_is_scored_by_letter_by_likelihood_or_by_text(question, metric, result, expected):
    row = score_answer(question, result, metric, use_stemmer=True)
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
