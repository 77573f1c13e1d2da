"""What a run over long tasks found: scores of each answer, means by task and by length, a table and a plot.

Scores are between 0 and 1.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from longqlora.evaluation.longtask.scores import best_score, option_letter, parse_choice, parse_letters
from longqlora.evaluation.longtask.tasks import LongTask
from longqlora.files import atomic_file

MAX_LABEL = 32


def score_answer(task: LongTask, result: Mapping, metric: str, *, use_stemmer: bool) -> dict:
    """One row of the result file: `result` of generating, with metric, score and references.

    result: has "answer", and "choice" (an index) where the likelihoods chose. metric auto: what is usual for the task.
    """
    metric = task.usual_metric if metric == "auto" else metric
    answer, choice = result["answer"], result.get("choice")
    result = {**result, "num_examples": len(task.examples)}
    row = {**result, "id": task.id, "task": task.task, "metric": metric, "references": list(task.references)}
    if metric in ("accuracy", "exam") and task.options:
        choice = parse_choice(answer, task.options) if choice is None else choice
        score = float(choice == task.answer_index)
        row |= {
            "choice": None if choice is None else option_letter(choice),
            "right_choice": option_letter(task.answer_index),
        }
    else:
        score = best_score("exam" if metric == "accuracy" else metric, answer, task.references, use_stemmer=use_stemmer)
        if metric == "accuracy":
            score = float(score == 1)
        if metric in ("accuracy", "exam") and task.has_letters:
            row["choice"] = "".join(sorted(parse_letters(answer))) or None
    return {**row, "score": score}


def summarize_tasks(rows: Sequence[Mapping]) -> list[dict]:
    """Mean score of each pair of task and metric, in order of appearance, with what was cut and not understood."""
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["metric"]), []).append(row)
    return [
        {
            "task": task,
            "metric": metric,
            "score": fmean(row["score"] for row in group),
            "num_rows": len(group),
            "num_rows_cut": sum(row["num_tokens_cut"] > 0 for row in group),
            "num_rows_without_choice": sum("choice" in row and row["choice"] is None for row in group),
            "mean_context_tokens": fmean(row["num_context_tokens"] for row in group),
        }
        for (task, metric), group in groups.items()
    ]


def summarize_lengths(rows: Sequence[Mapping]) -> list[dict]:
    """Mean score by metric and length of the whole context, in doublings: {"metric", "min_tokens", "max_tokens", ...}.

    max_tokens is exclusive.
    """
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        floor = 2 ** math.floor(math.log2(max(1, row["num_context_tokens"])))
        groups.setdefault((row["metric"], floor), []).append(row["score"])
    return [
        {
            "metric": metric,
            "min_tokens": floor,
            "max_tokens": 2 * floor,
            "score": fmean(scores),
            "num_rows": len(scores),
        }
        for (metric, floor), scores in sorted(groups.items())
    ]


def task_table(summaries: Sequence[Mapping]) -> str:
    """The means as aligned text."""
    lines = [("task", "metric", "score", "rows", "cut")]
    lines += [
        (s["task"], s["metric"], f"{s['score']:.4f}", str(s["num_rows"]), str(s["num_rows_cut"])) for s in summaries
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def plot_tasks(tasks: Sequence[Mapping], lengths: Sequence[Mapping], path: str | os.PathLike) -> None:
    """A bar for each task beside the score by context length, a line for each metric."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, max(4.2, 1.2 + 0.3 * len(tasks))), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    # Dollar signs would start a formula.
    labels = [f"{task['task'][:MAX_LABEL]} ({task['metric']})".replace("$", r"\$") for task in tasks]
    bars = left.barh(range(len(tasks)), [task["score"] for task in tasks])
    left.bar_label(bars, fmt="%.3f", padding=3)
    left.set_yticks(range(len(tasks)), labels)
    left.invert_yaxis()
    left.set_xlim(0, 1.12)
    left.set_xlabel("mean score")
    for metric in dict.fromkeys(entry["metric"] for entry in lengths):
        points = [(entry["min_tokens"], entry["score"]) for entry in lengths if entry["metric"] == metric]
        right.plot(*zip(*points, strict=True), marker="o", label=metric)
    ticks = sorted({entry["min_tokens"] for entry in lengths})
    right.set_xscale("log", base=2)
    right.set_xticks(ticks, [f"{tick}-{2 * tick}" for tick in ticks], rotation=30)
    right.minorticks_off()
    right.set_ylim(-0.03, 1.03)
    right.set_xlabel("length of the text (tokens)")
    right.set_ylabel("mean score")
    right.grid(alpha=0.3)
    right.legend()
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format=Path(path).suffix.lstrip(".").lower())
