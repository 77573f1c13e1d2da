"""Draw docs/rooms.svg, the rooms of component/ and who imports whom, from the imports themselves.

    python docs/draw_rooms.py [--check]

A box is a room with its files, the lowest at the bottom. An arc on the right is an import from a room into a lower
one, as wide as the number of its import lines. --check fails if the picture on disk is not the one that would be drawn.
"""

import argparse
import ast
import runpy
import sys
from collections import Counter
from html import escape
from itertools import cycle
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
LIBRARY = REPO / "component"
PICTURE = REPO / "docs" / "rooms.svg"
# The order of the rooms, from the test that enforces it. GROUND: files in no room; every room may import them, so no
# arc says so.
ARCHITECTURE = runpy.run_path(str(REPO / "tests" / "test_architecture.py"))
ROOMS, GROUND, room_of = ARCHITECTURE["ROOMS"], ARCHITECTURE["GROUND"], ARCHITECTURE["room_of"]
COLOURS = ("#5b6770", "#8a6d3b", "#b5453c", "#2f6f9f", "#6b4fa0", "#3d8b5a", "#a85c9c", "#2e8f8f", "#b8792a")
WIDTH, BOX, LINE, GAP = 1000, 690, 17, 12
CHARACTERS_PER_LINE = 96


def arrows() -> Counter[tuple[str, str]]:
    """Number of import lines, also inside functions, from each room into each other."""
    found: Counter[tuple[str, str]] = Counter()
    for path in sorted(LIBRARY.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longqlora."):
                room = node.module.split(".")[1]
                target = room if (LIBRARY / room).is_dir() else GROUND
                found[room_of(path), target] += target != room_of(path)
    return found


def purpose_of(room: str) -> str:
    """The docstring of a room's package."""
    package = LIBRARY if room == GROUND else LIBRARY / room
    return (ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or "").split("\n")[0]


def files_of(room: str) -> list[str]:
    """Lines of file names, folders within the room as `folder/: name name`."""
    package = LIBRARY if room == GROUND else LIBRARY / room
    folders = (
        [package]
        if room == GROUND
        else [package, *sorted(p for p in package.iterdir() if (p / "__init__.py").is_file())]
    )
    lines = []
    for folder in folders:
        words = [path.stem for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
        line = "" if folder == package else f"{folder.name}/: "
        for word in words:
            if len(line) + len(word) > CHARACTERS_PER_LINE:
                lines.append(line)
                line = "    "
            line += word + "  "
        lines.append(line)
    return [line.rstrip() for line in lines if line.strip()]


def draw() -> str:
    """The picture as SVG."""
    found = arrows()
    colours = dict(zip(ROOMS, cycle(COLOURS), strict=False))
    parts, middles, y = [], {}, 10
    for room in reversed(ROOMS):
        colour = colours[room]
        lines = files_of(room)
        height = LINE * (len(lines) + 1) + 16
        title = f"{room}/" if room != GROUND else f"{room}/*.py"
        box = f'x="10" y="{y}" width="{BOX}" height="{height}"'
        parts.append(f'<rect {box} rx="6" fill="white" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="22" y="{y + 21}" fill="{colour}"><tspan font-weight="bold" font-size="15">{title}</tspan>'
            f'<tspan dx="12" fill="#222">{escape(purpose_of(room))}</tspan></text>'
        )
        for number, line in enumerate(lines, start=1):
            place = f'x="22" y="{y + 21 + LINE * number}"'
            parts.append(f'<text {place} fill="#555" font-size="12" xml:space="preserve">{escape(line)}</text>')
        middles[room] = y + height / 2
        y += height + GAP
    for (source, target), count in sorted((+found).items()):
        if target == GROUND:
            continue
        start, end = middles[source], middles[target]
        reach = BOX + 50 + 330 * (end - start) / y
        curve = f"M {BOX + 12} {start:.0f} C {reach:.0f} {start:.0f}, {reach:.0f} {end:.0f}, {BOX + 14} {end:.0f}"
        parts.append(
            f'<path d="{curve}" fill="none" marker-end="url(#tip)" '
            f'stroke="{colours[source]}" stroke-opacity="0.55" stroke-width="{1 + count**0.5:.1f}">'
            f"<title>{source} imports from {target} in {count} places</title></path>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" orient="auto" '
        'markerUnits="userSpaceOnUse"><path d="M 0 0 L 8 4 L 0 8 z" fill="#444"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{y}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the picture on disk, write nothing")
    if not parser.parse_args().check:
        PICTURE.write_text(draw(), encoding="utf-8")
    elif PICTURE.read_text(encoding="utf-8") != draw():
        sys.exit("docs/rooms.svg is not the picture of the present imports; run python docs/draw_rooms.py")


if __name__ == "__main__":
    main()
