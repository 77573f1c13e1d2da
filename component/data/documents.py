"""A document as text: PDF by PDFium, EPUB and HTML by markitdown's converters, Markdown and other text as it stands.

Nothing is fetched: a converter gets the bytes of the file, and links and images are left out of the text. The packages
are optional (`pip install -e .[web]`) and imported only when such a file is read.
"""

import codecs
import os
import re
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

from longqlora.cli import require_extra, require_file

MAX_BYTES = 512 * 2**20
MAX_UNPACKED_BYTES = 256 * 2**20
# Options of markdownify, which markitdown's converters pass on to it.
PLAIN_MARKDOWN = {"strip": ["a", "img"], "escape_asterisks": False, "escape_underscores": False}
DRM_FILE = "META-INF/encryption.xml"
# Scrambled fonts stand there too, and are no obstacle to reading the text.
ENCRYPTED_CHAPTER = re.compile(rb"""URI=["'][^"']+\.x?html?["']""", re.I)
MAX_DEPTH = 10_000
TAG = re.compile(rb"<(/?)([a-zA-Z][\w:-]*)[^<>]*?(/?)>")
EMPTY_ELEMENTS = (b"area", b"base", b"br", b"col", b"hr", b"img", b"input", b"link", b"meta", b"source", b"wbr")
# Also U+0002, which PDFium writes for the hyphen of a word that the end of a line divides, and soft hyphens.
INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u2060\ufeff\ufffe]")


def read_document(path: str | os.PathLike, *, flag: str = "document") -> str:
    """The text of the document at `path`; `flag` names what gave the path, for the errors.

    The suffix decides how it is read; a file of another suffix is taken for text. Raises ValueError with the fix for
    what is missing, empty, damaged, encrypted, too large, without text or not text at all.
    """
    path = require_file(os.path.expanduser(path), flag)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES // 2**20} MiB; split it")
        data = path.read_bytes()
        text = clean_text(READERS.get(path.suffix.lower(), read_text)(data) if data else "")
        if not text:
            raise ValueError("it is empty; give a file with text")
    except ValueError as error:
        raise ValueError(f"{flag}: {str(path)!r}: {error}") from None
    return text


def read_pdf(data: bytes) -> str:
    """The text of a PDF, pages one blank line apart."""
    require_extra("pypdfium2", "pypdfium2", extra="web")
    import pypdfium2

    try:
        with pypdfium2.PdfDocument(data) as pdf:
            pages = [page.get_textpage().get_text_bounded() for page in pdf]
    except pypdfium2.PdfiumError as error:
        if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
            raise ValueError("encrypted; save it without a password") from None
        raise ValueError(f"damaged or no PDF ({error}); get it again or print it to a new PDF") from None
    if not any(map(str.strip, pages)):
        raise ValueError("no text in it, probably scanned pages; run OCR on it first (ocrmypdf, for example)")
    return "\n\n".join(pages)


def read_epub(data: bytes) -> str:
    """The text of an EPUB, as Markdown, in its reading order."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            members = archive.infolist()
            # zipfile unpacks no more than the size that the archive declares.
            if sum(member.file_size for member in members) > MAX_UNPACKED_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_UNPACKED_BYTES // 2**20} MiB; split it")
            is_protected = DRM_FILE in archive.namelist() and ENCRYPTED_CHAPTER.search(archive.read(DRM_FILE))
            if is_protected or any(member.flag_bits & 1 for member in members):
                raise ValueError("encrypted or copy-protected (DRM); use an open copy")
            for member in members:
                if member.filename.lower().endswith(("html", "htm")):
                    check_depth(archive.read(member))
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"damaged or no EPUB ({error}); get it again") from None
    # The first paragraph lists the metadata.
    return read_markup(data, "EpubConverter").partition("\n\n")[2]


def check_depth(markup: bytes) -> None:
    """Raise ValueError where elements are nested so deep that the parser, quadratic in it, takes minutes."""
    depth = 0
    for tag in TAG.finditer(markup):
        is_end, name, is_closed = tag[1], tag[2].lower(), tag[3]
        depth = max(0, depth - 1) if is_end else depth + (not is_closed and name not in EMPTY_ELEMENTS)
        if depth > MAX_DEPTH:
            raise ValueError(f"its elements are nested more than {MAX_DEPTH:,} deep; save it as text")


def read_markup(data: bytes, converter: str = "HtmlConverter") -> str:
    """The text of HTML, as Markdown, by a converter of markitdown."""
    check_depth(data)
    require_extra("markitdown", "markitdown", extra="web")
    from markitdown import StreamInfo, converters

    with warnings.catch_warnings():
        # That XHTML is read with the HTML parser, and that a text too deeply nested for Markdown is left plain.
        warnings.simplefilter("ignore")
        try:
            return getattr(converters, converter)().convert(BytesIO(data), StreamInfo(), **PLAIN_MARKDOWN).markdown
        # Its parsers meet a damaged file with exceptions of many kinds.
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise ValueError(f"damaged ({what}); get it again") from None


def read_text(data: bytes) -> str:
    """The text of a UTF-8 file, or of a UTF-16 one with a byte order mark."""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        what = f"{encoding.upper()} text ({error.reason} at byte {error.start})"
        raise ValueError(f"not {what}; save it as UTF-8, or give one of {FORMAT_LIST}") from None
    if "\0" in text:
        raise ValueError(f"not a text file; give one of {FORMAT_LIST}")
    return text


def clean_text(text: str) -> str:
    """`text` in Unicode form NFC without invisible characters, trailing spaces and repeated blank lines."""
    text = re.sub(r"\r\n?|[\x85\u2028]", "\n", text).replace("\f", "\n\n").replace("\xa0", " ")
    text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    lines = [line.rstrip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def with_documents(question: str, documents: Iterable[tuple[str, str]]) -> str:
    """`question` behind the material it is about: (name, text) of each document. The one wording for all prompts."""
    material = "".join(f"Below is the text of {name}.\n\n{text}\n\n" for name, text in documents)
    return f"{material}The text ends here.\n\n{question}" if material else question


def find_files(
    paths: Sequence[str | os.PathLike], suffixes: Iterable[str], *, is_recursive: bool
) -> list[tuple[str, Path]]:
    """(name, path) of every file that --input names, each once: files as given, those of folders sorted.

    A file's name is its own; files in a folder are named by their path below it, and count if they end in one of
    `suffixes` and are not hidden. Raises ValueError for a path that is not there, and where no file is found.
    """
    found: dict[Path, str] = {}
    for given in map(Path, map(os.path.expanduser, paths)):
        if given.is_file():
            found.setdefault(given.resolve(), given.name)
        elif not given.is_dir():
            raise ValueError(f"--input: nothing at {str(given)!r}; give existing files or folders")
        for path in sorted(given.rglob("*") if is_recursive else given.glob("*")) if given.is_dir() else ():
            below = path.relative_to(given)
            is_hidden = any(part.startswith(".") for part in below.parts)
            if path.name.lower().endswith(tuple(suffixes)) and not is_hidden and path.is_file():
                found.setdefault(path.resolve(), below.as_posix())
    if not found:
        hint = "" if is_recursive else ", or pass --recursive"
        raise ValueError(f"--input: no file found; give files or folders with {', '.join(suffixes)}{hint}")
    # A name that is not UTF-8 could not be written.
    return [(os.fsencode(name).decode("utf-8", "replace"), path) for path, name in found.items()]


READERS = {".pdf": read_pdf, ".epub": read_epub, ".html": read_markup, ".htm": read_markup, ".xhtml": read_markup,
           ".md": read_text, ".markdown": read_text, ".txt": read_text}  # fmt: skip
FORMAT_LIST = ", ".join(suffix.lstrip(".") for suffix in READERS)
