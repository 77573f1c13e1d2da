"""Scores of an answer against its references: exact match, F1, ROUGE, exams, and the letter of a multiple choice.

All scores are between 0 and 1. Text is normalised as SQuAD does (lower case, without punctuation and the articles a,
an, the); for ASCII text the numbers are those of SQuAD's script and of rouge-score, and words of other scripts count
as words too, each character of Chinese and Japanese as one. ROUGE itself is the package rouge-score.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import takewhile
from types import SimpleNamespace

OPTION_LETTERS = string.ascii_uppercase
ROUGE_METRICS = ("rouge1", "rouge2", "rougeL")
METRICS = ("exact_match", "f1", *ROUGE_METRICS, "exam", "accuracy")
# Han, kana: scripts that are written without spaces.
UNSPACED = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
UNSPACED_CHARACTER = re.compile(f"([{UNSPACED}])")
ARTICLE = re.compile(r"\b(a|an|the)\b")
LETTERS = r"[\s(*]*[A-J](?:(?:[\s,&/()]|and)*[A-J])*"
# What an exam's reference may be, beside a text: letters of options, "(B) its text", true or false, a number.
LETTERS_REFERENCE = re.compile(r"\s*(?:[A-J]{1,10}|\([A-J]\)(?:\s.*)?)\s*", re.DOTALL)
TRUTH = re.compile(r"\b(true|false)\b", re.IGNORECASE)
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
PART_OF_THE_LETTERS = 0.25
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


@cache
def rouge(metric: str) -> Callable[[str, str], float]:
    """(prediction, reference) -> F-measure of ROUGE-1, -2 or -L (`metric` of `ROUGE_METRICS`), by rouge-score.

    Words of other scripts, which its own tokenizer drops, count too. English words are compared by stem.
    """
    from nltk.stem.porter import PorterStemmer
    from rouge_score.rouge_scorer import RougeScorer

    stem = PorterStemmer().stem

    def words(text: str) -> list[str]:
        # Letters, digits and the marks upon them; Python's \w would cut the words of India's scripts at their vowels.
        text = unicodedata.normalize("NFC", text).lower()
        text = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in text)
        found = UNSPACED_CHARACTER.sub(r" \1 ", text).split()
        return [stem(word) if STEMMABLE.fullmatch(word) else word for word in found]

    scorer = RougeScorer([metric], tokenizer=SimpleNamespace(tokenize=words))
    return lambda prediction, reference: scorer.score(reference, prediction)[metric].fmeasure


def best_score(metric: str, prediction: str, references: Sequence[str]) -> float:
    """The best score of `prediction` over `references`, by any of `METRICS` but accuracy, which has `parse_choice`."""
    score = {"exact_match": exact_match, "f1": f1, "exam": exam}.get(metric) or rouge(metric)
    return max(score(prediction, reference) for reference in references)


def exam(prediction: str, reference: str) -> float:
    """Score of an exam's answer as L-Eval compares it (arXiv 2307.11088); the form of the reference decides how.

    Letters ("B", "ACD", "(B) the option's text"): the letters that the answer names; 0.25 for some of them and none
    else. "True" or "False": the first of these words. A number: the number after "the answer is", else the last one.
    A list in brackets: the last such list. Any other text: whether it occurs in the answer, but for case and spaces.
    """
    if LETTERS_REFERENCE.fullmatch(reference):
        found, wanted = parse_letters(prediction), parse_letters(reference)
        if found:
            return 1.0 if found == wanted else PART_OF_THE_LETTERS * (found < wanted)
        option = normalize_answer(re.sub(r"^\s*\([A-J]\)", "", reference))
        return float(normalize_answer(prediction) == option)
    reference = reference.strip()
    if TRUTH.fullmatch(reference):
        found = TRUTH.search(prediction)
        return float(found is not None and found[0].lower() == reference.lower())
    if NUMBER.fullmatch(reference):
        return float(last_number(prediction) == last_number(reference))
    if reference.startswith("[") and (wanted := last_list(reference)):
        return float(last_list(prediction) == wanted)
    wanted, found = ("".join(text.lower().split()) for text in (reference, prediction))
    return float(wanted in found)


def last_number(text: str) -> float | None:
    """The number after the first "the answer is", else the last number; None where there is none."""
    stated = re.split(r"(?i)\bthe answer is\b", text, maxsplit=1)
    numbers = NUMBER.findall(stated[-1])
    return float(numbers[0 if len(stated) > 1 else -1].replace(",", "")) if numbers else None


def last_list(text: str) -> list[str]:
    """The last list in brackets, as its brackets, numbers and words; [] where there is none."""
    parts = re.findall(r"[\[\]]|[^\s,\[\]'\"\\]+", text)
    end = max((index for index, part in enumerate(parts) if part == "]"), default=-1)
    depth = 0
    for start in range(end, -1, -1):
        depth += (parts[start] == "]") - (parts[start] == "[")
        if depth == 0:
            return [part.removesuffix(".0").removesuffix(".") for part in parts[start : end + 1]]
    return []


def parse_choice(text: str, options: Sequence[str]) -> str | None:
    """Letter of the option that an answer names; None where it names none, or more than one.

    In this order: a letter at the start ("B", "(b)", "B. because"), a letter after "answer is", "answer:", "option" or
    "choice", the only letter in brackets, the whole text of an option, the only option whose text occurs, and the only
    capital letter that stands alone and is no English word.
    """
    letters = OPTION_LETTERS[: len(options)]
    span = f"[{letters}{letters.lower()}]"
    stripped = text.strip()
    patterns = [
        rf"^[*\s]*\(\s*({span})\s*\)",
        rf"^[*\s]*({span})\s*(?:[).:,;*\]]|$|\n)",
        rf"(?i:\b(?:answer|option|choice)\b(?:\s+(?:is|would\s+be))?)\s*:?[*\s]*(?:\(\s*({span})\s*\)|([{letters}])\b)",
    ]
    for pattern in patterns:
        if found := re.search(pattern, stripped):
            return next(filter(None, found.groups())).upper()
    words = normalize_answer(stripped)
    texts = [(letter, normalize_answer(option)) for letter, option in zip(letters, options, strict=True)]
    rules = (
        set(map(str.upper, re.findall(rf"\(\s*({span})\s*\)", stripped))),
        {letter for letter, option in texts if option and option == words},
        {letter for letter, option in texts if option and f" {option} " in f" {words} "},
        set(re.findall(rf"(?<![\w'’])([{letters}])(?![\w'’])", stripped)) - {"A", "I"},
    )
    named = next(filter(None, rules), set())
    return named.pop() if len(named) == 1 else None


def parse_letters(text: str) -> frozenset[str]:
    """Capital letters A to J that an answer to a question with several right options names; empty if none.

    In this order: a first line of nothing but letters, lines that begin with "A." or "(A)", letters after "answers
    are" and its like, and what `parse_choice` finds.
    """
    lines = text.strip().split("\n")
    if re.fullmatch(rf"{LETTERS}[\s).:*]*", lines[0]):
        return frozenset(re.findall(r"[A-J]", lines[0]))
    starts = [re.match(r"[*\s]*(?:\(\s*([A-J])\s*\)|([A-J])[.):])", line) for line in lines if line.strip()]
    if starts and starts[0]:
        return frozenset(found[1] or found[2] for found in takewhile(bool, starts))
    if found := re.search(rf"(?i:\b(?:answers|options|choices)\s+are)\s*:?({LETTERS})\b", text):
        return frozenset(re.findall(r"[A-J]", found[1]))
    return frozenset(parse_choice(text, [""] * 10) or "")
