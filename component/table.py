"""Text tables for the terminal, by `tabulate`: a header line, two spaces between columns."""

from collections.abc import Sequence

from tabulate import tabulate


def text_table(header: Sequence[object], rows: Sequence[Sequence], *, digits: int = 2, num_left: int = 1) -> str:
    """Rows under `header`. Floats get `digits` decimals, None is a dash; all but `num_left` columns align right."""

    def shown(cell: object) -> str:
        return "-" if cell is None else f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)

    aligned = ["left" if column < num_left else "right" for column in range(len(header))]
    lines = [list(map(shown, row)) for row in (header, *rows)]
    # tabulate would read "1e3" as a number, and make a column of headers=... two characters wider.
    return tabulate(lines, tablefmt="plain", colalign=aligned, disable_numparse=True)
