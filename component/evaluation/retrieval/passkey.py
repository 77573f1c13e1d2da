"""Passkey retrieval: a number hidden in filler text of an exact length, asked for at the end.

The wording is that of Landmark Attention (arXiv 2305.16300), which LongLoRA's passkey_retrivial.py and ChunkLlama's
passkey/test_passkey.py share. They fix the length in characters and place the number at random; here length (tokens)
and depth are exact. Prompts are raw text behind BOS, answers greedy, and a trial is passed if the first number of the
answer is the key.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from longqlora.data.prompt import bos_ids, encode_after, encode_text
from longqlora.evaluation.frame import ModelSource, check_at_least
from longqlora.evaluation.retrieval.grid import GridTask
from longqlora.evaluation.retrieval.haystack import NeedlePrompt
from longqlora.inference.generation import GenerationOptions, generate_text
from longqlora.table import grouped

DESCRIPTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
MAX_NUM_DIGITS = 50
# Tokens that an answer may have beyond those of the key, to see where the number ends.
NUM_SPARE_TOKENS = 4


class PasskeyTemplate:
    """Passkey prompts as ids of one tokenizer: description, filler, needle, filler, question, each on a line."""

    def __init__(self, tokenizer):
        self.encode = partial(encode_after, tokenizer, "\n")
        self.opening = [*bos_ids(tokenizer), *encode_text(tokenizer, DESCRIPTION + "\n")]
        self.filler_ids: list[int] = []

    def prompt(self, key: str) -> NeedlePrompt:
        newline, needle = self.encode("\n"), self.encode(NEEDLE.format(key=key))
        return NeedlePrompt(self.opening, [*newline, *needle, *newline], newline + self.encode(QUESTION), self.split)

    def filler(self, num_tokens: int) -> list[int]:
        """The first `num_tokens` tokens of the filler sentences, repeated without end."""
        num_repeats = 1
        while len(self.filler_ids) < num_tokens:
            num_repeats *= 4
            self.filler_ids = self.encode(" ".join([FILLER] * num_repeats))
            if not self.filler_ids:
                raise ValueError("the tokenizer turns English text into no tokens at all; give the model's own")
        return self.filler_ids[:num_tokens]

    def split(self, num_tokens: int, depth: float) -> tuple[list[int], list[int]]:
        """`num_tokens` tokens of filler in two parts, each from its start; `depth` (0 .. 1) of them in the first."""
        num_before = round(depth * num_tokens)
        return self.filler(num_before), self.filler(num_tokens - num_before)


def accuracy_cells(results: Sequence[Mapping]) -> list[dict]:
    """Results of trials -> a cell {length, depth, num_trials, num_correct, accuracy} for each pair."""
    cells = []
    for (length, depth), group in grouped(results, "length", "depth").items():
        num_correct = sum(result["is_correct"] for result in group)
        counts = {"num_trials": len(group), "num_correct": num_correct, "accuracy": num_correct / len(group)}
        cells.append({"length": length, "depth": depth, **counts})
    return cells


@dataclass
class Passkey(GridTask):
    """Accuracy over `num_trials` keys of `num_digits` digits at each length and depth.

    Keys have a first digit that is not 0, and depend on nothing but seed, length, depth and number, so that leaving out
    a length changes no other.
    """

    num_trials: int = 5
    num_digits: int = 5
    seed: int = 0
    name, value, label = "passkey", "accuracy", "passkey accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, num_trials=1)
        if not 1 <= self.num_digits <= MAX_NUM_DIGITS:
            raise ValueError(f"--num_digits: must be between 1 and {MAX_NUM_DIGITS}, got {self.num_digits}")

    def trials(self) -> list[dict]:
        """{"length", "depth", "key"} of every key."""
        trials = []
        for cell, number in product(self.cells(), range(self.num_trials)):
            source = random.Random(f"{self.seed} {cell['length']} {cell['depth']} {number}")
            key = source.randrange(10 ** (self.num_digits - 1), 10**self.num_digits)
            trials.append({**cell, "key": str(key)})
        return trials

    def make_trials(self, source: ModelSource) -> list[list[dict]]:
        self.set_lengths(source)
        trials, template = self.trials(), PasskeyTemplate(source.tokenizer)
        for trial in trials:
            template.prompt(trial["key"]).num_haystack_tokens(trial["length"])
        return [trials]

    def ask(self, trial: Mapping) -> dict:
        """Adds "answer" and "is_correct" to the trial."""
        template, key = PasskeyTemplate(self.loaded.tokenizer), trial["key"]
        num_new_tokens = len(template.encode(f" {key}")) + NUM_SPARE_TOKENS
        options = GenerationOptions(do_sample=False, max_new_tokens=num_new_tokens)
        prompt = template.prompt(key).build(length=trial["length"], depth=trial["depth"])
        answer = generate_text(self.loaded.model, self.loaded.tokenizer, prompt, options).text
        return {**trial, "answer": answer, "is_correct": re.findall(r"[0-9]+", answer)[:1] == [key]}

    def score(self, results: Sequence[dict]) -> dict:
        protocol = {
            "task": "passkey retrieval, wording of Landmark Attention (arXiv 2305.16300)",
            "scoring": "greedy; the first number of the answer is the key",
            "length": "tokens of the prompt, BOS included, the answer not",
            **{name: getattr(self, name) for name in ("num_digits", "num_trials", "seed")},
        }
        return {"protocol": protocol, "cells": accuracy_cells(results), "trials": results}

    def table(self, record: Mapping) -> str:
        title = f"accuracy in percent of {self.num_trials} trials, by depth and prompt length"
        return f"{title}\n{super().table(record)}"
