"""The text of an EPUB: a zip archive whose package file lists the chapters (XHTML) in reading order.

The archive is not trusted: what it unpacks to is limited, nothing is written to disk, and its XML may declare no
entities.
"""

import posixpath
import zipfile
import zlib
from pathlib import Path
from urllib.parse import unquote
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from longqlora.data.clean_text import one_line
from longqlora.data.markup_text import read_html

MAX_UNPACKED_BYTES = 64 * 2**20
CONTAINER, ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
CHAPTER_TYPES = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")
# Scrambled fonts are no obstacle to reading the text.
FONT_SCRAMBLING = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeError)


def is_epub(path: Path) -> bool:
    """Whether a file is a zip archive with an EPUB's container file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return CONTAINER in archive.namelist()
    except (*DAMAGE, ValueError):
        return False


def read_epub(path: Path) -> tuple[str | None, str]:
    """Title where the book names one, and its text. Raises ValueError for what is damaged, protected or too large."""
    name = repr(str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            return EpubReader(archive, name).read()
    except DAMAGE as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is damaged or no EPUB ({what}); get it again") from None


class EpubReader:
    """Reads the parts of one archive; `name` is the file's, for the errors."""

    def __init__(self, archive: zipfile.ZipFile, name: str):
        self.archive, self.name = archive, name
        self.num_bytes_left = MAX_UNPACKED_BYTES

    def read(self) -> tuple[str | None, str]:
        package_path = self.package_path()
        package = self.xml(package_path)
        items = {item.get("id"): item for item in elements(package, "item")}
        protected = self.protected_paths()
        chapters = []
        for path in self.chapter_paths(package_path, package, items):
            if path in protected:
                raise ValueError(f"{self.name} is copy-protected (DRM), so its text cannot be read; use an open copy")
            chapters.append(read_html(self.bytes(path), f"{self.name} ({path})")[1])
        text = "\n\n".join(filter(None, chapters))
        if not text:
            raise ValueError(f"{self.name} holds no text, only images or nothing; give a book with text")
        title = next((one_line("".join(element.itertext())) for element in elements(package, "title")), "")
        return title or None, text

    def package_path(self) -> str:
        for element in elements(self.xml(CONTAINER), "rootfile"):
            if path := element.get("full-path"):
                return posixpath.normpath(path)
        raise ValueError(f"{self.name} is no EPUB: {CONTAINER} names no package file; get it again")

    def chapter_paths(self, package_path: str, package: Element, items: dict[str | None, Element]) -> list[str]:
        """Paths of the chapters in reading order, each once, without the navigation document."""
        paths = []
        for reference in elements(package, "itemref"):
            item = items.get(reference.get("idref"))
            if item is None or not item.get("href"):
                raise ValueError(f"{self.name} is damaged: a chapter of its reading order is not listed; get it again")
            if item.get("media-type") not in CHAPTER_TYPES or "nav" in (item.get("properties") or "").split():
                continue
            href = unquote(item.get("href").split("#")[0])
            paths.append(posixpath.normpath(posixpath.join(posixpath.dirname(package_path), href)))
        return list(dict.fromkeys(paths))

    def protected_paths(self) -> set[str]:
        """Paths whose bytes are encrypted, other than fonts."""
        if ENCRYPTION not in self.archive.namelist():
            return set()
        paths = set()
        for data in elements(self.xml(ENCRYPTION), "EncryptedData"):
            if not any(method.get("Algorithm") in FONT_SCRAMBLING for method in elements(data, "EncryptionMethod")):
                paths |= {unquote(reference.get("URI", "")) for reference in elements(data, "CipherReference")}
        return paths

    def bytes(self, path: str) -> bytes:
        """Content of a member, counted against what the archive may unpack to."""
        try:
            info = self.archive.getinfo(path)
        except KeyError:
            raise ValueError(f"{self.name} is damaged: {path} is missing in it; get it again") from None
        if info.flag_bits & 1:
            raise ValueError(f"{self.name} is an encrypted archive; give one without a password")
        # zipfile unpacks no more than the size that the archive declares.
        self.num_bytes_left -= info.file_size
        if self.num_bytes_left < 0:
            limit = MAX_UNPACKED_BYTES // 2**20
            raise ValueError(f"{self.name} unpacks to more than {limit} MiB of text; no book does, so it is not read")
        return self.archive.read(info)

    def xml(self, path: str) -> Element:
        """Root of an XML member; names carry their namespace as "{uri}name"."""
        builder = TreeBuilder()
        parser = expat.ParserCreate(namespace_separator="}")
        parser.StartElementHandler = lambda tag, attributes: builder.start(tag, attributes)
        parser.EndElementHandler = lambda tag: builder.end(tag)
        parser.CharacterDataHandler = builder.data
        parser.EntityDeclHandler = self.refuse_entity
        try:
            parser.Parse(self.bytes(path), True)
        except expat.ExpatError as error:
            raise ValueError(f"{self.name} is damaged: {path} is not valid XML ({error}); get it again") from None
        return builder.close()

    def refuse_entity(self, *declaration) -> None:
        raise ValueError(f"{self.name} declares XML entities, which can unpack without limit; it is not read")


def elements(root: Element, name: str) -> list[Element]:
    """All elements of a local name, whatever their namespace, in document order."""
    return [element for element in root.iter() if element.tag.rpartition("}")[2] == name]
