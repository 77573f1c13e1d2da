"""Needle in a haystack: a sentence hidden in the user's own text, asked for at the end; scored without a judge.

The default needle and question are those of Greg Kamradt's test (github.com/gkamradt/LLMTest_NeedleInAHaystack,
needlehaystack/run.py at 7b90d285651b68d39a94f3d3bd3672f84192c989), where a language model judges the answers. Here
the score is the recall of the answer's words, as ROUGE-1 counts them, without stemming, and beside it whether the
answer contains the expected one. Fu et al. (arXiv 2402.10171) score by ROUGE-1's F-measure against the
whole needle instead, which punishes an answer for being long.

Pure Python on a tokenizer; torch is imported by what generates.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longqlora.evaluation.retrieval.grid import check_grid
from longqlora.evaluation.retrieval.haystack import Haystack, encode_after_sentence
from longqlora.inference.generation import NO_TEMPLATE, GenerationOptions, encode_prompt, generate_text

NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
QUESTION = "What is the best thing to do in San Francisco?"
ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day"
MAX_NEW_TOKENS = 64
HEAD = "Read this text. A question about it follows.\n\n"
RAW_TAIL = "\n\nQuestion: {question}\nAnswer:"
CHAT_TAIL = "\n\n{question} Answer with what the text says, in one line."
# Two texts that share no token at either end; what two prompts have in common is around them.
MARKS = ("Apple", "zoo")


@dataclass(frozen=True)
class NeedleTask:
    """What is hidden, asked and expected, and how: `template` as in `longqlora.inference.generation.encode_prompt`.

    Raises ValueError for an empty needle or question, and for an answer without a word.
    """

    needle: str = NEEDLE
    question: str = QUESTION
    answer: str = ANSWER
    template: str = NO_TEMPLATE
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self):
        for name in ("needle", "question", "answer"):
            if not getattr(self, name).strip():
                raise ValueError(f"--{name}: is empty; give some text")
            if any("\ud800" <= character <= "\udfff" for character in getattr(self, name)):
                raise ValueError(f"--{name}: is not valid Unicode text (it holds half a surrogate pair)")
        if not words(self.answer):
            raise ValueError(f"--answer: {self.answer!r} has no word to look for; give the expected answer")
        GenerationOptions(max_new_tokens=self.max_new_tokens)


class NeedlePrompt:
    """Prompts of an exact length for one tokenizer, task and haystack."""

    def __init__(self, tokenizer, task: NeedleTask, haystack: Haystack):
        self.haystack = haystack
        tail = RAW_TAIL if task.template == NO_TEMPLATE else CHAT_TAIL
        # No format(): braces in a question are the user's own.
        tail = tail.replace("{question}", task.question.strip())
        self.before, self.after = ids_around(tokenizer, HEAD, tail, template=task.template)
        self.needle = encode_after_sentence(tokenizer, f"\n{task.needle.strip()}\n")
        self.min_length = len(self.before) + len(self.needle) + len(self.after)

    def num_haystack_tokens(self, length: int) -> int:
        """Tokens of haystack in a prompt of `length` tokens; ValueError where not even the needle fits."""
        if length < self.min_length:
            raise ValueError(
                f"length {length} is too short for needle and question, which need {self.min_length} tokens"
            )
        return length - self.min_length

    def build(self, *, length: int, depth: float) -> list[int]:
        """Ids of a prompt of exactly `length` tokens, the needle at the sentence border nearest to `depth` (0 .. 1)."""
        first, second = self.haystack.split(self.num_haystack_tokens(length), depth)
        return [*self.before, *first, *self.needle, *second, *self.after]


def ids_around(tokenizer, head: str, tail: str, *, template: str) -> tuple[list[int], list[int]]:
    """Ids before and after a text that stands between `head` and `tail` in a prompt of `template`.

    Found as what two prompts have in common, which holds for any chat template.
    """
    one, other = (encode_prompt(tokenizer, f"{head}{mark}{tail}", template=template) for mark in MARKS)
    num_before = num_common(one, other)
    num_after = num_common(one[::-1], other[::-1])
    if num_before == len(one) or num_before == len(other):
        raise ValueError("the tokenizer does not tell one word from another; give the model's own tokenizer")
    return one[:num_before], one[len(one) - num_after :]


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common start of two sequences."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def words(text: str) -> list[str]:
    """Words of `text`, without case and punctuation."""
    return re.findall(r"\w+", text.casefold())


def word_recall(expected: str, answer: str) -> float:
    """Share of the words of `expected` that are in `answer` as often as there: the recall of ROUGE-1."""
    wanted, found = Counter(words(expected)), Counter(words(answer))
    return sum((wanted & found).values()) / sum(wanted.values())


def contains(expected: str, answer: str) -> bool:
    """Whether the words of `expected` are in `answer`, in order and without others between them."""
    return f" {' '.join(words(expected))} " in f" {' '.join(words(answer))} "


def answer_needle(loaded, task: NeedleTask, prompt: NeedlePrompt, trial: Mapping) -> dict:
    """Ask the model of `loaded` one {"length", "depth"}; adds "answer", "score", "is_contained", "num_repeats"."""
    ids = prompt.build(**trial)
    options = GenerationOptions(do_sample=False, max_new_tokens=task.max_new_tokens)
    answer = generate_text(loaded.model, loaded.tokenizer, ids, options).text
    return {
        **trial,
        "answer": answer,
        "score": word_recall(task.answer, answer),
        "is_contained": contains(task.answer, answer),
        "num_repeats": prompt.haystack.num_repeats(prompt.num_haystack_tokens(trial["length"])),
    }


def evaluate_needle(
    loaded,
    task: NeedleTask,
    text: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    output_file: Path | None,
    fingerprint: dict,
) -> dict:
    """Ask one model at every length and depth; returns {"protocol", "cells"}, the same on every rank.

    text: the haystack, repeated where a length (prompt tokens) needs more. A cell is what `answer_needle` returns.
    output_file, fingerprint: as in `longqlora.evaluation.trials.run_trials`; the caller writes the file and then calls
    `finish_trials`.
    """
    from longqlora.evaluation.trials import run_trials

    check_grid(lengths, depths)
    prompt = NeedlePrompt(loaded.tokenizer, task, Haystack(loaded.tokenizer, text))
    for length in lengths:
        prompt.num_haystack_tokens(length)
    protocol = {
        "task": "needle in a haystack (Kamradt), needle at the sentence border nearest to the depth",
        "scoring": "greedy; recall of the expected answer's words (ROUGE-1, no stemming); is_contained: all in order",
        "length": "tokens of the prompt, BOS and template included, the answer not",
        **vars(task),
        "haystack_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "haystack_characters": len(text),
    }
    trials = [
        {"length": length, "depth": depth}
        for length in dict.fromkeys(lengths)
        for depth in dict.fromkeys(map(float, depths))
    ]
    cells = run_trials(
        trials,
        lambda trial: answer_needle(loaded, task, prompt, trial),
        output_file=output_file,
        fingerprint={**fingerprint, **protocol},
        desc="needle",
    )
    return {"protocol": protocol, "cells": cells}
