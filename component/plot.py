"""Plots written to image files, without a display: perplexity, loss by position, training loss, lengths.

matplotlib is needed only here; `require_matplotlib` tells so before long work begins.
"""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from longqlora.files import atomic_file

FORMATS = (".png", ".pdf", ".svg")
# From this ratio of the largest to the smallest value on, a linear axis hides the small ones.
LOG_RATIO = 20


def require_matplotlib(path: str | os.PathLike, flag: str = "--plot") -> Path:
    """Return `path` if a plot can be written there; `ValueError` with the fix otherwise."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{flag}: {str(path)!r} must end in one of {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{flag} needs matplotlib: pip install matplotlib")
    return path


def new_figure(num_panels: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * num_panels, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, num_panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def save_figure(figure, path: str | os.PathLike) -> None:
    # Agg is the canvas of a bare Figure: no display is ever opened.
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format=Path(path).suffix.lstrip(".").lower() or "png")


def _draw_perplexity(axis, curves: Mapping[str, Sequence[tuple[int, float | None]]]) -> None:
    drawn = []
    for label, points in curves.items():
        finite = sorted((length, value) for length, value in points if value is not None and math.isfinite(value))
        drawn += [value for _, value in finite]
        axis.plot([length for length, _ in finite], [value for _, value in finite], marker="o", label=label)
    if drawn and max(drawn) > LOG_RATIO * min(drawn):
        axis.set_yscale("log")
    lengths = sorted({length for points in curves.values() for length, _ in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.minorticks_off()
    axis.set_xlabel("window length (tokens)")
    axis.set_ylabel("perplexity")
    axis.legend()


def _draw_loss_by_position(axis, curves: Mapping[str, Sequence[Mapping]]) -> None:
    for label, blocks in curves.items():
        finite = [block for block in blocks if block["loss"] is not None and math.isfinite(block["loss"])]
        centers = [(block["start"] + block["end"] - 1) / 2 for block in finite]
        axis.plot(centers, [block["loss"] for block in finite], marker=".", label=label)
    axis.set_xlabel("position in the window (tokens)")
    axis.set_ylabel("loss (nats per token)")
    axis.legend()


def plot_perplexity(curves: Mapping[str, Sequence[tuple[int, float | None]]], path: str | os.PathLike) -> None:
    """Perplexity against window length: label -> [(seq_len, perplexity)]; None and inf are left out."""
    figure, (axis,) = new_figure()
    _draw_perplexity(axis, curves)
    save_figure(figure, path)


def plot_loss_by_position(curves: Mapping[str, Sequence[Mapping]], path: str | os.PathLike) -> None:
    """Loss against position: label -> blocks {"start", "end", "loss"} (end exclusive), as evaluation reports them."""
    figure, (axis,) = new_figure()
    _draw_loss_by_position(axis, curves)
    save_figure(figure, path)


def plot_evaluation(results: Sequence[Mapping], label: str, path: str | os.PathLike) -> None:
    """Both for the `results` of one evaluation: perplexity by length beside loss by position."""
    figure, (left, right) = new_figure(2)
    _draw_perplexity(left, {label: [(result["seq_len"], result["perplexity"]) for result in results]})
    _draw_loss_by_position(right, {f"{result['seq_len']} tokens": result["loss_by_position"] for result in results})
    save_figure(figure, path)


def plot_loss_curve(steps: Sequence[float], losses: Sequence[float], path: str | os.PathLike) -> None:
    """Training loss (nats per token) against optimizer step."""
    figure, (axis,) = new_figure()
    axis.plot(steps, losses)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss (nats per token)")
    save_figure(figure, path)


def plot_length_histogram(lengths: Sequence[int], path: str | os.PathLike) -> None:
    """Documents by length in tokens, on a logarithmic length axis."""
    figure, (axis,) = new_figure()
    first, last = math.floor(math.log2(max(1, min(lengths)))), math.floor(math.log2(max(1, max(lengths)))) + 1
    bins_per_doubling = 4
    num_bins = (last - first) * bins_per_doubling
    edges = [2 ** (first + index / bins_per_doubling) for index in range(num_bins + 1)]
    axis.hist(lengths, bins=edges)
    axis.set_xscale("log", base=2)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("document length (tokens)")
    axis.set_ylabel("documents")
    save_figure(figure, path)
