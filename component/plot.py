"""Plots written to image files, without a display; matplotlib is imported when the first is drawn."""

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from longqlora.files import atomic_file

# From this ratio of the largest to the smallest value on, a linear axis hides the small ones.
LOG_RATIO = 20
BINS_PER_DOUBLING = 4
MAX_COLUMNS = 3
MAX_LINES_IN_LEGEND = 5
MAX_MARKERS = 10
# Okabe and Ito's colours, told apart by colour-blind eyes (https://jfly.uni-koeln.de/color/); yellow is lost on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":")


@contextmanager
def new_figure(
    path: str | os.PathLike, num_panels: int = 1, *, panel_size: tuple[float, float] = (6.4, 4.2)
) -> Iterator[Sequence]:
    """The axes of panels in rows of three, saved as `path` once they are drawn; `panel_size` is in inches.

    Curves get colours and markers of their own in turn, and from the eighth on another kind of line.
    """
    from matplotlib.figure import Figure

    num_columns = min(MAX_COLUMNS, num_panels)
    num_rows = math.ceil(num_panels / num_columns)
    width, height = panel_size
    figure = Figure(figsize=(num_columns * width, num_rows * height), dpi=120, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flat
    num_lines = len(LINES)
    styles = {"color": COLOURS * num_lines, "marker": MARKERS * num_lines, "linestyle": np.repeat(LINES, len(COLOURS))}
    for axis in axes[:num_panels]:
        axis.grid(alpha=0.3)
        axis.set_prop_cycle(**styles)
    for axis in axes[num_panels:]:
        axis.set_axis_off()
    yield axes[:num_panels]
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format=Path(path).suffix.lstrip(".").lower() or "png")


def mark_lengths(axis, lengths: Sequence[int]) -> None:
    """Make the x axis one of lengths in tokens: logarithmic, with a tick for each."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.minorticks_off()


def mark_original_length(axis, original_length: int | None) -> None:
    """A dotted line at the length of pretraining, where it is known and lies within what was drawn."""
    longest = max((max(line.get_xdata(), default=0) for line in axis.lines), default=0)
    if original_length and original_length <= longest:
        label = f"original length ({original_length})"
        axis.axvline(original_length, color="0.4", linestyle=":", marker="", label=label)


def draw_curve(axis, label: str, points: Sequence[tuple[float, float | None]], *, is_thin: bool) -> list[float]:
    """One curve through the points (x, y), of which None, inf and nan are left out; returns the values drawn."""
    finite = sorted((x, value) for x, value in points if value is not None and math.isfinite(value))
    values = [value for _, value in finite]
    width, size = (0.8, 3) if is_thin else (1.8, 5)
    # Few markers on a long curve, and on other points than its neighbours': curves that coincide are told apart.
    step = max(1, len(finite) // MAX_MARKERS)
    marks = {"markersize": size, "markevery": (len(axis.lines) % step, step)}
    axis.plot([x for x, _ in finite], values, label=label, linewidth=width, **marks)
    return values


def draw_legend(axis) -> None:
    """Within the axes, or beside them where it would cover curves."""
    is_long = len(axis.get_lines()) > MAX_LINES_IN_LEGEND
    axis.legend(fontsize="small", **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if is_long else {}))


def draw_perplexity(
    axis,
    curves: Mapping[str, Sequence[tuple[int, float | None]]],
    *,
    original_length: int | None = None,
    thin: Collection[str] = (),
) -> None:
    """curves: label -> points (window length, perplexity); None and inf are left out. thin: labels of thin lines."""
    drawn = [v for label, points in curves.items() for v in draw_curve(axis, label, points, is_thin=label in thin)]
    if drawn and max(drawn) > LOG_RATIO * min(drawn):
        axis.set_yscale("log")
    mark_lengths(axis, sorted({length for points in curves.values() for length, _ in points}))
    mark_original_length(axis, original_length)
    axis.set(xlabel="window length (tokens)", ylabel="perplexity")
    draw_legend(axis)


def draw_loss_by_position(
    axis, curves: Mapping[str, Sequence[Mapping]], *, original_length: int | None = None, thin: Collection[str] = ()
) -> None:
    """curves: label -> blocks {"start", "end", "loss"} (end exclusive), as evaluation reports them. thin: as above."""
    for label, blocks in curves.items():
        points = [((block["start"] + block["end"] - 1) / 2, block["loss"]) for block in blocks]
        draw_curve(axis, label, points, is_thin=label in thin)
    mark_original_length(axis, original_length)
    axis.set(xlabel="position in the window (tokens)", ylabel="loss (nats per token)")
    draw_legend(axis)


def plot_evaluation(
    results: Sequence[Mapping], label: str, path: str | os.PathLike, *, original_length: int | None = None
) -> None:
    """Both for the `results` of one evaluation: perplexity by length beside loss by position."""
    perplexity = {label: [(result["seq_len"], result["perplexity"]) for result in results]}
    by_position = {f"{result['seq_len']} tokens": result["loss_by_position"] for result in results}
    with new_figure(path, 2) as (left, right):
        draw_perplexity(left, perplexity, original_length=original_length)
        draw_loss_by_position(right, by_position, original_length=original_length)


def plot_loss_curve(steps: Sequence[float], losses: Sequence[float], path: str | os.PathLike) -> None:
    with new_figure(path) as (axis,):
        axis.plot(steps, losses, marker="")
        axis.set(xlabel="step", ylabel="training loss (nats per token)")


def plot_length_histogram(lengths: Sequence[int], path: str | os.PathLike) -> None:
    """Documents by length in tokens, on a logarithmic length axis."""
    first, last = (math.floor(math.log2(max(1, length))) for length in (min(lengths), max(lengths)))
    with new_figure(path) as (axis,):
        axis.hist(lengths, bins=np.logspace(first, last + 1, (last + 1 - first) * BINS_PER_DOUBLING + 1, base=2))
        axis.set_xscale("log", base=2)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set(xlabel="document length (tokens)", ylabel="documents")
