"""Passkey retrieval: a number hidden in filler text of an exact length, asked for at the end.

    trials = make_trials([1024, 2048], [0, 0.5, 1], num_trials=5, seed=0)
    results = [answer_trial(loaded, trial) for trial in trials]
    print(accuracy_table(results))

The wording is that of Landmark Attention (arXiv 2305.16300), which LongLoRA's
passkey_retrivial.py and ChunkLlama's passkey/test_passkey.py share. They fix the length in characters and
place the number at random; here length (tokens) and depth are exact. Prompts are raw text behind BOS,
answers greedy, and a trial is passed if the first number of the answer is the key.

Pure Python on a tokenizer; torch is imported by what generates.
"""

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from longqlora.data.prompt import bos_ids, encode_text
from longqlora.evaluation.retrieval.grid import check_grid, grid_table
from longqlora.inference.generation import GenerationOptions, generate_text

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


def encode_after_newline(tokenizer, text: str) -> list[int]:
    """Ids of `text` as they follow a line break: without the space that SentencePiece puts before a first word."""
    before, both = encode_text(tokenizer, "\n"), encode_text(tokenizer, "\n" + text)
    return both[len(before) :] if before and both[: len(before)] == before else encode_text(tokenizer, text)


class PasskeyTemplate:
    """The parts of a passkey prompt as ids of one tokenizer: description, filler, needle, filler, question."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.opening = [*bos_ids(tokenizer), *encode_text(tokenizer, DESCRIPTION + "\n")]
        self.newline = encode_after_newline(tokenizer, "\n")
        self.question = encode_after_newline(tokenizer, QUESTION)
        self.filler_ids: list[int] = []

    def needle(self, key: str) -> list[int]:
        return encode_after_newline(self.tokenizer, NEEDLE.format(key=key))

    def filler(self, num_tokens: int) -> list[int]:
        """The first `num_tokens` tokens of the filler sentences, repeated without end."""
        num_repeats = 1
        while len(self.filler_ids) < num_tokens:
            num_repeats *= 4
            self.filler_ids = encode_after_newline(self.tokenizer, " ".join([FILLER] * num_repeats))
            if not self.filler_ids:
                raise ValueError("the tokenizer turns English text into no tokens at all; give the model's own")
        return self.filler_ids[:num_tokens]

    def min_length(self, key: str) -> int:
        """Tokens of a prompt without any filler."""
        return sum(map(len, [self.opening, self.newline, self.needle(key), self.newline, self.newline, self.question]))

    def build(self, *, length: int, depth: float, key: str) -> list[int]:
        """Ids of a prompt of exactly `length` tokens, with `depth` (0 .. 1) of its filler before the needle."""
        num_filler = length - self.min_length(key)
        if num_filler < 0:
            raise ValueError(
                f"length {length} is too short for a passkey prompt: with this tokenizer and {len(key)} digits it "
                f"needs at least {length - num_filler} tokens"
            )
        num_before = round(depth * num_filler)
        before, after = self.filler(num_before), self.filler(num_filler - num_before)
        lines = [self.opening, before, self.newline, self.needle(key), self.newline, after, self.newline, self.question]
        return [token for line in lines for token in line]


def make_trials(
    lengths: Sequence[int], depths: Sequence[float], num_trials: int, seed: int, *, num_digits: int = 5
) -> list[dict]:
    """Trials {"length", "depth", "key"}, `num_trials` for each length (prompt tokens) and depth (0 start, 1 end).

    Keys have `num_digits` digits, the first not 0, and depend on nothing but seed, length, depth and number,
    so that leaving out a length changes no other. Raises ValueError for values out of range.
    """
    check_grid(lengths, depths)
    if num_trials < 1:
        raise ValueError(f"--num_trials: must be at least 1, got {num_trials}")
    if not 1 <= num_digits <= MAX_NUM_DIGITS:
        raise ValueError(f"--num_digits: must be between 1 and {MAX_NUM_DIGITS}, got {num_digits}")
    trials = []
    for length in dict.fromkeys(lengths):
        for depth in dict.fromkeys(map(float, depths)):
            for number in range(num_trials):
                source = random.Random(f"{seed} {length} {depth} {number}")
                key = str(source.randrange(10 ** (num_digits - 1), 10**num_digits))
                trials.append({"length": length, "depth": depth, "key": key})
    return trials


def build_prompt(tokenizer, trial: Mapping) -> list[int]:
    """Ids of the prompt of `trial`, exactly trial["length"] of them, BOS included where the tokenizer has one.

    Raises ValueError, with the least length, for one too short for the wording.
    """
    return PasskeyTemplate(tokenizer).build(length=trial["length"], depth=trial["depth"], key=trial["key"])


def first_number(text: str) -> str | None:
    """The first run of digits 0-9 in `text`."""
    found = re.search(r"[0-9]+", text)
    return found[0] if found else None


def answer_trial(loaded, trial: Mapping) -> dict:
    """Ask the model of `loaded` (longqlora.inference.load.LoadedModel) one trial; adds "answer" and "is_correct"."""
    num_key_tokens = len(encode_after_newline(loaded.tokenizer, f" {trial['key']}"))
    options = GenerationOptions(do_sample=False, max_new_tokens=num_key_tokens + NUM_SPARE_TOKENS)
    prompt_ids = build_prompt(loaded.tokenizer, trial)
    answer = generate_text(loaded.model, loaded.tokenizer, prompt_ids, options).text
    return {**trial, "answer": answer, "is_correct": first_number(answer) == trial["key"]}


def accuracy_cells(results: Sequence[Mapping]) -> list[dict]:
    """Results of `answer_trial` -> a cell {length, depth, num_trials, num_correct, accuracy} for each pair."""
    groups: dict[tuple[int, float], list[bool]] = {}
    for result in results:
        groups.setdefault((result["length"], result["depth"]), []).append(result["is_correct"])
    return [
        {
            "length": length,
            "depth": depth,
            "num_trials": len(outcomes),
            "num_correct": sum(outcomes),
            "accuracy": sum(outcomes) / len(outcomes),
        }
        for (length, depth), outcomes in groups.items()
    ]


def accuracy_table(results: Sequence[Mapping]) -> str:
    """Results of `answer_trial` as a text table of accuracy in percent, depths by lengths, with means."""
    return grid_table(accuracy_cells(results), "accuracy")


def evaluate_passkey(
    loaded,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    num_trials: int,
    seed: int,
    output_file: Path | None,
    fingerprint: dict,
    num_digits: int = 5,
) -> dict:
    """Ask one model all trials; returns {"protocol", "cells", "trials"}, the same on every rank.

    output_file, fingerprint: as in `run_trials`; give each model an output_file of its own. The
    caller writes it and then calls `finish_trials`.
    """
    from longqlora.evaluation.trials import run_trials

    trials = make_trials(lengths, depths, num_trials, seed, num_digits=num_digits)
    template = PasskeyTemplate(loaded.tokenizer)
    for trial in trials:
        if trial["length"] < template.min_length(trial["key"]):
            template.build(**trial)
    protocol = {
        "task": "passkey retrieval, wording of Landmark Attention (arXiv 2305.16300)",
        "scoring": "greedy; the first number of the answer is the key",
        "length": "tokens of the prompt, BOS included, the answer not",
        "num_digits": num_digits,
        "num_trials": num_trials,
        "seed": seed,
    }
    results = run_trials(
        trials,
        lambda trial: answer_trial(loaded, trial),
        output_file=output_file,
        fingerprint={**fingerprint, "protocol": protocol["task"]},
        desc="passkey",
    )
    return {"protocol": protocol, "cells": accuracy_cells(results), "trials": results}
