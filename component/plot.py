"""Plots written to image files, without a display; matplotlib is imported when the first is drawn."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from longqlora.files import atomic_file

# From this ratio of the largest to the smallest value on, a linear axis hides the small ones.
LOG_RATIO = 20
BINS_PER_DOUBLING = 4
MAX_COLUMNS = 3


@contextmanager
def new_figure(
    path: str | os.PathLike, num_panels: int = 1, *, panel_size: tuple[float, float] = (6.4, 4.2)
) -> Iterator[Sequence]:
    """The axes of panels in rows of three, saved as `path` once they are drawn; `panel_size` is in inches."""
    from matplotlib.figure import Figure

    num_columns = min(MAX_COLUMNS, num_panels)
    num_rows = math.ceil(num_panels / num_columns)
    width, height = panel_size
    figure = Figure(figsize=(num_columns * width, num_rows * height), dpi=120, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for axis in axes[:num_panels]:
        axis.grid(alpha=0.3)
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


def draw_perplexity(axis, curves: Mapping[str, Sequence[tuple[int, float | None]]]) -> None:
    """curves: label -> points (window length, perplexity); None and inf are left out."""
    drawn = []
    for label, points in curves.items():
        finite = sorted((length, value) for length, value in points if value is not None and math.isfinite(value))
        drawn += [value for _, value in finite]
        axis.plot([length for length, _ in finite], [value for _, value in finite], marker="o", label=label)
    if drawn and max(drawn) > LOG_RATIO * min(drawn):
        axis.set_yscale("log")
    mark_lengths(axis, sorted({length for points in curves.values() for length, _ in points}))
    axis.set(xlabel="window length (tokens)", ylabel="perplexity")
    axis.legend()


def draw_loss_by_position(axis, curves: Mapping[str, Sequence[Mapping]]) -> None:
    """curves: label -> blocks {"start", "end", "loss"} (end exclusive), as evaluation reports them."""
    for label, blocks in curves.items():
        finite = [block for block in blocks if block["loss"] is not None and math.isfinite(block["loss"])]
        centers = [(block["start"] + block["end"] - 1) / 2 for block in finite]
        axis.plot(centers, [block["loss"] for block in finite], marker=".", label=label)
    axis.set(xlabel="position in the window (tokens)", ylabel="loss (nats per token)")
    axis.legend()


def plot_evaluation(results: Sequence[Mapping], label: str, path: str | os.PathLike) -> None:
    """Both for the `results` of one evaluation: perplexity by length beside loss by position."""
    with new_figure(path, 2) as (left, right):
        draw_perplexity(left, {label: [(result["seq_len"], result["perplexity"]) for result in results]})
        draw_loss_by_position(right, {f"{result['seq_len']} tokens": result["loss_by_position"] for result in results})


def plot_loss_curve(steps: Sequence[float], losses: Sequence[float], path: str | os.PathLike) -> None:
    with new_figure(path) as (axis,):
        axis.plot(steps, losses)
        axis.set(xlabel="step", ylabel="training loss (nats per token)")


def plot_length_histogram(lengths: Sequence[int], path: str | os.PathLike) -> None:
    """Documents by length in tokens, on a logarithmic length axis."""
    first, last = (math.floor(math.log2(max(1, length))) for length in (min(lengths), max(lengths)))
    with new_figure(path) as (axis,):
        axis.hist(lengths, bins=np.logspace(first, last + 1, (last + 1 - first) * BINS_PER_DOUBLING + 1, base=2))
        axis.set_xscale("log", base=2)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set(xlabel="document length (tokens)", ylabel="documents")
