"""RULER measured: samples that fill a given number of tokens, their score, the table and the plot by length.

A length is RULER's: prompt and room for the answer together, in tokens of the model. Sample i of a task depends on the
seed, the length and the tokenizer alone, so every model with that tokenizer meets the same ones. Scores are RULER's
string match: the share of the expected strings that the answer holds, in any case. Tasks of lm-evaluation-harness run
beside them, by their own rules.
"""

import hashlib
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

from longqlora.distributed import print_main
from longqlora.evaluation.frame import ModelSource, Task
from longqlora.evaluation.lm_eval_harness import data_state, evaluate_tasks, generate_answers, load_tasks, wrap_model
from longqlora.evaluation.retrieval.haystack import read_haystack
from longqlora.evaluation.ruler.tasks import TASKS, Sample, TextHaystack
from longqlora.plot import mark_lengths, new_figure
from longqlora.table import grouped, text_table

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


@dataclass
class Ruler(Task):
    """RULER's tasks at each length, and any tasks of lm-eval: a trial is one task, at one length where it has one. What
    cannot be made so short, or so long, is skipped by name.

    None leaves a number to the task or the model. haystack: files in which needles are hidden. include_path: folder of
    the user's own lm-eval tasks.
    """

    tasks: Sequence[str]
    lengths: Sequence[int] | None = None
    num_samples: int = 100
    max_new_tokens: int | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    seed: int = 42
    batch_size: int = 1
    haystack: Sequence[str] = ()
    include_path: Path | None = None
    name = "tasks and lengths"

    def __post_init__(self) -> None:
        self.inputs = {"--haystack": self.haystack, "--include_path": self.include_path}
        self.names = [name for name in self.tasks if name in TASKS]
        told = {"include_path": self.include_path and str(self.include_path), "lm_eval": metadata.version("lm_eval")}
        self.told = {**asdict(self), "haystack": None, **told}
        self.text = None
        if self.haystack:
            text = read_haystack(self.haystack)
            self.text = TextHaystack(text)
            files = [Path(path).name for path in self.haystack]
            self.told["haystack"] = {"files": files, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name in self.names:
            if TASKS[name].needs_text and not self.text:
                raise ValueError(
                    f"--tasks {name}: its haystack are essays, which are not part of this repository; give text files "
                    "of your own with --haystack, or take niah_single_1"
                )

    def make_trials(self, source: ModelSource) -> list[list[dict]]:
        lengths = sorted(set(self.lengths or [source.context_size])) if self.names else []
        source.warn_beyond_context(lengths)
        self.longest = max([source.context_size, *lengths])
        options = {"num_samples": self.num_samples, "max_new_tokens": self.max_new_tokens, "seed": self.seed}

        def count_tokens(prompt: str) -> int:
            return len(source.tokenizer(prompt).input_ids)

        self.fitted, self.skipped = {}, []
        for name, length in product(self.names, lengths):
            try:
                self.fitted[name, length] = FittedTask(name, length, count_tokens, text=self.text, **options)
            except ValueError as error:
                self.skipped.append({"task": name, "length": length, "reason": str(error)})
                print_main(f"skipped: {error}")
        if self.names and not self.fitted:
            raise ValueError(self.skipped[0]["reason"])
        options = {"include_path": self.include_path, "lengths": self.lengths, "max_new_tokens": self.max_new_tokens}
        self.others = load_tasks([name for name in self.tasks if name not in TASKS], source, **options)
        # Which tasks and lengths a run asks for does not change the result of one.
        settings = {name: value for name, value in self.told.items() if name not in ("tasks", "lengths")}
        self.settings = {**settings, "data": {name: data_state(tasks) for name, tasks in self.others.items()}}
        places = [*self.fitted, *((name, None) for name in self.others)]
        return [[{"task": name, "length": length} for name, length in places]]

    def use(self, loaded: Any) -> None:
        self.model = wrap_model(loaded, batch_size=self.batch_size, max_length=self.longest)

    def ask(self, trial: Mapping) -> dict:
        name, length = trial["task"], trial["length"]
        if length is None:
            options = {"num_fewshot": self.num_fewshot, "limit": self.limit, "seed": self.seed}
            return {"task": name, **evaluate_tasks(self.model, name, self.others[name], **options)}
        fitted = self.fitted[name, length]
        samples = fitted.samples()
        prompts = [sample.prompt for sample, _ in samples]
        answers = generate_answers(self.model, prompts, max_new_tokens=fitted.max_new_tokens)
        return fitted.result(samples, answers)

    def score(self, results: Sequence[dict]) -> dict:
        of_ruler, _ = by_source(results)
        means = {"mean": mean_by_length(of_ruler)} if of_ruler else {}
        return {"protocol": PROTOCOL, "settings": self.told, "skipped": self.skipped, **means, "results": results}

    def table(self, record: Mapping) -> str:
        tables = zip((score_table, metric_table), by_source(record["results"]), strict=True)
        return "\n".join(table(results) for table, results in tables if results)

    def plot(self, record: Mapping, name: str, path: str) -> None:
        """Score in percent against length in tokens: a line per task, and the mean of several."""
        results, _ = by_source(record["results"])
        with new_figure(path) as (axis,):
            for task, row in rows_by_task(results).items():
                style = {"marker": "", "color": "black", "linewidth": 2.5} if task == MEAN else {}
                axis.plot(*zip(*sorted(row.items()), strict=True), label=task, **style)
            mark_lengths(axis, list(mean_by_length(results)))
            axis.set(xlabel="length (tokens)", ylabel="RULER score (%)", ylim=(-3, 103))
            axis.legend(fontsize="small")


def by_source(results: Sequence[Mapping]) -> tuple[list[Mapping], list[Mapping]]:
    """Results of RULER's tasks, and of lm-eval's, which have no length."""
    return [r for r in results if "length" in r], [r for r in results if "length" not in r]


@dataclass
class FittedTask:
    """A task at one length, with the number of units with which a sample takes that many tokens, answer included.

    max_new_tokens: room for the answer; None for the task's own. Raises ValueError, with the least length,
    where not even the smallest samples fit, and where a task cannot be made that long.
    """

    name: str
    length: int
    count_tokens: CountTokens
    num_samples: int
    max_new_tokens: int | None
    seed: int
    text: TextHaystack | None

    def __post_init__(self) -> None:
        self.task = TASKS[self.name]
        self.max_new_tokens = self.max_new_tokens or self.task.max_new_tokens
        least = max(self.build(index, self.task.min_units)[1] for index in range(self.num_samples))
        if least > self.room:
            raise ValueError(
                f"--lengths {self.length}: {self.name} needs at least {least + self.max_new_tokens} tokens with this "
                f"tokenizer, {self.max_new_tokens} of them for the answer; give a longer one"
            )
        self.num_units = self.fit()

    @property
    def room(self) -> int:
        """Most tokens that a prompt may have."""
        return self.length - self.max_new_tokens

    def build(self, index: int, num_units: int) -> tuple[Sample, int]:
        """Sample `index` with so many units, and the tokens of its prompt; it keeps its needles, whatever its size."""
        # A string seeds the same on every platform.
        rng = random.Random(f"{self.seed}/{self.name}/{index}")
        sample = self.task.build(rng, num_units, self.length, self.text)
        return sample, self.count_tokens(sample.prompt)

    def fit(self) -> int:
        """The most units with which sample 0 fits, by doubling and halving."""
        limit, low, high = self.task.max_units, self.task.min_units, self.task.min_units + 1
        while high <= limit and self.build(0, high)[1] <= self.room:
            low, high = high, high * 2
        high = min(high, limit + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.build(0, middle)[1] <= self.room else (low, middle)
        num_tokens = self.build(0, low)[1] + self.max_new_tokens
        if low == limit and num_tokens < LEAST_FILLING * self.length:
            raise ValueError(
                f"--lengths {self.length}: {self.name} has words for about {num_tokens} tokens; give a shorter one"
            )
        return low

    def samples(self) -> list[tuple[Sample, int]]:
        """All samples and the tokens of their prompts: never above the room, and close to it."""
        return [self.sample(index) for index in range(self.num_samples)]

    def sample(self, index: int) -> tuple[Sample, int]:
        """Sample `index` and the tokens of its prompt: its words may have more or fewer than those of sample 0."""
        num_units, best = self.num_units, None
        while True:
            sample, num_tokens = self.build(index, num_units)
            slack = self.room - num_tokens
            if slack < 0 and best:
                return best
            if slack < 0:
                num_units = max(self.task.min_units, num_units - math.ceil(-slack * num_units / num_tokens))
                continue
            best, more = (sample, num_tokens), slack * num_units // num_tokens
            if slack <= self.length * SPARE or more < 1 or num_units + more > self.task.max_units:
                return best
            num_units += more

    def result(self, samples: Sequence[tuple[Sample, int]], answers: Sequence[str]) -> dict:
        """Ready for JSON: score of all samples in percent with its standard error, and every answer."""
        answered = [
            {"expected": list(sample.outputs), "answer": answer, "score": fraction_found(answer, sample.outputs)}
            for (sample, _), answer in zip(samples, answers, strict=True)
        ]
        scores = [found["score"] for found in answered]
        error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
        sizes = [num_tokens for _, num_tokens in samples]
        return {
            "task": self.name,
            "length": self.length,
            "score": 100 * statistics.fmean(scores),
            "stderr": None if error is None else 100 * error,
            "num_samples": len(scores),
            "haystack": "noise" if self.task.haystack == "text" and not self.text else self.task.haystack,
            "max_new_tokens": self.max_new_tokens,
            "num_prompt_tokens": {"min": min(sizes), "max": max(sizes)},
            "answers": answered,
        }


def fraction_found(answer: str, expected: Sequence[str]) -> float:
    """RULER's string_match_all: share of the `expected` strings that occur in `answer`, whatever their case."""
    return sum(text.lower() in answer.lower() for text in expected) / len(expected)


def mean_by_length(results: Sequence[Mapping]) -> dict[int, float]:
    """Length in tokens -> mean score of its tasks, each task counting the same."""
    groups = sorted(grouped(results, "length").items())
    return {length: statistics.fmean(result["score"] for result in group) for (length,), group in groups}


def rows_by_task(results: Sequence[Mapping]) -> dict[str, dict[int, float]]:
    """Task -> {length: score}, and the mean of several tasks below them."""
    rows = {task: {result["length"]: result["score"] for result in group}
            for (task,), group in grouped(results, "task").items()}  # fmt: skip
    return {**rows, MEAN: mean_by_length(results)} if len(rows) > 1 else rows


def score_table(results: Sequence[Mapping]) -> str:
    """Scores in percent, a row per task and a column per length; the mean of several tasks below."""
    lengths = list(mean_by_length(results))
    rows = [[name, *map(row.get, lengths)] for name, row in rows_by_task(results).items()]
    return text_table(["score", *lengths], rows, digits=1)


def metric_table(results: Sequence[Mapping]) -> str:
    """Metrics of lm-eval's tasks, a line each: task, metric, value, standard error."""
    rows = []
    for task, metrics in (item for result in results for item in result["metrics"].items()):
        for metric, value in metrics.items():
            name, _, kind = metric.partition(",")
            if not name.endswith("_stderr"):
                rows.append((task, metric, float(value), metrics.get(f"{name}_stderr,{kind}")))
    return text_table(("task", "metric", "value", "stderr"), rows, digits=4, num_left=2)
