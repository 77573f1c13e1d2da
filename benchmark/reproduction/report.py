"""The page of a suite: finished cells as a table with mean and 95% interval, the papers' rows beside, and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from tabulate import tabulate

from longqlora.evaluation.retrieval.grid import percent, plot_heatmap
from longqlora.files import atomic_file, read_json, write_json
from longqlora.plot import draw_loss_by_position, draw_perplexity, new_figure
from longqlora.table import grouped
from reproduction.suite import Cell, Scale, Suite

# Student's t, two-sided 95%, by degrees of freedom; the normal distribution's beyond.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NORMAL_95 = 1.96
TERA = 1e12
MARKERS = "os^DvPX"
PLOT_WORDS = {
    "perplexity": "perplexity by window length", "position": "loss by position at the longest length",
    "passkey": "passkey accuracy by length and depth, mean over seeds", "cost": "cost against quality",
    "steps": "perplexity at the longest length by optimizer steps",
}  # fmt: skip


class Figures:
    """Finished cells of one suite on one data set, by row, and what they say."""

    def __init__(self, scale: Scale, cells: Sequence[Cell]) -> None:
        found = [{"row": cell.row, **read_json(cell.path)} for cell in cells if cell.path.is_file()]
        self.scale, self.by_row = scale, {row: records for (row,), records in grouped(found, "row").items()}
        self.lengths, self.passkey_lengths = scale.perplexity["seq_len"], scale.passkey["lengths"]
        self.target = max(self.lengths)

    def perplexity(self, row: str, length: int) -> list[float]:
        """A value for each seed; so do the next."""
        return [result["perplexity"] for record in self.by_row[row] for result in record["perplexity"]
                if result["seq_len"] == length and result["perplexity"] is not None]  # fmt: skip

    def passkey(self, row: str, length: int, depth: float | None = None) -> list[float]:
        """Accuracy in percent, over all depths or at one."""
        return [
            100 * fmean(x["accuracy"] for x in record["passkey"]["cells"]
                        if x["length"] == length and depth in (None, x["depth"]))
            for record in self.by_row[row]
        ]  # fmt: skip

    def depths(self) -> list[float]:
        record = next(iter(self.by_row.values()))[0]
        return sorted({cell["depth"] for cell in record["passkey"]["cells"]})

    def values(self, row: str, *path: str) -> list[float]:
        """A value of the records by its keys; nothing where one lacks it."""
        found = []
        for record in self.by_row[row]:
            for name in path:
                record = record.get(name) if record else None
            found += [] if record is None else [record]
        return found

    def columns(self, names: Sequence[str]) -> dict[str, object]:
        """Heads of the table -> what gives a row's values and their format."""
        makers = {
            "perplexity": {f"ppl {n}": (lambda row, n=n: self.perplexity(row, n), ".2f") for n in self.lengths},
            "passkey": {f"passkey {n}, %": (lambda row, n=n: self.passkey(row, n), ".0f")
                        for n in self.passkey_lengths},
            "parameters": {"trained, M": (lambda row: [
                n / 1e6 for n in self.values(row, "training", "num_parameters")], ".2f")},
            "steps": {"steps": (lambda row: self.values(row, "training", "num_steps"), ".0f")},
            "flops": {"TFLOPs": (lambda row: [n / TERA for n in self.values(row, "flops") if n], ".2f")},
            "seconds": {"training, s": (lambda row: self.values(row, "seconds", "train"), ".0f")},
        }  # fmt: skip
        return {head: column for name in names for head, column in makers[name].items()}


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the seeds and half of its 95% interval by Student's t; None for fewer than two."""
    if len(values) < 2:
        return fmean(values), None
    t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else NORMAL_95
    return fmean(values), t * stdev(values) / len(values) ** 0.5


def with_interval(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    mean, half = mean_interval(values)
    return f"{mean:{form}}" if half is None or f"{half:{form}}" == f"{0:{form}}" else f"{mean:{form}} ± {half:{form}}"


def write_report(suite: Suite, scale: Scale, cells: Sequence[Cell], folder: Path, command: str) -> Path:
    """Write NAME.md, NAME.json and the plots of the finished cells into `folder`; returns the path of the page."""
    stem = suite.name if scale.name == "tiny" else f"{suite.name}-{scale.name}"
    parts, records, head = [], {}, None
    for dataset in scale.datasets:
        figures = Figures(scale, [cell for cell in cells if cell.dataset == dataset])
        if not figures.by_row:
            parts.append(f"## {dataset.name}\n\nNot run.")
            continue
        head = head or next(iter(figures.by_row.values()))[0]
        images = draw_plots(suite, scale, figures, folder, f"{stem}-{dataset.name}")
        parts += [f"## {dataset.name}", table(suite, figures), *depth_table(suite, figures), *images]
        records[dataset.name] = {row: list(map(brief, own)) for row, own in figures.by_row.items()}
    num_missing = sum(not cell.path.is_file() for cell in cells)
    path = folder / f"{stem}.md"
    written = [
        f"# {suite.title}",
        suite.question.strip(),
        facts_table(scale, cells, head, command, num_missing),
        *parts,
    ]
    paper = [f"- {source['columns'][0]}{' and so on' if len(source['columns']) > 1 else ''}: {source['source']}"
             for source in suite.paper]  # fmt: skip
    written += ["## The papers' columns", "\n".join(paper)] if paper else []
    missing = [f"- {row.name}: {row.own['not_available']}" for row in suite.rows if "not_available" in row.own]
    written += ["## Not available", "\n".join(missing)] if missing else []
    written += ["## Reading", suite.reading.strip()] if suite.reading.strip() else []
    with atomic_file(path) as file:
        file.write("\n\n".join(written) + "\n")
    write_json(
        folder / f"{stem}.json", {"command": command, "suite": suite.name, "scale": scale.name, "cells": records}
    )
    return path


def brief(record: Mapping) -> dict:
    """A cell's record for the page's JSON: without losses by position but at the longest length."""
    longest = max(result["seq_len"] for result in record["perplexity"])
    by_length = [{key: value for key, value in result.items()
                  if key != "loss_by_position" or result["seq_len"] == longest}
                 for result in record["perplexity"]]  # fmt: skip
    return {key: value for key, value in record.items() if key not in ("row", "commands")} | {"perplexity": by_length}


def facts_table(scale: Scale, cells: Sequence[Cell], head: Mapping | None, command: str, num_missing: int) -> str:
    rows = [("command", f"`{command}`"), ("scale", scale.about)]
    if head:
        records = [read_json(cell.path) for cell in cells if cell.path.is_file()]
        machine, dates = head["machine"], sorted({record["date"] for record in records})
        commits = sorted({record["machine"]["versions"]["commit"][:12] for record in records})
        versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if name != "commit")
        passkey = head["passkey"]["protocol"]
        rows += [
            ("date", " to ".join(dict.fromkeys((dates[0], dates[-1])))),
            ("commit", ", ".join(commits)),
            ("hardware", f"{machine['cpu']}, {machine['num_cpus']} cores, {machine['num_threads']} thread(s) a cell"
                         + (f", {machine['gpu']}" if "gpu" in machine else "")),
            ("versions", versions),
            ("perplexity", head["perplexity"][-1]["protocol"]),
            ("passkey", "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in passkey.items())),
            ("seeds", f"{', '.join(map(str, sorted({r['seed'] for r in records if r['seed'] is not None})))}: LoRA's "
                      "start, dropout, order of the rows; mean ± half of the 95% interval (Student's t)"),
        ]  # fmt: skip
    rows += [("cells", f"{len(cells) - num_missing} of {len(cells)} measured")]
    lines = [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def table(suite: Suite, figures: Figures) -> str:
    """Rows of the suite with their columns, and the paper's beside."""
    columns = figures.columns(suite.columns)
    beside = [(f"{source['source'].split(' (')[0]}: {head}", source["rows"], index)
              for source in suite.paper for index, head in enumerate(source["columns"])]  # fmt: skip
    lines = []
    for row in suite.rows:
        if row.name not in figures.by_row:
            continue
        own = [with_interval(values(row.name), form) for values, form in columns.values()]
        paper = [rows[row.name][index] if row.name in rows else "" for _, rows, index in beside]
        name = f"**{row.name}**" if row.name == suite.recommended else row.name
        lines.append([name, *own, *("" if value is None else value for value in paper)])
    heads = ["", *columns, *(head for head, _, _ in beside)]
    return tabulate(lines, heads, tablefmt="pipe", disable_numparse=True,
                    colalign=["left", *["right"] * (len(heads) - 1)])  # fmt: skip


def depth_table(suite: Suite, figures: Figures) -> list[str]:
    """Passkey accuracy by depth at each length of the suite's column "depths"."""
    if "passkey" not in suite.plots:
        return []
    length, depths = max(figures.passkey_lengths), figures.depths()
    lines = [[row, *(with_interval(figures.passkey(row, length, depth), ".0f") for depth in depths)]
             for row in figures.by_row]  # fmt: skip
    heads = [f"passkey at {length} tokens, %", *(f"depth {percent(depth)}" for depth in depths)]
    return [tabulate(lines, heads, tablefmt="pipe", disable_numparse=True,
                     colalign=["left", *["right"] * len(depths)])]  # fmt: skip


def draw_plots(suite: Suite, scale: Scale, figures: Figures, folder: Path, stem: str) -> list[str]:
    """Draw the suite's plots; returns them as lines of markdown."""
    panels = {}
    for row in suite.rows:
        if row.name in figures.by_row and (not suite.plot_rows or row.name in suite.plot_rows):
            panels.setdefault(row.panel, []).append(row.name)
    lines = []
    for plot in suite.plots if panels else ():
        path = folder / f"{stem}-{plot}.png"
        PLOTS[plot](suite, scale, figures, panels, path)
        lines.append(f"![{PLOT_WORDS[plot]}]({path.name})")
    return lines


def short_name(row: str, panel: str) -> str:
    return row.removeprefix(f"{panel}, ") if panel else row


def plot_perplexity(suite: Suite, scale: Scale, figures: Figures, panels: Mapping, path: Path) -> None:
    with new_figure(path, len(panels)) as axes:
        for axis, (panel, rows) in zip(axes, panels.items(), strict=True):
            curves = {short_name(row, panel): [(length, fmean(values)) for length in figures.lengths
                                               if (values := figures.perplexity(row, length))]
                      for row in rows}  # fmt: skip
            draw_perplexity(axis, curves, original_length=scale.context)
            axis.set_title(panel)


def plot_position(suite: Suite, scale: Scale, figures: Figures, panels: Mapping, path: Path) -> None:
    """Of the first seed of each row."""
    with new_figure(path, len(panels)) as axes:
        for axis, (panel, rows) in zip(axes, panels.items(), strict=True):
            curves = {short_name(row, panel): next(result["loss_by_position"]
                                                   for result in figures.by_row[row][0]["perplexity"]
                                                   if result["seq_len"] == figures.target)
                      for row in rows}  # fmt: skip
            draw_loss_by_position(axis, curves, original_length=scale.context)
            axis.set_title(panel)


def plot_passkey(suite: Suite, scale: Scale, figures: Figures, panels: Mapping, path: Path) -> None:
    grids = {}
    for row in (row for rows in panels.values() for row in rows):
        places = [cell for record in figures.by_row[row] for cell in record["passkey"]["cells"]]
        grids[row] = [{"length": length, "depth": depth, "accuracy": fmean(x["accuracy"] for x in own)}
                      for (length, depth), own in grouped(places, "length", "depth").items()]  # fmt: skip
    plot_heatmap(grids, path, label=PLOT_WORDS["passkey"])


def plot_cost(suite: Suite, scale: Scale, figures: Figures, panels: Mapping, path: Path) -> None:
    """A point for each trained row; the edge joins those that nothing cheaper beats."""
    points = {}
    for row in suite.rows:
        flops = figures.values(row.name, "flops") if row.name in figures.by_row else []
        if flops and flops[0] and (values := figures.perplexity(row.name, figures.target)):
            points[row] = (flops[0] / TERA, *mean_interval(values))
    by_cost = sorted(points.values())
    edge = [point for index, point in enumerate(by_cost) if point[1] < min([p[1] for p in by_cost[:index]] or [9e99])]
    with new_figure(path, panel_size=(8, 5.5)) as (axis,):
        names = list(dict.fromkeys(row.panel for row in points))
        for marker, panel in zip(MARKERS * len(names), names, strict=False):
            own = [point for row, point in points.items() if row.panel == panel]
            costs, means, halves = zip(*own, strict=True)
            axis.errorbar(costs, means, [half or 0 for half in halves], marker=marker, linestyle="", capsize=3,
                          label=panel or "other")  # fmt: skip
        axis.step([x for x, _, _ in edge], [y for _, y, _ in edge], where="post", color="0.4", marker="", label="edge")
        by_x = {}
        for row, (x, y, _) in points.items():
            by_x.setdefault(round(x, 4), (short_name(row.name, row.panel), y))
            if row.name == suite.recommended:
                axis.plot([x], [y], marker="o", markersize=18, fillstyle="none", color="black", linestyle="",
                          label=f"recommended: {row.name}")  # fmt: skip
        for x, (name, _) in by_x.items():
            axis.annotate(name, (x, 1.0), xycoords=("data", "axes fraction"), rotation=45, fontsize=7)
        axis.set(xlabel="training FLOPs (10^12)", ylabel=f"perplexity at {figures.target} tokens", yscale="log")
        axis.legend(fontsize="small")


def plot_steps(suite: Suite, scale: Scale, figures: Figures, panels: Mapping, path: Path) -> None:
    with new_figure(path) as (axis,):
        for panel, rows in panels.items():
            points = sorted((fmean(figures.values(row, "training", "num_steps") or [0]),
                             *mean_interval(figures.perplexity(row, figures.target))) for row in rows)  # fmt: skip
            steps, means, halves = zip(*points, strict=True)
            axis.errorbar(steps, means, [half or 0 for half in halves], capsize=3, label=panel or suite.title)
        axis.set(xlabel="optimizer steps", ylabel=f"perplexity at {figures.target} tokens", yscale="log")
        axis.legend(fontsize="small")


PLOTS = {"perplexity": plot_perplexity, "position": plot_position, "passkey": plot_passkey, "cost": plot_cost,
         "steps": plot_steps}  # fmt: skip
