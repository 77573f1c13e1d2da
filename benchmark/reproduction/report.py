"""The page of a suite: finished cells as a table with mean and 95% interval, the papers' rows beside, and plots."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from tabulate import tabulate

from longqlora.evaluation.retrieval.grid import percent, plot_heatmap
from longqlora.files import atomic_file, read_json
from longqlora.plot import MARKERS, draw_loss_by_position, draw_perplexity, new_figure
from longqlora.table import grouped
from reproduction.suite import Cell, Scale, Suite

# Student's t, two-sided 95%, by degrees of freedom from 1 on.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
TERA = 1e12
# Rows whose FLOPs differ by less share a label in the plot.
SAME_COST = 1.005
CAPTIONS = {
    "perplexity": "perplexity by window length, mean of the seeds",
    "position": "loss by position at the longest length, mean of the seeds",
    "passkey": "passkey accuracy by length and depth, mean of the seeds",
    "cost": "cost against quality, with 95% intervals",
    "steps": "perplexity at the longest length by optimizer steps, with 95% intervals",
}


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over the seeds and half of its 95% interval by Student's t; 0 for a single one. At most ten seeds."""
    if len(values) < 2:
        return fmean(values), 0.0
    return fmean(values), T_95[len(values) - 2] * stdev(values) / len(values) ** 0.5


def with_interval(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    mean, half = mean_interval(values)
    mean, half = f"{mean:{form}}", f"{half:{form.removeprefix('+')}}"
    return mean if float(half) == 0 else f"{mean} ± {half}"


def aligned(heads: Sequence[str], lines: Sequence[Sequence]) -> str:
    align = ["left", *["right"] * (len(heads) - 1)]
    return tabulate(lines, heads, tablefmt="pipe", disable_numparse=True, colalign=align)


def plain_numbers(axis) -> None:
    """Legend, and the ticks of a short logarithmic axis as they are read."""
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.legend(fontsize="small")


class Figures:
    """Finished cells of one suite on one data set, by row in the suite's order; a value for each seed."""

    def __init__(self, suite: Suite, scale: Scale, cells: Sequence[Cell]) -> None:
        found = [{"row": cell.row, **read_json(cell.path)} for cell in cells if cell.path.is_file()]
        records = {row: own for (row,), own in grouped(found, "row").items()}
        self.suite, self.scale = suite, scale
        self.records = {row.name: records[row.name] for row in suite.rows if row.name in records}
        self.panels: dict[str, list[str]] = {}
        for row in suite.rows:
            if row.name in records:
                self.panels.setdefault(row.panel, []).append(row.name)
        self.lengths, self.passkey_lengths = scale.perplexity["seq_len"], scale.passkey["lengths"]

    def perplexity(self, row: str, length: int | None = None) -> list[float]:
        """At a length, the longest where none is given; what is not finite is left out."""
        return list(self.by_seed(row, length).values())

    def excess(self, row: str) -> list[float]:
        """How far its perplexity at the longest length is above the reference row's with the same seed, in percent."""
        reference = self.by_seed(self.suite.reference)
        return [100 * (own / reference[seed] - 1) for seed, own in self.by_seed(row).items() if seed in reference]

    def by_seed(self, row: str, length: int | None = None) -> dict[int | None, float]:
        """`perplexity` by seed; None is that of a row that is not trained."""
        length = length or max(self.lengths)
        found = [(record["seed"], result) for record in self.records.get(row, []) for result in record["perplexity"]]
        return {seed: x["perplexity"] for seed, x in found if x["seq_len"] == length and x["perplexity"] is not None}

    def passkey(self, row: str, length: int, depth: float | None = None) -> list[float]:
        """Accuracy in percent, over all depths or at one."""
        places = [[x["accuracy"] for x in record["passkey"]["cells"]
                   if x["length"] == length and depth in (None, x["depth"])]
                  for record in self.records[row]]  # fmt: skip
        return [100 * fmean(own) for own in places]

    def fact(self, row: str, group: str, name: str, unit: float = 1) -> list[float]:
        """A number of the records, in `unit`; nothing for rows that are not trained."""
        found = [record.get(group, {}).get(name) for record in self.records[row]]
        return [value / unit for value in found if value]

    def columns(self) -> dict[str, tuple[Callable[[str], list[float]], str]]:
        """Heads of the suite's columns -> what gives a row's values, and their format."""
        kinds = {
            "perplexity": {f"ppl {n}": (partial(self.perplexity, length=n), ".2f") for n in self.lengths},
            "excess": {f"above {self.suite.reference}, %": (self.excess, "+.1f")},
            "passkey": {f"passkey {n}, %": (partial(self.passkey, length=n), ".0f") for n in self.passkey_lengths},
            "parameters": {
                "trained, M": (partial(self.fact, group="training", name="num_parameters", unit=1e6), ".2f")
            },
            "steps": {"steps": (partial(self.fact, group="training", name="num_steps"), ".0f")},
            "flops": {"TFLOPs": (partial(self.fact, group="training", name="flops", unit=TERA), ".2f")},
            "seconds": {"training, s": (partial(self.fact, group="seconds", name="train"), ".0f")},
        }
        return {head: column for kind in self.suite.columns for head, column in kinds[kind].items()}

    def table(self) -> str:
        """The rows with their columns, and the papers' beside."""
        suite, columns = self.suite, self.columns()
        beside = [(f"{source['source'].split(' (')[0]}: {head}", source["rows"], index)
                  for source in suite.paper for index, head in enumerate(source["columns"])]  # fmt: skip
        lines = []
        for row in self.records:
            own = [with_interval(values(row), form) for values, form in columns.values()]
            paper = [rows[row][index] if row in rows else None for _, rows, index in beside]
            name = f"**{row}**" if row == suite.recommended else row
            lines.append([name, *own, *("" if value is None else value for value in paper)])
        return aligned(["", *columns, *(head for head, _, _ in beside)], lines)

    def depth_table(self) -> str:
        """Passkey accuracy by depth at the longest length."""
        length = max(self.passkey_lengths)
        first = next(iter(self.records.values()))[0]
        depths = sorted({cell["depth"] for cell in first["passkey"]["cells"]})
        lines = [[row, *(with_interval(self.passkey(row, length, depth), ".0f") for depth in depths)]
                 for row in self.records]  # fmt: skip
        return aligned([f"passkey at {length} tokens, %", *(f"depth {percent(depth)}" for depth in depths)], lines)

    def draw(self, plot: str, path: Path) -> None:
        {"perplexity": self.draw_lengths, "position": self.draw_positions, "passkey": self.draw_passkey,
         "cost": self.draw_cost, "steps": self.draw_steps}[plot](path)  # fmt: skip

    def draw_lengths(self, path: Path) -> None:
        def curve(row: str) -> list[tuple[int, float]]:
            return [(n, fmean(values)) for n in self.lengths if (values := self.perplexity(row, n))]

        self.draw_curves(draw_perplexity, curve, path)

    def draw_positions(self, path: Path) -> None:
        def curve(row: str) -> list[Mapping]:
            found = [longest(record)["loss_by_position"] for record in self.records[row]]
            return [{**places[0], "loss": fmean(place["loss"] for place in places)}
                    for places in zip(*found, strict=True)]  # fmt: skip

        self.draw_curves(draw_loss_by_position, curve, path)

    def draw_curves(self, draw: Callable, curve: Callable[[str], Sequence], path: Path) -> None:
        """A panel for each value of the suite's first axis, a curve for each row."""
        with new_figure(path, len(self.panels)) as axes:
            for axis, (panel, rows) in zip(axes, self.panels.items(), strict=True):
                curves = {row.removeprefix(f"{panel}, "): curve(row) for row in rows}
                draw(axis, curves, original_length=self.scale.context)
                axis.set_title(panel or ("others" if len(self.panels) > 1 else ""))

    def draw_passkey(self, path: Path) -> None:
        grids = {}
        for row in [row for row in self.suite.passkey_rows if row in self.records] or self.records:
            places = [cell for record in self.records[row] for cell in record["passkey"]["cells"]]
            grids[row] = [{"length": length, "depth": depth, "accuracy": fmean(x["accuracy"] for x in own)}
                          for (length, depth), own in grouped(places, "length", "depth").items()]  # fmt: skip
        plot_heatmap(grids, path, label="passkey accuracy")

    def draw_cost(self, path: Path) -> None:
        """A point for each trained row; the edge joins those that nothing cheaper beats."""
        found = {row.name: (panel, flops[0], *mean_interval(values)) for row in self.suite.rows
                 if row.name in self.records and (flops := self.fact(row.name, "training", "flops", TERA))
                 and (values := self.perplexity(row.name)) for panel in [row.panel or "other"]}  # fmt: skip
        edge, best = [], float("inf")
        for _, flops, mean, _ in sorted(found.values(), key=lambda point: point[1:3]):
            if mean < best:
                best = mean
                edge.append((flops, mean))
        with new_figure(path, panel_size=(8, 6.5)) as (axis,):
            for number, panel in enumerate(dict.fromkeys(point[0] for point in found.values())):
                _, flops, means, halves = zip(*(x for x in found.values() if x[0] == panel), strict=True)
                marker = MARKERS[number % len(MARKERS)]
                axis.errorbar(flops, means, halves, marker=marker, linestyle="", capsize=3, label=panel)
            axis.step(*zip(*edge, strict=True), where="post", color="0.4", marker="", label="edge")
            if self.suite.recommended in found:
                _, flops, mean, _ = found[self.suite.recommended]
                ring = {"markersize": 18, "fillstyle": "none", "color": "black", "linestyle": ""}
                axis.plot([flops], [mean], marker="o", **ring, label=f"recommended: {self.suite.recommended}")
            # Rows of the same attention cost the same: their name stands once above them, beside those of like cost.
            names: dict[float, list[str]] = {}
            for row, (panel, flops, *_) in sorted(found.items(), key=lambda item: item[1][1]):
                place = next((known for known in names if flops < SAME_COST * known), flops)
                names.setdefault(place, []).append(row.removeprefix(f"{panel}, "))
            for place, own in names.items():
                text = "\n".join(dict.fromkeys(own))
                where = {"xycoords": ("data", "axes fraction"), "rotation": 60, "rotation_mode": "anchor"}
                axis.annotate(text, (place, 1.02), **where, va="center", fontsize=7, linespacing=1.25)
            axis.set(xlabel="training FLOPs (10^12)", ylabel=f"perplexity at {max(self.lengths)} tokens", yscale="log")
            plain_numbers(axis)

    def draw_steps(self, path: Path) -> None:
        steps = partial(self.fact, group="training", name="num_steps")
        with new_figure(path) as (axis,):
            for panel, rows in self.panels.items():
                points = sorted((fmean(steps(row) or [0]), *mean_interval(self.perplexity(row))) for row in rows)
                x, means, halves = zip(*points, strict=True)
                axis.errorbar(x, means, halves, capsize=3, label=panel or self.suite.title)
            axis.set(xlabel="optimizer steps", ylabel=f"perplexity at {max(self.lengths)} tokens", yscale="log")
            plain_numbers(axis)


def write_report(suite: Suite, scale: Scale, cells: Sequence[Cell], folder: Path, command: str) -> Path:
    """Write NAME.md, NAME.json and the plots of the finished cells into `folder`; returns the path of the page."""
    stem = suite.name if scale.name == "tiny" else f"{suite.name}-{scale.name}"
    parts, records = [], {}
    for dataset in scale.datasets:
        figures = Figures(suite, scale, [cell for cell in cells if cell.dataset == dataset])
        parts.append(f"## {dataset.name}")
        if not figures.records:
            parts.append("Not run.")
            continue
        records[dataset.name] = figures.records
        parts += [figures.table(), *([figures.depth_table()] if "passkey" in suite.columns else [])]
        for plot in suite.plots:
            image = folder / f"{stem}-{dataset.name}-{plot}.png"
            figures.draw(plot, image)
            parts.append(f"![{CAPTIONS[plot]}]({image.name})")
    measured = [record for rows in records.values() for own in rows.values() for record in own]
    facts = {"command": f"`{command}`", "scale": scale.about, **(facts_of(measured) if measured else {}),
             "cells": f"{len(measured)} of {len(cells)} measured"}  # fmt: skip
    facts = [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in facts.items()]
    lists = {
        "The papers' figures": [f"- {source['source']}: {', '.join(source['columns'])}" for source in suite.paper],
        "Reading": suite.reading.strip().splitlines(),
    }  # fmt: skip
    parts += [f"## {title}\n\n" + "\n".join(lines) for title, lines in lists.items() if lines]
    page = [f"# {suite.title}", suite.question.strip(), "\n".join(["| | |", "|---|---|", *facts]), *parts]
    with atomic_file(folder / f"{stem}.md") as file:
        file.write("\n\n".join(page) + "\n")
    if measured:
        write_records(folder / f"{stem}.json", command, scale.about, records)
    return folder / f"{stem}.md"


def longest(record: Mapping) -> Mapping:
    """A cell's perplexity result at its longest length."""
    return max(record["perplexity"], key=lambda result: result["seq_len"])


def brief(record: Mapping) -> dict:
    """A cell's record for the page's JSON, without its commands: loss by position at the longest length only, as a list
    of [first position of a block, loss]."""
    by_length = [{key: value for key, value in result.items() if key != "loss_by_position"}
                 for result in record["perplexity"]]  # fmt: skip
    by_position = [[block["start"], round(block["loss"], 4)] for block in longest(record)["loss_by_position"]]
    kept = {key: value for key, value in record.items() if key not in ("row", "commands")}
    return {**kept, "perplexity": by_length, "loss_by_position": by_position}


def write_records(path: Path, command: str, scale: str, records: Mapping[str, Mapping[str, list]]) -> None:
    """The cells by data set and row, in one line; what all of them share stands once, as "of_all"."""
    cells = {name: {row: list(map(brief, own)) for row, own in rows.items()} for name, rows in records.items()}
    every = [cell for rows in cells.values() for own in rows.values() for cell in own]
    of_all = {key: every[0][key] for key in every[0] if all(cell.get(key) == every[0][key] for cell in every)}
    for cell in every:
        for key in of_all:
            del cell[key]
    with atomic_file(path) as file:
        json.dump({"command": command, "scale": scale, "of_all": of_all, "cells": cells}, file)


def facts_of(records: Sequence[Mapping]) -> dict[str, str]:
    """How the cells were measured: the first one's machine and protocol, dates, commits and seeds of all."""
    first, dates = records[0], sorted(record["date"] for record in records)
    versions, machine = dict(first["machine"]["versions"]), first["machine"]
    commits = {record["machine"]["versions"]["commit"] for record in records}
    seeds = sorted({record["seed"] for record in records if record["seed"] is not None})
    hardware = f"{machine['cpu']}, {machine['num_cpus']} cores, threads of a cell: {machine['num_threads']}"
    passkey = first["passkey"]["protocol"]
    versions.pop("commit")
    return {
        "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "commit": ", ".join(sorted(commit[:12] + "+dirty" * commit.endswith("+dirty") for commit in commits)),
        "hardware": f"{machine['gpu']}; {hardware}" if "gpu" in machine else hardware,
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "perplexity": first["perplexity"][-1]["protocol"],
        "passkey": "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in passkey.items()),
        "seeds": f"{', '.join(map(str, seeds))} (LoRA's start, dropout, order of the rows); mean ± half of the 95% "
                 "interval, Student's t",
    }  # fmt: skip
