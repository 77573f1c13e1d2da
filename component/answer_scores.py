"""Scores of an answer against its references: exact match, F1, ROUGE, and the letter of a multiple choice.

All scores are between 0 and 1. Text is normalised as SQuAD does (lower case, without punctuation and the articles a,
an, the); for ASCII text the numbers are those of SQuAD's script and of rouge-score, and words of other scripts count
as words too, each character of Chinese and Japanese as one. ROUGE itself is the package rouge-score.

Pure: strings in, numbers out.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from component.extras import require_extra

MAX_OPTIONS = 26
ROUGE_METRICS = ("rouge1", "rouge2", "rougeL")
METRICS = ("exact_match", "f1", *ROUGE_METRICS, "accuracy")
# Han, kana: scripts that are written without spaces.
UNSPACED = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
UNSPACED_CHARACTER = re.compile(f"([{UNSPACED}])")
ARTICLE = re.compile(r"\b(a|an|the)\b")
# Porter's rules are for English words; like rouge-score, short ones are left alone.
STEMMABLE = re.compile(r"[a-z0-9]{4,}")


def normalize_answer(text: str) -> str:
    """`text` as SQuAD compares it: lower case, no punctuation, no articles, single spaces.

    A text of nothing but articles keeps them: "A" may be the letter of an option.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    without_articles = ARTICLE.sub(" ", text)
    return " ".join(UNSPACED_CHARACTER.sub(r" \1 ", without_articles if without_articles.strip() else text).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 where the normalised texts are the same, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(reference))


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over normalised words, each counted as often as it occurs.

    Where one side has no words left, 1 if the other has none either, else 0.
    """
    words, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not words or not expected:
        return float(words == expected)
    num_common = sum((Counter(words) & Counter(expected)).values())
    return 2 * num_common / (len(words) + len(expected))


def rouge(prediction: str, reference: str, metric: str, *, use_stemmer: bool = True) -> float:
    """F-measure of ROUGE-1, -2 or -L (`metric` of `ROUGE_METRICS`), with or without Porter's stemmer.

    Raises ValueError where the package rouge-score is not installed.
    """
    return rouge_scorer(use_stemmer).score(reference, prediction)[metric].fmeasure


@lru_cache(maxsize=2)
def rouge_scorer(use_stemmer: bool) -> Any:
    require_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE_METRICS), tokenizer=RougeTokenizer(use_stemmer=use_stemmer))


def require_rouge() -> None:
    """Raise ValueError where the package rouge-score is not installed."""
    require_extra("rouge_score", "rouge-score")


class RougeTokenizer:
    """The words that ROUGE compares: rouge-score's own for ASCII text, and those of other scripts, which it drops."""

    def __init__(self, *, use_stemmer: bool):
        self.stem: Callable[[str], str] | None = None
        if use_stemmer:
            from nltk.stem.porter import PorterStemmer

            self.stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        # Letters, digits and the marks upon them; Python's \w would cut the words of India's scripts at their vowels.
        text = unicodedata.normalize("NFC", text).lower()
        text = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in text)
        words = UNSPACED_CHARACTER.sub(r" \1 ", text).split()
        return [self.stem(word) if self.stem and STEMMABLE.fullmatch(word) else word for word in words]


def best_score(metric: str, prediction: str, references: Sequence[str], *, use_stemmer: bool = True) -> float:
    """The best score of `prediction` over `references`, by any of `METRICS` but accuracy, which has `is_choice`."""
    if not references:
        raise ValueError("there are no references to score against; give at least one")
    if metric in ROUGE_METRICS:
        return max(rouge(prediction, reference, metric, use_stemmer=use_stemmer) for reference in references)
    scores = {"exact_match": exact_match, "f1": f1}
    if metric not in scores:
        raise ValueError(f"unknown metric {metric!r}; use one of {', '.join(METRICS[:-1])}")
    return max(scores[metric](prediction, reference) for reference in references)


def option_letter(index: int) -> str:
    return string.ascii_uppercase[index]


def parse_choice(text: str, options: Sequence[str]) -> int | None:
    """Index of the option that an answer names; None where it names none, or more than one.

    In this order: a letter at the start ("B", "(b)", "B. because"), a letter after "answer is", "answer:", "option" or
    "choice", the only letter in brackets, the whole text of an option, the only option whose text occurs, and the only
    capital letter that stands alone and is no English word.
    """
    letters = string.ascii_uppercase[: len(options)]
    span = f"[{letters}{letters.lower()}]"
    stripped = text.strip()
    patterns = [
        rf"^[*\s]*\(\s*({span})\s*\)",
        rf"^[*\s]*({span})\s*(?:[).:,;*\]]|$|\n)",
        rf"(?i:\b(?:answer|option|choice)\b(?:\s+(?:is|would\s+be))?)\s*:?[*\s]*(?:\(\s*({span})\s*\)|([{letters}])\b)",
    ]
    for pattern in patterns:
        if found := re.search(pattern, stripped):
            return letters.index(next(filter(None, found.groups())).upper())
    named = set(re.findall(rf"\(\s*({span})\s*\)", stripped))
    if named:
        return only({letters.index(letter.upper()) for letter in named})
    words = normalize_answer(stripped)
    wanted = [normalize_answer(option) for option in options]
    if words and words in wanted:
        return only({index for index, option in enumerate(wanted) if option == words})
    occurring = {index for index, option in enumerate(wanted) if option and f" {option} " in f" {words} "}
    if occurring:
        return only(occurring)
    alone = set(re.findall(rf"(?<![\w'’])([{letters}])(?![\w'’])", stripped)) - {"A", "I"}
    return only({letters.index(letter) for letter in alone})


def parse_letters(text: str) -> frozenset[str]:
    """Capital letters A to J that an answer to a question with several right options names; empty if none."""
    first_line = text.strip().split("\n")[0]
    if re.fullmatch(r"[\s(*]*[A-J](?:(?:[\s,&/()]|and)*[A-J])*[\s).:*]*", first_line):
        return frozenset(re.findall(r"[A-J]", first_line))
    index = parse_choice(text, [""] * 10)
    return frozenset() if index is None else frozenset(option_letter(index))


def only(indices: set[int]) -> int | None:
    """The one element of a set; None where there are none or several."""
    return next(iter(indices)) if len(indices) == 1 else None
