"""Rows of results: in groups, and as tables for the terminal and for pages."""

from collections.abc import Mapping, Sequence

from tabulate import tabulate


def grouped(rows: Sequence[Mapping], *names: str) -> dict[tuple, list[Mapping]]:
    """The rows by their values of `names`, in order of appearance."""
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def text_table(header: Sequence[object], rows: Sequence[Sequence], *, digits: int = 2, num_left: int = 1) -> str:
    """Rows under `header`, all columns but `num_left` aligned right, floats with `digits` decimals, None as a dash."""

    def shown(cell: object) -> str:
        return "-" if cell is None else f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)

    aligned = ["left" if column < num_left else "right" for column in range(len(header))]
    lines = [list(map(shown, row)) for row in (header, *rows)]
    # tabulate would read "1e3" as a number, and make a column of headers=... two characters wider.
    return tabulate(lines, tablefmt="plain", colalign=aligned, disable_numparse=True)


def page_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of a page, without the spaces in which tabulate would drown a long cell's neighbours."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
