"""A document of any common format as clean text: PDF, EPUB, HTML, Markdown, plain text.

document = read_document("paper.pdf")
document.title, document.text, document.format, document.num_pages

The readers of the formats are in pdf_text.py, epub_text.py and markup_text.py; what is done to every text is in
clean_text.py. Their packages are optional (requirements-extras.txt) and imported only when such a file is read.
"""

import codecs
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from longqlora.data.clean_text import clean_text
from longqlora.data.epub_text import is_epub, read_epub
from longqlora.data.markup_text import read_html, read_markdown
from longqlora.data.pdf_text import read_pdf

FORMATS = {
    ".pdf": "pdf",
    ".epub": "epub",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".md": "markdown",
    ".markdown": "markdown",
    ".txt": "text",
}
FORMAT_LIST = ", ".join(suffix.lstrip(".") for suffix in FORMATS)
MAX_BYTES = 512 * 2**20
NUM_BYTES_SNIFFED = 1024
HTML_START = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html)\b", re.I | re.S)


@dataclass(frozen=True)
class Document:
    """One document. title: as the file names it, or its file name; num_pages: of a PDF, else None."""

    title: str
    text: str
    format: str
    num_pages: int | None = None


def read_document(path: str | os.PathLike, *, flag: str = "document") -> Document:
    """Read the document at `path`; `flag` names what gave the path, for the errors.

    The format is told by the content where that is unmistakable (PDF, EPUB), else by the suffix; a file with an unknown
    suffix may be HTML or plain text. Raises ValueError with the fix for what is missing, empty, damaged, encrypted,
    without text or not text at all, and OSError for what cannot be opened.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        kind = " but a folder" if path.is_dir() else ""
        raise ValueError(f"{flag}: no file at {str(path)!r}{kind}; give the path of an existing file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{flag}: {str(path)!r} has {size / 2**20:.0f} MiB, over {MAX_BYTES // 2**20}; split it")
    try:
        kind = document_format(path)
        title, text, num_pages = read_as(path, kind)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    if not text.strip():
        raise ValueError(f"{flag}: {str(path)!r} is empty; give a file with text")
    return Document(title or path.stem, text, kind, num_pages)


def document_format(path: Path) -> str:
    """Format of the file at `path`. Raises ValueError where the suffix promises one that the content is not."""
    known = FORMATS.get(path.suffix.lower())
    told = sniffed_format(path)
    if told in ("pdf", "epub") or known is None:
        return told or "text"
    if known in ("pdf", "epub"):
        found = f"it looks like {told}" if told else "its content is another"
        raise ValueError(f"{str(path)!r} is no {known.upper()} file or a damaged one ({found}); get it again")
    return known


def sniffed_format(path: Path) -> str | None:
    """Format that the content shows beyond doubt: pdf, epub or html; None otherwise."""
    with path.open("rb") as file:
        head = file.read(NUM_BYTES_SNIFFED)
    if head.startswith(b"%PDF-") or (path.suffix.lower() == ".pdf" and b"%PDF-" in head):
        return "pdf"
    if head.startswith(b"PK\x03\x04") and is_epub(path):
        return "epub"
    return "html" if HTML_START.match(head.removeprefix(codecs.BOM_UTF8)) else None


def read_as(path: Path, kind: str) -> tuple[str | None, str, int | None]:
    """Title, text and number of pages of the file at `path`, read as a format of `FORMATS`."""
    if kind == "pdf":
        return read_pdf(path)
    if kind == "epub":
        return *read_epub(path), None
    data, name = path.read_bytes(), repr(str(path))
    if kind == "html":
        return *read_html(data, name), None
    text = decode_text(data, name)
    if kind == "markdown":
        return *read_markdown(text, name), None
    return None, clean_text(text), None


def decode_text(data: bytes, name: str) -> str:
    """Text of a UTF-8 file, or of a UTF-16 or UTF-32 one with a byte order mark; line breaks are \\n.

    Raises ValueError that names the first byte that is not text, counted from 0.
    """
    encoding = "utf-8"
    # The mark of UTF-32 (FF FE 00 00) begins with that of UTF-16.
    for mark, marked in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
                         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):  # fmt: skip
        if data.startswith(mark):
            encoding = marked
            break
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not {encoding.upper()} text ({error.reason} at byte {error.start}); save it as UTF-8, or give "
            f"one of {FORMAT_LIST}"
        ) from None
    if "\0" in text:
        position = f" (a zero at byte {data.index(0)})" if encoding == "utf-8" else ""
        raise ValueError(f"{name} is not a text file{position}; give one of {FORMAT_LIST}")
    return re.sub(r"\r\n?", "\n", text)


def with_documents(question: str, documents: Iterable[tuple[str, str]]) -> str:
    """`question` behind the material it is about: (name, text) of each document. The one wording for all prompts."""
    material = "".join(f"Below is the text of {name}.\n\n{text}\n\n" for name, text in documents)
    return f"{material}The text ends here.\n\n{question}" if material else question


def find_documents(paths: Sequence[str], *, is_recursive: bool, flag: str = "--input") -> list[tuple[str, Path]]:
    """(name, path) of every file that `paths` names, each once, sorted by name.

    A file's name is its own; files in a folder are named by their path below it. Of folders, those files count
    whose suffix or content shows a known format; hidden ones do not. Raises ValueError for a path that is not there.
    """
    found: dict[Path, str] = {}
    for given in map(Path, map(os.path.expanduser, paths)):
        if given.is_dir():
            for path in given.rglob("*") if is_recursive else given.iterdir():
                below = path.relative_to(given)
                is_hidden = any(part.startswith(".") for part in below.parts)
                if not is_hidden and path.is_file() and is_known(path):
                    found.setdefault(path.resolve(), below.as_posix())
        elif given.is_file():
            found.setdefault(given.resolve(), given.name)
        else:
            raise ValueError(f"{flag}: nothing at {str(given)!r}; give existing files or folders")
    # A name that is not UTF-8 could not be written.
    return sorted((os.fsencode(name).decode("utf-8", "replace"), path) for path, name in found.items())


def is_known(path: Path) -> bool:
    """Whether suffix or content shows a format; a file that cannot be opened is left to be reported."""
    try:
        return path.suffix.lower() in FORMATS or sniffed_format(path) is not None
    except OSError:
        return True
