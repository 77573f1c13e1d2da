"""A grid of prompt lengths and depths, as passkey and needle tests share it: arguments, checks, table."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

DEFAULT_NUM_DEPTHS = 5


def add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    """Lengths, depths and outputs of a retrieval test."""
    group = parser.add_argument_group("grid")
    group.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="prompt lengths in tokens (default: a "
                       "quarter, a half and all of the model's context)")  # fmt: skip
    depths = group.add_mutually_exclusive_group()
    depths.add_argument("--depths", type=float, nargs="+", metavar="DEPTH", help="where the needle lies, from 0 "
                        "(start) to 1 (end)")  # fmt: skip
    depths.add_argument("--num_depths", type=int, default=DEFAULT_NUM_DEPTHS, help="that many depths, spread evenly "
                        "from 0 to 1, instead of --depths (default: %(default)s)")  # fmt: skip
    group.add_argument("--output_file", type=Path, help="JSON file for the results; also makes the run resumable")
    group.add_argument("--plot", help="image (.png, .pdf or .svg) of the results by length and depth")


def grid_depths(args: argparse.Namespace) -> list[float]:
    """The depths that were asked for, each once; checks them and the lengths. Raises ValueError."""
    depths = even_depths(args.num_depths) if args.depths is None else list(dict.fromkeys(args.depths))
    check_grid([1] if args.lengths is None else args.lengths, depths)
    return depths


def grid_lengths(args: argparse.Namespace, context_size: int) -> list[int]:
    """The lengths that were asked for, each once, or those that suit the context (tokens)."""
    lengths = args.lengths or [context_size // 4, context_size // 2, context_size]
    return list(dict.fromkeys(lengths))


def check_grid(lengths: Sequence[int], depths: Sequence[float]) -> None:
    """Raise ValueError unless there are lengths of at least 1 token and depths between 0 and 1."""
    if not lengths or not depths:
        raise ValueError("give at least one length (--lengths) and one depth (--depths)")
    if min(lengths) < 1:
        raise ValueError(f"--lengths: must be at least 1 token, got {min(lengths)}")
    for depth in depths:
        if not (math.isfinite(depth) and 0 <= depth <= 1):
            raise ValueError(f"--depths: must be between 0 (start) and 1 (end), got {depth}")


def even_depths(num_depths: int) -> list[float]:
    """`num_depths` depths spread evenly from 0 to 1; a single one lies in the middle."""
    if num_depths < 1:
        raise ValueError(f"--num_depths: must be at least 1, got {num_depths}")
    return [round(index / (num_depths - 1), 4) for index in range(num_depths)] if num_depths > 1 else [0.5]


def context_warnings(lengths: Sequence[int], context_size: float) -> list[str]:
    """A line for each length that is beyond the model's context; both in tokens."""
    return [
        f"warning: length {length} is beyond the model's context of {context_size} tokens"
        for length in lengths
        if length > context_size
    ]


def percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"


def grid_table(cells: Sequence[Mapping], value: str) -> str:
    """Text table of the cells' `value` (0 .. 1) in percent: a row for each depth, a column for each length, means.

    cells: {"length", "depth", `value`}; a pair without a cell is a dash.
    """
    lengths = sorted({cell["length"] for cell in cells})
    by_place = {(cell["length"], cell["depth"]): cell[value] for cell in cells}
    rows = [["depth", *map(str, lengths)]]
    for depth in sorted({cell["depth"] for cell in cells}):
        values = [by_place.get((length, depth)) for length in lengths]
        rows.append([percent(depth), *("-" if found is None else f"{100 * found:.1f}" for found in values)])
    columns = [[cell[value] for cell in cells if cell["length"] == length] for length in lengths]
    rows.append(["mean", *(f"{100 * sum(values) / len(values):.1f}" for values in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.rjust(size) for text, size in zip(row, widths, strict=True)) for row in rows)
