"""A grid of prompt lengths and depths, as passkey and needle tests share it: arguments, checks, table, heat map."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from longqlora.evaluation.frame import ModelSource, Task, check_at_least
from longqlora.plot import new_figure
from longqlora.table import text_table

DEFAULT_NUM_DEPTHS = 5
# From dark to light for every reader; no red against green.
COLOUR_MAP = "viridis"
# Above this value cells are light, and their text has to be dark.
LIGHT_FROM = 0.6
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


@dataclass
class GridTask(Task):
    """A task whose record has "cells": {"length", "depth", `value`}, one for each length and depth.

    lengths: of prompts in tokens; None for those that suit the context. depths: 0 (start) to 1 (end); None for
    `num_depths` of them, spread evenly. value: name of a cell's score, between 0 and 1. label: of the colour bar.
    """

    lengths: Sequence[int] | None
    depths: Sequence[float] | None
    num_depths: int = field(default=DEFAULT_NUM_DEPTHS, kw_only=True)
    value = label = ""

    def __post_init__(self) -> None:
        check_at_least(self, lengths=1, num_depths=1)
        if self.depths is None:
            self.depths = even_depths(self.num_depths)
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"--depths: must be between 0 (start) and 1 (end), got {depth}")

    def set_lengths(self, source: ModelSource) -> None:
        """Take lengths that suit the context of `source` where none were given; warn of those beyond it."""
        size = source.context_size
        self.lengths = list(dict.fromkeys(self.lengths or [size // 4, size // 2, size]))
        source.warn_beyond_context(self.lengths)

    def cells(self) -> list[dict]:
        """{"length", "depth"} of every pair, each once."""
        pairs = dict.fromkeys(product(self.lengths, map(float, self.depths)))
        return [{"length": length, "depth": depth} for length, depth in pairs]

    def table(self, record: Mapping) -> str:
        return grid_table(record["cells"], self.value)

    def plot(self, record: Mapping, name: str, path: str) -> None:
        plot_heatmap({name: record["cells"]}, path, value=self.value, label=self.label)


def even_depths(num_depths: int) -> list[float]:
    """`num_depths` depths spread evenly from 0 to 1; a single one lies in the middle."""
    return [round(index / (num_depths - 1), 4) for index in range(num_depths)] if num_depths > 1 else [0.5]


def percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"


def by_place(cells: Sequence[Mapping], value: str) -> tuple[list[int], list[float], list[list[float]]]:
    """Lengths, depths and their cells' `value`, a list for each depth, of cells that fill a grid."""
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("length", "depth"))
    found = {(cell["length"], cell["depth"]): cell[value] for cell in cells}
    return lengths, depths, [[found[length, depth] for length in lengths] for depth in depths]


def grid_table(cells: Sequence[Mapping], value: str) -> str:
    """The cells' `value` in percent: a row for each depth, a column for each length, and the means of columns."""
    lengths, depths, scores = by_place(cells, value)
    means = [sum(column) / len(column) for column in zip(*scores, strict=True)]
    rows = zip([*map(percent, depths), "mean"], [*scores, means], strict=True)
    rows = [[name, *(100 * score for score in row)] for name, row in rows]
    return text_table(["depth", *lengths], rows, digits=1, num_left=0)


def plot_heatmap(
    panels: Mapping[str, Sequence[Mapping]], path: str | os.PathLike, *, value: str = "accuracy", label: str
) -> None:
    """Draw a panel for each title -> cells {"length", "depth", `value` (0 .. 1)}: length on x, depth downwards on y."""
    grids = {title: by_place(cells, value) for title, cells in panels.items()}
    widest = max(len(lengths) for lengths, _, _ in grids.values())
    highest = max(len(depths) for _, depths, _ in grids.values())
    size = (max(3.2, 1.6 + 0.52 * widest), max(2.6, 1.4 + 0.3 * highest))
    with new_figure(path, len(panels), panel_size=size) as axes:
        figure = axes[0].figure
        # The colour bar's inch.
        figure.set_figwidth(figure.get_figwidth() + 1.0)
        for axis, (title, grid) in zip(axes, grids.items(), strict=True):
            # Dollar signs would start a formula.
            axis.set_title(title.replace("$", r"\$"), fontsize=10)
            image = draw_panel(axis, *grid)
        figure.colorbar(image, ax=figure.axes, label=label, shrink=0.9)


def draw_panel(axis, lengths: Sequence[int], depths: Sequence[float], scores: Sequence[Sequence[float]]):
    axis.grid(visible=False)
    image = axis.imshow(scores, vmin=0, vmax=1, cmap=COLOUR_MAP, aspect="auto")
    if max(len(lengths), len(depths)) <= MAX_CELLS_WITH_TEXT:
        for row, values in enumerate(scores):
            for column, score in enumerate(values):
                colour = "black" if score > LIGHT_FROM else "white"
                axis.text(column, row, f"{score:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45 if len(lengths) > 4 else 0)
    axis.set_yticks(range(len(depths)), [percent(depth) for depth in depths])
    axis.set_xlabel("prompt length (tokens)")
    axis.set_ylabel("depth of the needle")
    return image
