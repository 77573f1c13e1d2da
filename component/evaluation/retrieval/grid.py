"""A grid of prompt lengths and depths, as passkey and needle tests share it: arguments, checks, table, heat map."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longqlora.evaluation.frame import ModelSource, Task, check_lengths
from longqlora.plot import save_figure
from longqlora.table import text_table

DEFAULT_NUM_DEPTHS = 5
# From dark to light for every reader; no red against green.
COLOUR_MAP = "viridis"
# Above this value cells are light, and their text has to be dark.
LIGHT_FROM = 0.6
MAX_COLUMNS = 3
# More cells than this in a row or column leave no room for a value in each.
MAX_CELLS_WITH_TEXT = 24


def add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("grid")
    group.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="prompt lengths in tokens (default: a "
                       "quarter, a half and all of the model's context)")  # fmt: skip
    depths = group.add_mutually_exclusive_group()
    depths.add_argument("--depths", type=float, nargs="+", metavar="DEPTH", help="where the needle lies, from 0 "
                        "(start) to 1 (end)")  # fmt: skip
    depths.add_argument("--num_depths", type=int, default=DEFAULT_NUM_DEPTHS, help="that many depths, spread evenly "
                        "from 0 to 1, instead of --depths (default: %(default)s)")  # fmt: skip


def grid_depths(args: argparse.Namespace) -> Sequence[float]:
    return even_depths(args.num_depths) if args.depths is None else args.depths


@dataclass
class GridTask(Task):
    """A task whose record has "cells": {"length", "depth", `value`}.

    lengths: of prompts in tokens; None for those that suit the context. depths: 0 (start) to 1 (end). value: name of a
    cell's score, between 0 and 1. label: of the heat map's colours.
    """

    lengths: Sequence[int] | None
    depths: Sequence[float]
    value = label = ""

    def __post_init__(self) -> None:
        lengths = [1] if self.lengths is None else self.lengths
        if not lengths or not self.depths:
            raise ValueError("give at least one length (--lengths) and one depth (--depths)")
        check_lengths(lengths)
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"--depths: must be between 0 (start) and 1 (end), got {depth}")

    def cells_for(self, source: ModelSource) -> list[dict]:
        """Every {"length", "depth"} once; warns of lengths beyond the model's context."""
        size = source.context_size
        cells = grid_cells(self.lengths or [size // 4, size // 2, size], self.depths)
        source.warn_beyond_context(list(dict.fromkeys(cell["length"] for cell in cells)))
        return cells

    def table(self, record: Mapping) -> str:
        return grid_table(record["cells"], self.value)

    def plot(self, record: Mapping, name: str, path: str) -> None:
        plot_heatmap({name: record["cells"]}, path, value=self.value, label=self.label)


def grid_cells(lengths: Sequence[int], depths: Sequence[float]) -> list[dict]:
    """{"length", "depth"} of every pair, each once."""
    pairs = [(length, float(depth)) for length in lengths for depth in depths]
    return [{"length": length, "depth": depth} for length, depth in dict.fromkeys(pairs)]


def even_depths(num_depths: int) -> list[float]:
    """`num_depths` depths spread evenly from 0 to 1; a single one lies in the middle."""
    if num_depths < 1:
        raise ValueError(f"--num_depths: must be at least 1, got {num_depths}")
    return [round(index / (num_depths - 1), 4) for index in range(num_depths)] if num_depths > 1 else [0.5]


def percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"


def by_place(cells: Sequence[Mapping], value: str) -> tuple[list[int], list[float], dict]:
    """Lengths, depths and {(length, depth): value} of cells."""
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("length", "depth"))
    return lengths, depths, {(cell["length"], cell["depth"]): cell[value] for cell in cells}


def grid_table(cells: Sequence[Mapping], value: str) -> str:
    """The cells' `value` in percent: a row for each depth, a column for each length, means; no cell is a dash."""
    lengths, depths, found = by_place(cells, value)
    rows = [[percent(depth), *(100 * found[at] if (at := (length, depth)) in found else None for length in lengths)]
            for depth in depths]  # fmt: skip
    columns = [[cell[value] for cell in cells if cell["length"] == length] for length in lengths]
    rows.append(["mean", *(100 * sum(values) / len(values) for values in columns)])
    return text_table(["depth", *lengths], rows, digits=1, num_left=0)


def plot_heatmap(
    panels: Mapping[str, Sequence[Mapping]],
    path: str | os.PathLike,
    *,
    value: str = "accuracy",
    label: str | None = None,
) -> None:
    """Draw a panel for each title -> cells {"length", "depth", `value`}: length on x, depth downwards on y.

    value: name of what a cell shows, between 0 and 1; None stays white, as does a pair without a cell. label: of the
    colour bar (default: the name). Panels stand side by side, in rows of three. Raises ValueError without any cell.
    """
    from matplotlib.figure import Figure

    if not any(panels.values()):
        raise ValueError("there are no cells to draw")
    num_columns = min(MAX_COLUMNS, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    widest = max(len({cell["length"] for cell in cells}) for cells in panels.values())
    highest = max(len({cell["depth"] for cell in cells}) for cells in panels.values())
    size = (num_columns * max(3.2, 1.6 + 0.52 * widest) + 1.0, num_rows * max(2.6, 1.4 + 0.3 * highest))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for axis, (title, cells) in zip(axes.flat, panels.items(), strict=False):
        # Dollar signs would start a formula.
        axis.set_title(title.replace("$", r"\$"), fontsize=10)
        image = draw_panel(axis, *by_place(cells, value))
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label=label or value, shrink=0.9)
    save_figure(figure, path)


def draw_panel(axis, lengths: Sequence[int], depths: Sequence[float], found: Mapping):
    grid = [[found.get((length, depth)) for length in lengths] or [None] for depth in depths] or [[None]]
    image = axis.imshow([[math.nan if score is None else score for score in row] for row in grid],
                        vmin=0, vmax=1, cmap=COLOUR_MAP, aspect="auto")  # fmt: skip
    places = [(column, row, score) for row, scores in enumerate(grid) for column, score in enumerate(scores)]
    for column, row, score in places if max(len(lengths), len(depths)) <= MAX_CELLS_WITH_TEXT else []:
        if score is not None:
            colour = "black" if score > LIGHT_FROM else "white"
            axis.text(column, row, f"{score:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45 if len(lengths) > 4 else 0)
    axis.set_yticks(range(len(depths)), [percent(depth) for depth in depths])
    axis.set_xlabel("prompt length (tokens)")
    axis.set_ylabel("depth of the needle")
    return image
