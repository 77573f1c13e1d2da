"""RULER measured: samples that fill a given number of tokens, their score, the table and the plot by length.

    fitted = fit_task("vt", 4096, count_tokens, num_samples=100, max_new_tokens=30, seed=42, text=None)
    samples = make_samples(fitted, count_tokens)
    score = fraction_found(answer, samples[0].outputs)

A length is RULER's: prompt and room for the answer together, in tokens of the model. Sample i of a task
depends on the seed, the length and the tokenizer alone, so every model with that tokenizer meets the same ones.
Scores are RULER's string match: the share of the expected strings that the answer holds, in any case.
"""

import hashlib
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longqlora.cli import require_file
from longqlora.evaluation.ruler.tasks import TASKS, RulerTask, Sample, TextHaystack, check_tasks
from longqlora.files import decode_utf8
from longqlora.plot import new_figure, save_figure

CountTokens = Callable[[str], int]
# A task that runs out of units before this share of the length is refused.
LEAST_FILLING = 0.8
# A sample that leaves no more than this share of the length is long enough.
SPARE = 0.02
MEAN = "mean"
PROTOCOL = (
    "RULER (arXiv 2404.06654): lengths in tokens with the answer's room, greedy answers to raw prompts, score = "
    "percent of the expected strings found in any case; tasks of lm-eval by its own rules"
)


@dataclass(frozen=True)
class FittedTask:
    """A task at one length, with the number of units that fills it."""

    name: str
    length: int
    num_samples: int
    max_new_tokens: int
    seed: int
    num_units: int
    text: TextHaystack | None

    @property
    def task(self) -> RulerTask:
        return TASKS[self.name]

    @property
    def haystack(self) -> str:
        """What surrounds the answer: noise, needles, words, or text (the user's own)."""
        is_text = self.task.haystack == "text"
        return ("text" if self.text else "noise") if is_text else self.task.haystack

    def build(self, index: int, num_units: int) -> Sample:
        # A string seeds the same on every platform. A sample keeps its needles when it shrinks or grows.
        rng = random.Random(f"{self.seed}/{self.name}/{index}")
        return self.task.build(rng, num_units, self.length, self.text)


def read_haystack(paths: Sequence[str], flag: str = "--haystack") -> tuple[TextHaystack | None, dict | None]:
    """The text of UTF-8 files, in the given order, and facts about it for the result file; None without paths."""
    if not paths:
        return None, None
    texts = [decode_utf8(require_file(path, flag).read_bytes(), flag, str(path)) for path in paths]
    haystack = TextHaystack("\n".join(texts))
    if not haystack.pieces:
        raise ValueError(f"{flag}: no text in {', '.join(map(repr, map(str, paths)))}; give files with some")
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return haystack, {"files": [Path(path).name for path in paths], "sha256": digest}


def fit_task(
    name: str,
    length: int,
    count_tokens: CountTokens,
    *,
    num_samples: int,
    max_new_tokens: int | None,
    seed: int,
    text: TextHaystack | None,
) -> FittedTask:
    """Choose the number of units with which a sample of task `name` takes `length` tokens, answer included.

    max_new_tokens: room for the answer; None for the task's own. Raises ValueError, with the least length,
    where not even the smallest samples fit, and where a task cannot be made that long.
    """
    task = TASKS[name]
    check_tasks([name], has_text=text is not None)
    room = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    fitted = FittedTask(name, length, num_samples, room, seed, task.min_units, text)

    def num_tokens(num_units: int, index: int = 0) -> int:
        return count_tokens(fitted.build(index, num_units).prompt) + room

    smallest = max(num_tokens(task.min_units, index) for index in range(num_samples))
    if smallest > length:
        raise ValueError(
            f"--lengths {length}: {name} needs at least {smallest} tokens with this tokenizer, {room} of them for the "
            "answer; give a longer one"
        )
    low, high = task.min_units, task.min_units + 1
    limit = task.max_units or math.inf
    while high <= limit and num_tokens(high) <= length:
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if num_tokens(middle) <= length else (low, middle)
    if low == task.max_units and num_tokens(low) < LEAST_FILLING * length:
        raise ValueError(f"--lengths {length}: {name} has words for about {num_tokens(low)} tokens; give a shorter one")
    return replace(fitted, num_units=low)


def make_samples(fitted: FittedTask, count_tokens: CountTokens) -> list[tuple[Sample, int]]:
    """All samples and the tokens of their prompts: never above the length, and close to it."""
    return [fit_sample(fitted, index, count_tokens) for index in range(fitted.num_samples)]


def fit_sample(fitted: FittedTask, index: int, count_tokens: CountTokens) -> tuple[Sample, int]:
    """Sample `index` and the tokens of its prompt: its words may have more or fewer than those of sample 0."""
    num_units, limit = fitted.num_units, fitted.task.max_units or math.inf
    best = None
    while True:
        sample = fitted.build(index, num_units)
        num_tokens = count_tokens(sample.prompt)
        slack = fitted.length - fitted.max_new_tokens - num_tokens
        if slack < 0:
            if best:
                return best
            assert num_units > fitted.task.min_units, "fit_task has seen to it that the smallest sample fits"
            num_units = max(fitted.task.min_units, num_units - math.ceil(-slack * num_units / num_tokens))
            continue
        best = sample, num_tokens
        more = slack * num_units // num_tokens
        if slack <= fitted.length * SPARE or more < 1 or num_units + more > limit:
            return best
        num_units += more


def fraction_found(answer: str, expected: Sequence[str]) -> float:
    """RULER's string_match_all: share of the `expected` strings that occur in `answer`, whatever their case."""
    return sum(text.lower() in answer.lower() for text in expected) / len(expected)


def ruler_result(fitted: FittedTask, samples: Sequence[tuple[Sample, int]], answers: Sequence[str]) -> dict:
    """One task at one length, ready for JSON: score in percent with its standard error, and every answer."""
    scores = [fraction_found(answer, sample.outputs) for (sample, _), answer in zip(samples, answers, strict=True)]
    error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
    sizes = [num_tokens for _, num_tokens in samples]
    return {
        "task": fitted.name,
        "length": fitted.length,
        "score": 100 * statistics.fmean(scores),
        "stderr": None if error is None else 100 * error,
        "num_samples": len(scores),
        "haystack": fitted.haystack,
        "max_new_tokens": fitted.max_new_tokens,
        "num_prompt_tokens": {"min": min(sizes), "max": max(sizes)},
        "answers": [
            {"expected": list(sample.outputs), "answer": answer, "score": score}
            for (sample, _), answer, score in zip(samples, answers, scores, strict=True)
        ],
    }


def mean_by_length(results: Sequence[Mapping]) -> dict[int, float]:
    """Length in tokens -> mean score of its tasks, each task counting the same."""
    lengths = sorted({result["length"] for result in results})
    return {
        length: statistics.fmean(result["score"] for result in results if result["length"] == length)
        for length in lengths
    }


def score_table(results: Sequence[Mapping]) -> str:
    """Scores in percent, a row per task and a column per length; the mean of several tasks below."""
    return "\n".join(_table_lines(results))


def _table_lines(results: Sequence[Mapping]) -> Iterator[str]:
    means = mean_by_length(results)
    scores = {(result["task"], result["length"]): result["score"] for result in results}
    tasks = list(dict.fromkeys(task for task, _ in scores))
    rows = {task: {length: scores[task, length] for length in means if (task, length) in scores} for task in tasks}
    if len(tasks) > 1:
        rows[MEAN] = means
    width = max(len(name) for name in rows) + 2
    yield "score".ljust(width) + "".join(f"{length:>9}" for length in means)
    for name, row in rows.items():
        yield name.ljust(width) + "".join(f"{row[length]:9.1f}" if length in row else f"{'-':>9}" for length in means)


def metric_table(results: Sequence[Mapping]) -> str:
    """Metrics of lm-eval's tasks, a line each: task, metric, value, standard error."""
    rows = [("task", "metric", "value", "stderr")]
    for result in results:
        for task, metrics in result["metrics"].items():
            for metric, value in metrics.items():
                name, _, kind = metric.partition(",")
                if not name.endswith("_stderr"):
                    error = metrics.get(f"{name}_stderr,{kind}")
                    rows.append((task, metric, f"{value:.4f}", "-" if error is None else f"{error:.4f}"))
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(4)]
    return "\n".join("".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def plot_scores(results: Sequence[Mapping], path: str | os.PathLike) -> None:
    """Score in percent against length in tokens: a line per task, and the mean of several."""
    figure, (axis,) = new_figure()
    lengths = sorted({result["length"] for result in results})
    tasks = list(dict.fromkeys(result["task"] for result in results))
    for task in tasks:
        points = sorted((result["length"], result["score"]) for result in results if result["task"] == task)
        axis.plot(*zip(*points, strict=True), marker="o", label=task)
    if len(tasks) > 1:
        means = mean_by_length(results)
        axis.plot(list(means), list(means.values()), marker="s", color="black", linewidth=2.5, label=MEAN)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.minorticks_off()
    axis.set_ylim(-3, 103)
    axis.set_xlabel("length (tokens)")
    axis.set_ylabel("RULER score (%)")
    axis.legend(fontsize="small")
    save_figure(figure, path)
