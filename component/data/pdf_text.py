"""The text of a PDF: lines with their places on the page become paragraphs.

A PDF knows glyphs at positions, neither words nor paragraphs. pypdf gives lines; here the gaps between them make
paragraphs, lines of running text are joined, words cut at a line's end are made whole, and headers, footers and page
numbers that repeat are left out. Scanned pages have no text; nothing here reads images.
"""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from longqlora.cli import require_extra
from longqlora.data.clean_text import clean_text, one_line

# A line that would be this part as long as the longest ones with the next word was broken by the margin, not by the
# author. In a text whose lines are shorter than the second number nothing is running text.
FULL_LINE, MIN_PROSE_LINE = 0.8, 40
# Distance between baselines from which a new paragraph begins: in usual distances, and in font sizes.
PARAGRAPH_GAP, PARAGRAPH_GAP_IN_SIZES = 1.3, 1.9
# Indentation of a first line, in font sizes.
MIN_INDENT, MAX_INDENT = 0.7, 5
NUM_EDGE_LINES, MIN_PAGES_FOR_EDGES, MAX_EDGE_LENGTH = 2, 3, 120
SENTENCE_END = re.compile(r"[.!?:;。！？][\"'”’»)\]]*$")
WORD = re.compile(r"[\w\-]+")
CUT_WORD = re.compile(r"([\w\-]*[^\W\d_])-$")
PAGE_WORD = re.compile(r"\b(page|pages|p|pp|seite|página|pagina|страница)\b", re.I)


@dataclass(frozen=True)
class Line:
    """One line of a page: text, place of its start and size of its font, in points; y grows upward."""

    text: str
    x: float
    y: float
    size: float


def read_pdf(path: Path) -> tuple[str | None, str, int]:
    """Title where the file names one, text and number of pages. Raises ValueError for what cannot be read."""
    require_extra("pypdf", "pypdf")
    from pypdf import errors

    name = repr(str(path))
    # pypdf meets a damaged file with whatever exception its parser runs into.
    try:
        with quiet_pypdf():
            title, pages = read_pages(path)
    except errors.DependencyError:
        raise ValueError(f"{name} is encrypted with AES: pip install cryptography, or save it unencrypted") from None
    except errors.LimitReachedError:
        raise ValueError(f"{name} unpacks to more than is safe to read; split it or print it to a new PDF") from None
    except (errors.FileNotDecryptedError, errors.WrongPasswordError):
        raise ValueError(f"{name} is encrypted; save it without a password") from None
    except OSError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(f"{name} is damaged or no PDF ({what}); get it again or print it to a new PDF") from None
    if not pages:
        raise ValueError(f"{name} is damaged: it has no pages; get it again")
    text = clean_text(join_pages(without_edges(pages)))
    if not text:
        raise ValueError(
            f"{name} holds no text on its {len(pages)} pages, probably scanned images; run OCR on it first "
            "(ocrmypdf, for example)"
        )
    return title, text, len(pages)


@contextmanager
def quiet_pypdf() -> Iterator[None]:
    """Silence the log lines that pypdf writes about each irregularity it copes with."""
    logger = logging.getLogger("pypdf")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_pages(path: Path) -> tuple[str | None, list[list[Line]]]:
    """Title and the lines of every page, with whatever exceptions pypdf raises."""
    from pypdf import PasswordType, PdfReader
    from pypdf.errors import FileNotDecryptedError

    with PdfReader(path) as reader:
        if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
            raise FileNotDecryptedError
        title = reader.metadata.title if reader.metadata else None
        pages = [page_lines(page) for page in reader.pages]
    return (one_line(title) or None) if isinstance(title, str) else None, pages


def page_lines(page: Any) -> list[Line]:
    """Lines of a pypdf page that are not blank, in the order of its content stream."""
    lines: list[Line] = []
    pieces: list[tuple[str, float, float, float]] = []

    def end_line() -> None:
        # A soft hyphen at a line's end is a visible one.
        text = clean_text(re.sub("[\xad\u2010]\\s*$", "-", "".join(piece[0] for piece in pieces))).strip()
        start = next((piece for piece in pieces if piece[0].strip()), None)
        if text and start:
            lines.append(Line(" ".join(text.split()), *start[1:]))
        pieces.clear()

    def visit(text: str, cm: Sequence[float], tm: Sequence[float], font: Any, size: float) -> None:
        x = tm[4] * cm[0] + tm[5] * cm[2] + cm[4]
        y = tm[4] * cm[1] + tm[5] * cm[3] + cm[5]
        scale = (abs(tm[0] * tm[3] - tm[1] * tm[2]) * abs(cm[0] * cm[3] - cm[1] * cm[2])) ** 0.5
        for number, part in enumerate(text.split("\n")):
            if number:
                end_line()
            pieces.append((part, x, y, abs(size) * scale))

    page.extract_text(visitor_text=visit)
    end_line()
    return lines


def without_edges(pages: list[list[Line]]) -> list[list[Line]]:
    """The pages without the lines at top and bottom that repeat on at least half of them, page numbers included.

    A number counts as repeated where it grows with the page. A page that would be left empty keeps its lines.
    """
    if len(pages) < MIN_PAGES_FOR_EDGES:
        return pages
    keys = [[edge_keys(line.text, number) for line in page] for number, page in enumerate(pages)]
    seen = Counter(key for row in keys for key in set().union(*row[:NUM_EDGE_LINES], *row[-NUM_EDGE_LINES:]))
    needed = max(MIN_PAGES_FOR_EDGES, len(pages) / 2)
    repeated = {key for key, count in seen.items() if count >= needed}

    def num_repeated(row: list[set]) -> int:
        edge = row[:NUM_EDGE_LINES]
        return next((index for index, own in enumerate(edge) if not own & repeated), len(edge))

    return [
        page[num_repeated(row) : len(page) - num_repeated(row[::-1])] or page
        for page, row in zip(pages, keys, strict=True)
    ]


def edge_keys(text: str, page_number: int) -> set[tuple[str, int | None]]:
    """What makes lines at the edges of pages equal: their text, or their words and how a number grows with the page.

    A number beside a single word counts only as part of the text, so that "Chapter 3" on the third page stays. A line
    too long for a header has no keys.
    """
    if len(text) > MAX_EDGE_LENGTH:
        return set()
    keys: set[tuple[str, int | None]] = {(text, None)}
    for number in re.finditer(r"(?<!\S)\d{1,5}(?=\s|$|[.|/])", text):
        words = f"{text[: number.start()]}#{text[number.end() :]}"
        if not re.search(r"[^\W\d_]", words) or PAGE_WORD.search(words) or len(words.split()) > 2:
            keys.add((words, int(number[0]) - page_number))
    return keys


def join_pages(pages: list[list[Line]]) -> str:
    """Paragraphs, one blank line apart; running text is joined over line and page ends."""
    lengths = sorted(num_columns(line.text) for page in pages for line in page)
    width = lengths[int(0.9 * (len(lengths) - 1))] if lengths else 0
    shortest_full = max(MIN_PROSE_LINE, FULL_LINE * width)
    known_words = Counter(word for page in pages for line in page for word in WORD.findall(line.text))
    parts: list[str] = []
    previous = None
    for page in pages:
        leading = usual_leading(page)
        for position, line in enumerate(page):
            text = line.text
            if previous is None:
                between = ""
            elif (cut := CUT_WORD.search(parts[-1])) and text[0].isalnum():
                between = ""
                if text[0].islower() and not is_compound(cut[1], WORD.match(text)[0], known_words):
                    parts[-1] = parts[-1][:-1]
            elif starts_paragraph(previous, line, leading) if position else ends_text(previous, line):
                between = "\n\n"
            elif num_columns(f"{previous.text} {text.split()[0]}") < shortest_full:
                between = "\n"
            else:
                between = "" if is_wide(previous.text[-1]) and is_wide(text[0]) else " "
            parts += [between, text]
            previous = line
    return "".join(parts)


def is_wide(character: str) -> bool:
    """Whether a character is two columns wide, as in Chinese and Japanese, which put no spaces between words."""
    return unicodedata.east_asian_width(character) in "WF"


def num_columns(text: str) -> int:
    return len(text) + sum(map(is_wide, text))


def usual_leading(page: list[Line]) -> float | None:
    """Usual distance of baselines on a page in points; None where there are too few lines to tell."""
    gaps = [before.y - after.y for before, after in zip(page, page[1:], strict=False)]
    gaps = [gap for line, gap in zip(page, gaps, strict=False) if 0.5 * line.size < gap < 4 * line.size]
    return median(gaps) if len(gaps) >= 4 else None


def starts_paragraph(previous: Line, line: Line, leading: float | None) -> bool:
    """Whether `line` begins a paragraph: a gap above it, another font size, or an indented line after a full stop."""
    gap, size = previous.y - line.y, max(previous.size, line.size)
    if gap > (PARAGRAPH_GAP * leading if leading else PARAGRAPH_GAP_IN_SIZES * size):
        return True
    if gap > 0 and size > 1.15 * min(previous.size, line.size):
        return True
    is_indented = MIN_INDENT * size < line.x - previous.x < MAX_INDENT * size
    return is_indented and bool(SENTENCE_END.search(previous.text))


def ends_text(previous: Line, line: Line) -> bool:
    """Whether the last line of a page ends a paragraph, as far as it and the next page's first line tell."""
    return bool(SENTENCE_END.search(previous.text)) or not line.text[:1].islower()


def is_compound(first: str, second: str, known_words: Counter) -> bool:
    """Whether the hyphen between the halves of a word is its own: it has another, or only that form is in the text."""
    if "-" in first:
        return True
    return known_words[f"{first}-{second}"] > 0 and not known_words[first + second]
