"""Heat map of scores by prompt length and depth: one panel, or several with a shared scale."""

import math
import os
from collections.abc import Mapping, Sequence

from longqlora.evaluation.retrieval.grid import percent
from longqlora.files import atomic_file

# From dark to light for every reader; no red against green.
COLOUR_MAP = "viridis"
# Above this value cells are light, and their text has to be dark.
LIGHT_FROM = 0.6
MAX_COLUMNS = 3
# More cells than this in a row or column leave no room for a value in each.
MAX_CELLS_WITH_TEXT = 24


def plot_heatmap(
    panels: Mapping[str, Sequence[Mapping]],
    path: str | os.PathLike,
    *,
    value: str = "accuracy",
    label: str | None = None,
) -> None:
    """Draw a panel for each title -> cells {"length", "depth", `value`}: length on x, depth downwards on y.

    value: name of what a cell shows, between 0 and 1; None and NaN stay white, as do pairs without a cell.
    label: of the colour bar (default: the name). Panels stand side by side, in rows of three.
    Raises ValueError where there is nothing to draw; the file appears whole or not at all.
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
    image = None
    for number, axis in enumerate(axes.flat):
        if number >= len(panels):
            axis.set_axis_off()
            continue
        title, cells = list(panels.items())[number]
        # Dollar signs would start a formula.
        axis.set_title(title.replace("$", r"\$"), fontsize=10)
        image = _draw_panel(axis, cells, value)
    figure.colorbar(image, ax=axes, label=label or value, shrink=0.9)
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format=os.path.splitext(path)[1].lstrip(".").lower() or "png")


def _draw_panel(axis, cells: Sequence[Mapping], value: str):
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    grid = [[math.nan] * max(1, len(lengths)) for _ in range(max(1, len(depths)))]
    for cell in cells:
        if cell[value] is not None:
            grid[depths.index(cell["depth"])][lengths.index(cell["length"])] = cell[value]
    image = axis.imshow(grid, vmin=0, vmax=1, cmap=COLOUR_MAP, aspect="auto")
    if max(len(lengths), len(depths)) <= MAX_CELLS_WITH_TEXT:
        for row, scores in enumerate(grid):
            for column, score in enumerate(scores):
                if math.isfinite(score):
                    colour = "black" if score > LIGHT_FROM else "white"
                    axis.text(column, row, f"{score:.2f}", ha="center", va="center", color=colour, fontsize=8)
    rotation = 45 if len(lengths) > 4 else 0
    axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=rotation)
    axis.set_yticks(range(len(depths)), [percent(depth) for depth in depths])
    axis.set_xlabel("prompt length (tokens)")
    axis.set_ylabel("depth of the needle")
    return image
