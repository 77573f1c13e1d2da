"""Documents: each format to text, and every bad file as one line."""

import io
import zipfile
from pathlib import Path

import pytest

from longqlora.data.documents import read_document

PROSE = "The committee met in the long river house and talked about many things that nobody could settle."


def pdf_bytes(pages: list[list[str]], trailer: bytes = b"") -> bytes:
    """A minimal PDF: on each page lines of Helvetica 12."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for lines in pages:
        shown = b"".join(b"(%s) Tj T*\n" % line.encode("cp1252") for line in lines)
        stream = b"BT /F1 12 Tf 14 TL 72 720 Td\n%sET" % shown
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        kids.append(len(objects) + 1)
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R /Resources << /Font << /F1 3 0 R "
            b">> >> >>" % len(objects)
        )
    objects[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(kids), b" ".join(b"%d 0 R" % kid for kid in kids))
    out, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    last = b"trailer << /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + last


CONTAINER = """<container><rootfiles><rootfile full-path="OPS/book.opf"/></rootfiles></container>"""
PACKAGE = """<?xml version="1.0"?>{}<package xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata>
<dc:title>The Sea &amp; I</dc:title></metadata><manifest><item id="a" href="text/a%20b.xhtml"/>
<item id="z" href="text/z.xhtml"/></manifest><spine><itemref idref="z"/><itemref idref="a"/></spine></package>"""
CHAPTER = """<?xml version="1.0" encoding="UTF-8"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/>
<script>no()</script></head><body><p>{}</p></body></html>"""


def epub_bytes(changes: dict | None = None) -> bytes:
    """An EPUB of two chapters whose reading order is not that of its files; `changes` replaces or removes members."""
    members = {
        "mimetype": "application/epub+zip", "META-INF/container.xml": CONTAINER, "OPS/book.opf": PACKAGE.format(""),
        "OPS/text/a b.xhtml": CHAPTER.format("Second &eacute;nd"), "OPS/text/z.xhtml": CHAPTER.format("First"),
        **(changes or {}),
    }  # fmt: skip
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return file.getvalue()


HTML = """<!DOCTYPE html><html><head><meta charset="{0}"><title> A &amp;\n B </title><style>p{{color:red}}</style>
</head><body><h1>Café &#8212; x_y*z</h1><p>One <a href="http://a.test/x">linked</a> word.<img src="x.png" alt="x"></p>
<table><tr><th>Name</th></tr><tr><td>Ann</td></tr></table><ul><li>milk</li></ul><pre>  code</pre></body></html>"""
HTML_TEXT = "# Café — x_y*z\n\nOne linked word.\n\n| Name |\n| --- |\n| Ann |\n\n* milk\n\n```\n  code\n```"
FONTS = '<e xmlns="x"><EncryptedData><CipherReference URI="OPS/font.otf"/></EncryptedData></e>'
GOOD_FILES = {
    "two.pdf": (pdf_bytes([["One page", "of interna-", "tional text."], ["Two."]]), "two",
                "One page\nof international text.\n\nTwo."),
    "SHOUT.PDF": (pdf_bytes([["a"]]), "SHOUT", "a"),
    "book.epub": (epub_bytes({"META-INF/encryption.xml": FONTS}), "The Sea & I", "First\n\nSecond énd"),
    "a.html": (HTML.format("utf-8").encode(), "A & B", HTML_TEXT),
    "b.htm": (HTML.format("windows-1252").encode("cp1252", "xmlcharrefreplace"), "A & B", HTML_TEXT),
    "c.xhtml": (b"\xef\xbb\xbf<html><body><p>plain</p></body></html>", "c", "plain"),
    "deep.html": (b"<div>" * 5000 + b"deep" + b"</div>" * 5000, "deep", "deep"),
    "notes.md": ("# Head *ing*\r\n\r\n\r\n\r\n- a  \r\n".encode("utf-8-sig"), "notes", "# Head *ing*\n\n- a"),
    "größe 読.txt": ("Größe\r\n読む".encode("utf-16"), "größe 読", "Größe\n読む"),
    "code.py": (b"  x = 1\r\ty\n", "code", "  x = 1\n\ty"),
    "clean.txt": ("cafe\u0301 co\u00adop\u200berate\ufeff\u00a0b\x07\fnext\n".encode(), "clean",
                  "café cooperate b\n\nnext"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD_FILES)
def test_text_and_title(name, tmp_path, capfd, recwarn):
    data, title, text = GOOD_FILES[name]
    (tmp_path / name).write_bytes(data)
    document = read_document(tmp_path / name)
    assert (document.title, document.text) == (title, text)
    assert capfd.readouterr() == ("", "") and not recwarn.list, "the libraries stay quiet"


ENTITY = '<!DOCTYPE p [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
LOCKED = b"/ID [<00> <00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>" % (b"11" * 32, b"22" * 32)
EMPTY_CHAPTERS = {"OPS/text/z.xhtml": "<img/>", "OPS/text/a b.xhtml": "<img/>"}
BAD_FILES = {
    "empty.pdf": (b"", "it is empty"),
    "blank.md": (b" \n\t\n", "it is empty"),
    "scan.pdf": (pdf_bytes([[], []]), "no text in it.*OCR"),
    "half.pdf": (pdf_bytes([[PROSE]])[:60], "damaged or no PDF"),
    "page.pdf": (b"<html><p>Not found</html>", "damaged or no PDF"),
    "locked.pdf": (pdf_bytes([[PROSE]], LOCKED), "encrypted; save it without a password"),
    "half.epub": (epub_bytes()[:500], "damaged or no EPUB"),
    "other.epub": (epub_bytes({"META-INF/container.xml": None}), "damaged"),
    "xml.epub": (epub_bytes({"OPS/book.opf": "<package>"}), "damaged"),
    "entity.epub": (epub_bytes({"OPS/book.opf": PACKAGE.format(ENTITY)}), "EntitiesForbidden"),
    "drm.epub": (epub_bytes({"META-INF/encryption.xml": FONTS.replace("font.otf", "text/z.xhtml")}), "DRM"),
    "images.epub": (epub_bytes(EMPTY_CHAPTERS), "it is empty"),
    "latin.txt": ("naïve".encode("latin-1"), "not UTF-8 text .* at byte 2.*save it as UTF-8, or give one of pdf, epub"),
    "image.png": (b"\x89PNG\r\n\x1a\n\0\0", "not UTF-8 text"),
    "zeros": (b"ab\0cd", "not a text file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line(name, tmp_path, capfd):
    data, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_document(tmp_path / name, flag="--file")
    assert str(caught.value).startswith(f"--file: {str(tmp_path / name)!r}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert capfd.readouterr() == ("", "")


def test_paths_that_are_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.pdf"):
        with pytest.raises(ValueError, match=f"--file: no file at {str(path)!r}"):
            read_document(path, flag="--file")


def test_what_an_archive_unpacks_to_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("longqlora.data.documents.MAX_UNPACKED_BYTES", 2**20)
    (tmp_path / "a.epub").write_bytes(epub_bytes({"x": b"\0" * 2**19}))
    assert read_document(tmp_path / "a.epub").text
    (tmp_path / "a.epub").write_bytes(epub_bytes({"x": b"\0" * 2**19, "y": b"\0" * 2**19}))
    with pytest.raises(ValueError, match="a.epub': it unpacks to more than 1 MiB; split it"):
        read_document(tmp_path / "a.epub")


def test_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("a connection"))
    remote = '<link rel="stylesheet" href="http://a.test/"/><iframe src="http://a.test/"></iframe><p>x</p>'
    Path(tmp_path / "a.html").write_text(f'<base href="http://a.test/">{remote}<img src="http://a.test/x.png">')
    (tmp_path / "b.epub").write_bytes(epub_bytes({"OPS/text/z.xhtml": CHAPTER.format(remote)}))
    assert read_document(tmp_path / "a.html").text == "x"
    assert "x" in read_document(tmp_path / "b.epub").text
