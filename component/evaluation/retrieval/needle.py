"""Needle in a haystack: a sentence hidden in the user's own text, asked for at the end; scored without a judge.

The default needle and question are those of Greg Kamradt's test (github.com/gkamradt/LLMTest_NeedleInAHaystack,
needlehaystack/run.py at 7b90d285651b68d39a94f3d3bd3672f84192c989), where a language model judges the answers. Here
the score is the recall of the answer's words, as ROUGE-1 counts them, without stemming, and beside it whether the
answer contains the expected one. Fu et al. (arXiv 2402.10171) score by ROUGE-1's F-measure against the
whole needle instead, which punishes an answer for being long.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from longqlora.data.prompt import checked_text, encode_after
from longqlora.evaluation.frame import ModelSource
from longqlora.evaluation.retrieval.grid import GridTask
from longqlora.evaluation.retrieval.haystack import Haystack, NeedlePrompt, read_haystack
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


def needle_prompt(haystack: Haystack, needle: str, question: str, *, template: str) -> NeedlePrompt:
    """The prompt that hides `needle` at the border of sentences nearest to a depth, and ends with `question`."""
    tail = RAW_TAIL if template == NO_TEMPLATE else CHAT_TAIL
    # No format(): braces in a question are the user's own.
    tail = tail.replace("{question}", question.strip())
    before, after = ids_around(haystack.tokenizer, HEAD, tail, template=template)
    return NeedlePrompt(before, encode_after(haystack.tokenizer, ".", f"\n{needle.strip()}\n"), after, haystack.split)


def ids_around(tokenizer, head: str, tail: str, *, template: str) -> tuple[list[int], list[int]]:
    """Ids before and after a text that stands between `head` and `tail` in a prompt of `template`.

    Found as what two prompts have in common, which holds for any chat template.
    """
    one, other = (encode_prompt(tokenizer, f"{head}{mark}{tail}", template=template) for mark in MARKS)
    num_before, num_after = len(commonprefix([one, other])), len(commonprefix([one[::-1], other[::-1]]))
    if num_before == min(len(one), len(other)):
        raise ValueError("the tokenizer does not tell one word from another; give the model's own tokenizer")
    return one[:num_before], one[len(one) - num_after :]


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


@dataclass
class Needle(GridTask):
    """One needle at every length and depth of the texts in `haystack`, repeated where a length needs more.

    answer: the words to look for; None for those of the needle. prompt_template: of `encode_prompt`, or auto. Raises
    ValueError for an empty needle or question, and for an answer without a word.
    """

    haystack: Sequence[str]
    needle: str = NEEDLE
    question: str = QUESTION
    answer: str | None = None
    prompt_template: str = "auto"
    max_new_tokens: int = MAX_NEW_TOKENS
    name, value, label = "needle", "score", "recall of the answer's words"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer is None:
            self.answer = ANSWER if self.needle == NEEDLE else self.needle
        for name in ("needle", "question", "answer"):
            if not checked_text(getattr(self, name), f"--{name}").strip():
                raise ValueError(f"--{name}: is empty; give some text")
        if not words(self.answer):
            raise ValueError(f"--answer: {self.answer!r} has no word to look for; give the expected answer")
        if self.needle != NEEDLE and self.question == QUESTION:
            raise ValueError("--question: your own --needle needs a question of its own")
        self.options = GenerationOptions(do_sample=False, max_new_tokens=self.max_new_tokens)
        self.text, self.inputs = read_haystack(self.haystack), {"--haystack": self.haystack}

    def make_trials(self, source: ModelSource) -> list[list[dict]]:
        from longqlora.distributed import print_main

        template = source.template(self.prompt_template)
        self.endless_text = Haystack(source.tokenizer, self.text)
        self.prompt = needle_prompt(self.endless_text, self.needle, self.question, template=template)
        self.settings = {
            "task": "needle in a haystack (Kamradt), needle at the sentence border nearest to the depth",
            "scoring": "greedy; recall of the expected answer's words (ROUGE-1, no stemming); is_contained: all in "
            "order",
            "length": "tokens of the prompt, BOS and template included, the answer not",
            **{name: getattr(self, name) for name in ("needle", "question", "answer", "max_new_tokens")},
            "template": template,
            "haystack_sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "haystack_characters": len(self.text),
        }
        self.set_lengths(source)
        trials = self.cells()
        for trial in trials:
            self.prompt.num_haystack_tokens(trial["length"])
        if contains(self.answer, self.text):
            print_main("warning: the haystack itself contains the answer, so that finding it says little")
        return [trials]

    def ask(self, trial: Mapping) -> dict:
        ids = self.prompt.build(**trial)
        answer = generate_text(self.loaded.model, self.loaded.tokenizer, ids, self.options).text
        return {
            **trial,
            "answer": answer,
            "score": word_recall(self.answer, answer),
            "is_contained": contains(self.answer, answer),
            "num_repeats": self.endless_text.num_repeats(self.prompt.num_haystack_tokens(trial["length"])),
        }

    def score(self, results: Sequence[dict]) -> dict:
        return {"protocol": self.settings, "cells": results, "haystack_files": list(map(str, self.haystack))}

    def table(self, record: Mapping) -> str:
        cells = record["cells"]
        repeats = {cell["length"]: cell["num_repeats"] for cell in cells}
        lines = [f"note: length {length}: the haystack is shorter and was used {number} times in a row"
                 for length, number in repeats.items() if number > 1]  # fmt: skip
        num_contained = sum(cell["is_contained"] for cell in cells)
        lines.append("recall of the answer's words in percent, by depth and prompt length; the whole answer in "
                     f"{num_contained} of {len(cells)}\n{super().table(record)}")  # fmt: skip
        return "\n".join(lines)
