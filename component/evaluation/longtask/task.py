"""Answers to questions about long texts: asked, scored, and summed up by task and by length."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from longqlora.cli import require_extra
from longqlora.evaluation.frame import ModelSource, Task, check_at_least
from longqlora.evaluation.longtask.prompts import QUESTION_LEAD, PromptForm
from longqlora.evaluation.longtask.questions import Question, read_questions
from longqlora.evaluation.longtask.scores import ROUGE_METRICS, best_score, parse_choice, parse_letters
from longqlora.inference.generation import NO_TEMPLATE, GenerationOptions, generate_text
from longqlora.plot import mark_lengths, new_figure
from longqlora.table import grouped, text_table

MAX_LABEL = 32


@dataclass
class LongTask(Task):
    """A trial is a question of the files `data_path`; `num_shots` examples of `shots_file` stand before each.

    Raises ValueError for a bad row, and for a question that cannot be scored by the metric that is asked for.
    """

    data_path: Sequence[str]
    metric: str = "auto"
    max_rows: int | None = None
    max_new_tokens: int = 128
    num_shots: int = 0
    shots_file: str | None = None
    prompt_template: str = "auto"
    name = "long tasks"

    def __post_init__(self) -> None:
        check_at_least(self, max_rows=1, num_shots=0)
        GenerationOptions(max_new_tokens=self.max_new_tokens)
        if bool(self.num_shots) != bool(self.shots_file):
            raise ValueError("--num_shots and --shots_file go together; give both or neither")
        self.inputs = {"--data_path": self.data_path, "--shots_file": self.shots_file}
        self.questions = read_questions(self.data_path, "--data_path", max_rows=self.max_rows)
        shots = [self.shots_file] if self.shots_file else []
        self.shots = read_questions(shots, "--shots_file", needs_context=False)
        for question in self.questions:
            if question.metric_for(self.metric) == "accuracy" and not (question.options or question.has_letters):
                where = f"question {question.id} of {question.task}"
                raise ValueError(f"--metric: {where} has no options for accuracy; give them or another metric")
        if any(question.metric_for(self.metric) in ROUGE_METRICS for question in self.questions):
            require_extra("rouge_score", "rouge-score", extra="eval")

    def make_trials(self, source: ModelSource) -> list[list[dict]]:
        template = source.template(self.prompt_template)
        sizes = {"context_size": source.context_size, "max_new_tokens": self.max_new_tokens}
        self.form = PromptForm(source.tokenizer, template, shots=self.shots, num_shots=self.num_shots, **sizes)
        for question in self.questions:
            self.form.check(question)
        self.told = {"max_new_tokens": self.max_new_tokens, "num_shots": self.num_shots, "prompt_template": template}
        self.settings = {**self.told, "shots": [asdict(shot) for shot in self.shots]}
        return [[asdict(question) for question in self.questions]]

    def ask(self, trial: Mapping) -> dict:
        ids, num_context, num_cut = self.form.fit(Question(**trial))
        facts = {"num_context_tokens": num_context, "num_tokens_cut": num_cut, "num_prompt_tokens": len(ids)}
        # Raw text goes on with the next question after an answer, in our own layout.
        stop = (f"\n{QUESTION_LEAD.strip()}",) if self.form.template == NO_TEMPLATE else ()
        options = GenerationOptions(do_sample=False, max_new_tokens=self.max_new_tokens, stop=stop)
        generated = generate_text(self.loaded.model, self.loaded.tokenizer, ids, options)
        facts |= {"num_new_tokens": generated.num_new_tokens, "finish_reason": generated.finish_reason}
        return {"answer": generated.text.strip(), **facts}

    def score(self, results: Sequence[dict]) -> dict:
        pairs = zip(self.questions, results, strict=True)
        rows = [score_answer(question, result, self.metric) for question, result in pairs]
        asked = {"data_path": list(map(str, self.data_path)), "metric": self.metric, "max_rows": self.max_rows}
        return {
            "protocol": f"greedy answers, {self.num_shots} examples of --shots_file, contexts cut in the middle to "
            f"{self.form.context_size} tokens with prompt",
            "settings": {**asked, **self.told},
            "tasks": summarize_tasks(rows),
            "by_length": summarize_lengths(rows),
            "rows": rows,
        }

    def table(self, record: Mapping) -> str:
        columns = ("task", "metric", "score", "num_rows", "num_rows_cut")
        rows = [[summary[column] for column in columns] for summary in record["tasks"]]
        text = text_table(("task", "metric", "score", "rows", "cut"), rows, digits=4, num_left=2)
        num_lost = sum(summary["num_rows_without_choice"] for summary in record["tasks"])
        lost = f"\nwarning: {num_lost} answers name no single option and count as wrong"
        return f"{text}{lost if num_lost else ''}"

    def plot(self, record: Mapping, name: str, path: str) -> None:
        """A bar for each task beside the score by context length, a line for each metric."""
        tasks, lengths = record["tasks"], record["by_length"]
        with new_figure(path, 2) as (left, right):
            left.figure.set_figheight(max(4.2, 1.2 + 0.3 * len(tasks)))
            left.grid(visible=False)
            # Dollar signs would start a formula.
            labels = [f"{task['task'][:MAX_LABEL]} ({task['metric']})".replace("$", r"\$") for task in tasks]
            bars = left.barh(range(len(tasks)), [task["score"] for task in tasks])
            left.bar_label(bars, fmt="%.3f", padding=3)
            left.set_yticks(range(len(tasks)), labels)
            left.invert_yaxis()
            left.set(xlim=(0, 1.12), xlabel="mean score")
            for (metric,), group in grouped(lengths, "metric").items():
                points = [(entry["min_tokens"], entry["score"]) for entry in group]
                right.plot(*zip(*points, strict=True), label=metric)
            ticks = sorted({entry["min_tokens"] for entry in lengths})
            mark_lengths(right, ticks)
            right.set_xticks(ticks, [f"{tick}-{2 * tick}" for tick in ticks], rotation=30)
            right.set(ylim=(-0.03, 1.03), xlabel="length of the text (tokens)", ylabel="mean score")
            right.legend()


def score_answer(question: Question, result: Mapping, asked: str) -> dict:
    """One row of the result file: `result` of generating, with references, score and metric (`Question.metric_for`)."""
    metric, answer = question.metric_for(asked), result["answer"]
    row = {**result, "num_examples": len(question.examples), "id": question.id, "task": question.task}
    row |= {"metric": metric, "references": list(question.references)}
    if metric in ("accuracy", "exam") and question.options:
        choice, right = parse_choice(answer, question.options), question.right_letter
        return {**row, "choice": choice, "right_choice": right, "score": float(choice == right)}
    by = "exam" if metric == "accuracy" else metric
    score = best_score(by, answer, question.references)
    if by == "exam" and question.has_letters:
        row["choice"] = "".join(sorted(parse_letters(answer))) or None
    return {**row, "score": float(score == 1) if metric == "accuracy" else score}


def summarize_tasks(rows: Sequence[Mapping]) -> list[dict]:
    """Mean score of each pair of task and metric, in order of appearance, with what was cut and not understood."""
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
        for (task, metric), group in grouped(rows, "task", "metric").items()
    ]


def summarize_lengths(rows: Sequence[Mapping]) -> list[dict]:
    """Mean score by metric and length of the whole context, from min_tokens to below max_tokens, in doublings."""
    rows = [{**row, "floor": 2 ** math.floor(math.log2(max(1, row["num_context_tokens"])))} for row in rows]
    return [
        {"metric": metric, "min_tokens": floor, "max_tokens": 2 * floor,
         "score": fmean(row["score"] for row in group), "num_rows": len(group)}
        for (metric, floor), group in sorted(grouped(rows, "metric", "floor").items())
    ]  # fmt: skip
