"""Questions about long texts from jsonl files, in the forms that the common benchmarks use.

    questions = read_questions(["qasper.jsonl"], "--data_path")

A row is one question; L-Eval's rows hold several. data/README.md lists all keys; text under another is refused.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from longqlora.cli import require_file
from longqlora.data.columns import check_unread, found_keys
from longqlora.data.jsonl import error_at, read_rows
from longqlora.data.prompt import checked_text
from longqlora.evaluation.longtask.scores import LETTERS_REFERENCE, METRICS, OPTION_LETTERS, normalize_answer

CONTEXT_KEYS = ("context", "document", "input")
QUESTION_KEYS = ("question", "instruction", "query")
ANSWER_KEYS = ("references", "answers", "answer", "outputs", "output")
OPTION_KEYS = ("options", *(f"choice_{letter}" for letter in OPTION_LETTERS))
TASK_KEYS = ("task", "dataset")
ID_KEYS = ("id", "_id")
# ChunkLlama's few-shot rows: examples of their own, between the text and the question.
EXAMPLE_KEYS = ("query_examples", "output_examples")
# What L-Eval's "evaluation" says; its other values name judges, which are not asked here.
EVALUATIONS = {"exam": "exam", "f1": "f1", "rouge": "rougeL"}
# An answer of L-Eval's sci_fi: what is true in the story, and what in the real world.
STORY_AND_FACT = re.compile(r"\s*(true|false)\s*\[fact:\s*(true|false)\s*\]\s*", re.IGNORECASE)
IN_THE_STORY, IN_THE_WORLD = "based on the world described in the document", "based on facts of the real world"
# References longer than this are compared as summaries, not as answers.
MAX_ANSWER_WORDS = 30


@dataclass(frozen=True)
class Question:
    """One question. references: accepted answers; with options, the text of the right one.

    metric: what the row asks for, or None. examples: pairs of a question about the same text and its answer.
    """

    id: str
    task: str
    context: str
    question: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    metric: str | None = None
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def right_letter(self) -> str | None:
        """Letter of the right option; None without options."""
        return OPTION_LETTERS[self.options.index(self.references[0])] if self.options else None

    @property
    def has_letters(self) -> bool:
        """Whether the answer is letters of options that stand in the question."""
        return not self.options and all(map(LETTERS_REFERENCE.fullmatch, self.references))

    def metric_for(self, asked: str) -> str:
        """`asked`; for auto the row's metric, or accuracy with options, ROUGE-L for long references, else F1."""
        if asked != "auto" or self.metric:
            return asked if asked != "auto" else self.metric
        if self.options:
            return "accuracy"
        num_words = max(len(normalize_answer(reference).split()) for reference in self.references)
        return "rougeL" if num_words > MAX_ANSWER_WORDS else "f1"


def read_questions(
    paths: Sequence[str | os.PathLike], flag: str, *, max_rows: int | None = None, needs_context: bool = True
) -> list[Question]:
    """The questions of jsonl files, in order; of each file the first `max_rows` rows.

    needs_context: whether a row without a text is an error; examples in a prompt may have none.
    Raises ValueError naming file and line for a bad row, and for a file without rows.
    """
    questions = []
    for path in map(Path, paths):
        found, task = [], path.name.removesuffix(".jsonl")
        with require_file(path, flag).open("rb") as file:
            for number, row in islice(read_rows(file, path, flag=flag), max_rows):
                try:
                    found += questions_of_row(row, number, task, needs_context=needs_context)
                except ValueError as error:
                    raise error_at(path, number, error, flag=flag) from None
        if not found:
            raise ValueError(f"{flag}: {str(path)!r} holds no rows; give one JSON object per line")
        questions += merged(found)
    return questions


def questions_of_row(row: dict[str, Any], number: int, file_name: str, *, needs_context: bool) -> list[Question]:
    """The question of one row, or the several of an L-Eval row. Raises ValueError saying what is wrong."""
    if published := published_questions(row, str(number)):
        return published
    context_key = first_key(row, CONTEXT_KEYS)
    if context_key is None and needs_context:
        raise ValueError(f'no text under "context", "document" or "input" (found {found_keys(row)}); give one')
    context = text_under(row, context_key)
    if context_key and not context.strip():
        raise ValueError(f'"{context_key}" is empty; give the text that the question is about')
    is_l_eval = "instructions" in row
    name = name_of(row, ID_KEYS, str(number))
    task = name_of(row, (*TASK_KEYS, "source") if is_l_eval else TASK_KEYS, file_name)
    one = Question(name, task, context, "", (), metric=metric_of_row(row), examples=pairs_of(row, *EXAMPLE_KEYS))
    read = [context_key, *ID_KEYS, *TASK_KEYS, "metric", "evaluation", *EXAMPLE_KEYS]
    if is_l_eval:
        check_unread(row, [*read, "instructions", "outputs"])
        if not (pairs := pairs_of(row, "instructions", "outputs")):
            raise ValueError('"instructions" is empty; give at least one question')
        numbered = enumerate(pairs, start=1)
        return [part for k, (q, a) in numbered for part in asked(replace(one, id=f"{name}-{k}", question=q), a)]
    question_key = first_key(row, QUESTION_KEYS if context_key == "input" else (*QUESTION_KEYS, "input"))
    answer_key = first_key(row, ANSWER_KEYS)
    if answer_key is None:
        raise ValueError(f'no "references", "answers" or "answer" (found {found_keys(row)}); give the right answers')
    check_unread(row, [*read, question_key, answer_key, *OPTION_KEYS])
    one = replace(one, question=text_under(row, question_key))
    if options := options_of_row(row):
        return [replace(one, references=(right_option(row[answer_key], options, answer_key),), options=options)]
    answers = row[answer_key] if isinstance(row[answer_key], list) else [row[answer_key]]
    if not answers:
        raise ValueError(f'"{answer_key}" is empty; give at least one right answer')
    return [replace(one, references=tuple(answer_text(answer, f'"{answer_key}"') for answer in answers))]


def published_questions(row: dict[str, Any], name: str) -> list[Question]:
    """The questions of a row as QMSum or SQuALITY publish it, a meeting or a story with all of them; else none.

    https://github.com/Yale-LILY/QMSum (data/*/jsonl) and https://github.com/nyu-mll/SQuALITY (data/v1-*).
    """
    if "meeting_transcripts" in row:
        turns = nested(row, "meeting_transcripts", "speaker", "content")
        one = Question(name, "QMSum", "\n".join(map(": ".join, turns)), "", (), metric="rougeL")
        lists = [nested(row, f"{kind}_query_list", "query", "answer") for kind in ("general", "specific")]
        found = [(question, [answer]) for part in lists for question, answer in part]
    elif isinstance(row.get("document"), str) and isinstance(row.get("questions"), list):
        metadata = row["metadata"] if isinstance(row.get("metadata"), dict) else {}
        name = name_of(metadata, ("passage_id", *ID_KEYS), name)
        one = Question(name, "SQuALITY", text_under(row, "document"), "", (), metric="rougeL")
        texts = nested(row, "questions", "question_text")
        answers = [nested(entry, "responses", "response_text") for entry in row["questions"]]
        found = [(text, [part for (part,) in parts]) for (text,), parts in zip(texts, answers, strict=True)]
    else:
        return []
    if not found or not all(references for _, references in found):
        raise ValueError(f"a row of {one.task} without questions, or with one that has no answer; give both")
    checked = [(question, tuple(answer_text(part, "an answer") for part in answers)) for question, answers in found]
    numbered = enumerate(checked, start=1)
    return [replace(one, id=f"{name}-{k}", question=text, references=answers) for k, (text, answers) in numbered]


def nested(row: dict[str, Any], key: str, *names: str) -> list[tuple[str, ...]]:
    """The texts under `names` of each object in the list row[key]."""
    entries = row.get(key) or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'"{key}" is no list of objects with {" and ".join(names)}; give one')
    return [tuple(checked_text(entry.get(name), f'"{name}" in "{key}"') for name in names) for entry in entries]


def asked(task: Question, answer: str) -> list[Question]:
    """The one question of an entry of L-Eval, or the two of sci_fi: by the story, and without it by the real world."""
    if not (both := STORY_AND_FACT.fullmatch(answer)):
        return [replace(task, references=(answer,))]
    fact = replace(task, id=f"{task.id}-fact", task=f"{task.task} (fact)", context="", references=(both[2],),
                   question=task.question.replace(IN_THE_STORY, IN_THE_WORLD))  # fmt: skip
    return [replace(task, references=(both[1],)), fact]


def merged(tasks: Sequence[Question]) -> list[Question]:
    """One task for rows that differ in their answer alone: SCROLLS has a row for each reference of a question."""
    references: dict[Question, list[str]] = {}
    for task in tasks:
        references.setdefault(replace(task, references=()), []).extend(task.references)
    return [replace(task, references=tuple(dict.fromkeys(found))) for task, found in references.items()]


def first_key(row: dict, keys: Sequence[str]) -> str | None:
    return next((key for key in keys if row.get(key) is not None), None)


def text_under(row: dict, key: str | None) -> str:
    return checked_text(row[key], f'"{key}"') if key else ""


def name_of(row: dict, keys: Sequence[str], default: str) -> str:
    """The string or whole number under the first of `keys` that is there."""
    key = first_key(row, keys)
    value = row[key] if key else default
    return checked_text(str(value) if type(value) is int else value, f'"{key}"')


def metric_of_row(row: dict) -> str | None:
    """The metric that a row names under "metric", or that L-Eval's "evaluation" means; None for neither."""
    if row.get("metric") is None:
        return EVALUATIONS.get(row["evaluation"]) if isinstance(row.get("evaluation"), str) else None
    if row["metric"] not in METRICS:
        raise ValueError(f'"metric" is {row["metric"]!r}; use one of {", ".join(METRICS)}')
    return row["metric"]


def pairs_of(row: dict, questions: str, answers: str) -> tuple[tuple[str, str], ...]:
    """(question, answer) of two lists of equal length under these keys."""
    lists = [row.get(key) or [] for key in (questions, answers)]
    if not all(isinstance(entries, list) for entries in lists) or len(lists[0]) != len(lists[1]):
        raise ValueError(f'"{questions}" and "{answers}" are no lists of equal length; give an answer to each question')
    return tuple((checked_text(question, f'"{questions}"'), answer_text(answer, f'"{answers}"'))
                 for question, answer in zip(*lists, strict=True))  # fmt: skip


def options_of_row(row: dict) -> tuple[str, ...]:
    """The options of a multiple choice: a list, or LongBench v2's choice_A, choice_B, ...; () without any."""
    options, key = row.get("options"), "options"
    if options is None and "choice_A" in row:
        options, key = [row[name] for name in OPTION_KEYS[1:] if name in row], "choice_A"
    # InfiniteBench has an empty list where there is nothing to choose.
    if options in (None, []):
        return ()
    if not isinstance(options, list) or not 2 <= len(options) <= len(OPTION_LETTERS):
        raise ValueError(f'"{key}" is not a list of 2 to {len(OPTION_LETTERS)} options; give one')
    options = tuple(answer_text(option, f'"{key}"') for option in options)
    if len(set(options)) < len(options):
        raise ValueError(f'"{key}" has the same option twice; remove one')
    return options


def right_option(answer: Any, options: Sequence[str], key: str) -> str:
    """The right option, given as its text, its letter or its index from 0."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if type(answer) is int and 0 <= answer < len(options):
        return options[answer]
    if isinstance(answer, str):
        texts = {option.strip(): option for option in reversed(options)} | {option: option for option in options}
        letters = dict(zip(OPTION_LETTERS, options, strict=False))
        given = answer.strip()
        # Options may be letters themselves, so that their texts come first.
        if found := texts.get(answer) or texts.get(given) or letters.get(given.strip("()").upper()):
            return found
    raise ValueError(f'"{key}" is {str(answer)[:60]!r}, none of the {len(options)} options; give one\'s letter or text')


def answer_text(value: Any, name: str) -> str:
    """An answer or option as text; numbers count as their digits."""
    if type(value) in (int, float) and math.isfinite(value):
        value = str(value)
    text = checked_text(value, name)
    if not text.strip():
        raise ValueError(f"{name} holds an empty text; give an answer")
    return text
