"""Documents: each format to clean text, and damaged files as one line."""

import zipfile
from pathlib import Path

import pytest

from longqlora.data.clean_text import clean_text
from longqlora.data.documents import read_document
from longqlora.data.epub_text import MAX_UNPACKED_BYTES

PROSE = "The committee met in the long river house and talked about many things that nobody could settle."


def pdf_bytes(pages: list[list[str]], leading: int = 14) -> bytes:
    """A minimal PDF: on each page lines of Helvetica 12, `leading` points apart; "" leaves a line free."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for lines in pages:
        shown = b"".join(b"(%s) Tj T*\n" % line.encode("cp1252").replace(b"(", b"\\(") for line in lines)
        stream = b"BT /F1 12 Tf %d TL 72 720 Td\n%sET" % (leading, shown)
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
    trailer = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + trailer


CONTAINER = """<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
<rootfile full-path="OPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""
PACKAGE = """<?xml version="1.0"?>{doctype}<package xmlns="http://www.idpf.org/2007/opf"
xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><dc:title>The Sea &amp; I</dc:title></metadata><manifest>
<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
<item id="a" href="text/a%20b.xhtml" media-type="application/xhtml+xml"/>
<item id="z" href="text/z.xhtml" media-type="application/xhtml+xml"/>
<item id="cover" href="cover.svg" media-type="image/svg+xml"/></manifest>
<spine><itemref idref="cover"/><itemref idref="nav"/><itemref idref="z"/><itemref idref="a"/></spine></package>"""
CHAPTER = """<?xml version="1.0" encoding="UTF-8"?><html xmlns="http://www.w3.org/1999/xhtml"
xmlns:epub="http://www.idpf.org/2007/ops"><head><title/><script src="x.js"/></head><body><p>{0}</p>
<span epub:type="pagebreak">17</span></body></html>"""


def write_epub(path: Path, changes: dict | None = None) -> Path:
    """An EPUB of two chapters whose reading order is not that of its files; `changes` replaces or removes members."""
    members = {
        "mimetype": "application/epub+zip", "META-INF/container.xml": CONTAINER,
        "OPS/book.opf": PACKAGE.format(doctype=""), "OPS/nav.xhtml": CHAPTER.format("Contents"),
        "OPS/text/a b.xhtml": CHAPTER.format("Second &eacute;nd"), "OPS/text/z.xhtml": CHAPTER.format("First"),
        "OPS/cover.svg": "<svg/>", **(changes or {}),
    }  # fmt: skip
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return path


def encrypted_pdf(path: Path, password: str) -> Path:
    from pypdf import PdfReader, PdfWriter

    plain = path.with_suffix(".plain")
    plain.write_bytes(pdf_bytes([[PROSE]]))
    writer = PdfWriter(clone_from=PdfReader(plain))
    writer.add_metadata({"/Title": "Secret\nminutes"})
    writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    writer.write(path)
    return path


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("ﬁne oﬃce ﬂuﬀ", "fine office fluff"),
        ("cafe\u0301", "café"),
        ("co\u00adop\u200berate\ufeff", "cooperate"),
        ("a\u00a0b\x00\x07\x9bc", "a bc"),
        ("a  \r\nb\rc\t\n", "a\nb\nc"),
        ("a\n \n\t\n\n\nb\fc\u2029d", "a\n\nb\n\nc\n\nd"),
        ("  indented\n\tcode", "  indented\n\tcode"),
        ("x\ud83d\ude00y\ud83dz", "x😀y\ufffdz"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),
        ("", ""),
    ],
)
def test_clean_text(raw, expected):
    assert clean_text(raw) == expected
    assert clean_text(expected) == expected


HTML = """<!DOCTYPE html><html><head><meta charset="utf-8"><title> A &amp;\n B </title><style>p{color:red}</style>
<script>var x = "<p>not me</p>";</script></head><body><header><a>Logo</a></header><nav><ul><li>Home</li></ul></nav>
<main><header><h1>Caf&eacute; &#8212; &lt;menu&gt;</h1></header><p>One <b>bold</b>
word,<br>next line.</p><div>Bare text<p>Two<!-- no comment --></p>tail</div>
<ul><li>milk<li><p>eggs</p><ul><li>brown</ul><li>tea</ul><ol start="3"><li>three</li><li value="7">seven</li></ol>
<table><tr><th>Name</th><th>Age</th></tr><tr><td><p>Ann</p></td><td>3<br>years</td></tr><tr><td></td><td></td></tr></table>
<pre>def f():
    return  1

</pre><p hidden>hidden</p><p style="display: none">gone</p><noscript>enable</noscript></main>
<table><tr><td><h2>Old site</h2><p>laid out</p><p>by table</p></td></tr></table>
<footer>Imprint</footer></body></html>"""
HTML_TEXT = """Café — <menu>

One bold word,
next line.

Bare text

Two

tail

- milk
- eggs
  - brown
- tea

3. three
7. seven

Name | Age
Ann | 3 years

def f():
    return  1

Old site

laid out

by table"""


def test_html(tmp_path):
    path = tmp_path / "seite.html"
    path.write_text(HTML, encoding="utf-8")
    document = read_document(path)
    assert (document.title, document.format, document.num_pages) == ("A & B", "html", None)
    assert document.text == HTML_TEXT
    bare = tmp_path / "saved page"
    bare.write_bytes(b"\xef\xbb\xbf" + HTML.encode())
    assert read_document(bare).text == HTML_TEXT, "no suffix: told by its content"


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("<header><h1>Title</h1></header><p>x", "Title\n\nx"),
        ("<header>Logo</header><div role=navigation>Menu</div><p>x<footer>Imprint</footer>", "x"),
        ("<article><header>By me</header><p>x<footer>Notes</footer></article>", "By me\n\nx\n\nNotes"),
        ("<ol><li>a<li><li>c</ol>", "1. a\n3. c"),
        ("<table><tr><td><h3>Head</h3>x</td><td>y</td></tr></table>", "Head\n\nx\ny"),
        ("<table><tr><td>a</td><td><table><tr><td>b</td><td>c</td></tr></table></td></tr></table>", "a\n\nb | c"),
        ("a<script/>b<p>c", "ab\n\nc"),
    ],
)
def test_html_structure(markup, expected, tmp_path):
    (tmp_path / "a.xhtml").write_text(f"<html><body>{markup}</body></html>", encoding="utf-8")
    assert read_document(tmp_path / "a.xhtml").text == expected


@pytest.mark.parametrize(
    "data",
    [
        '<meta charset="iso-8859-1"><p>naïve “q”</p>'.encode("cp1252"),
        '<?xml version="1.0" encoding="windows-1252"?><p>naïve “q”</p>'.encode("cp1252"),
        "<p>naïve “q”</p>".encode("cp1252"),
        '<meta charset="utf-16"><p>naïve “q”</p>'.encode(),
        '<meta charset="no-such"><p>naïve “q”</p>'.encode(),
        '<meta charset="hex"><p>naïve “q”</p>'.encode(),
        "<p>naïve “q”</p>".encode("utf-16"),
    ],
)
def test_html_in_any_encoding(data, tmp_path):
    (tmp_path / "a.htm").write_bytes(data)
    assert read_document(tmp_path / "a.htm").text == "naïve “q”"


def test_html_nested_deeper_than_the_stack(tmp_path):
    (tmp_path / "deep.html").write_text("<div>" * 5000 + "deep" + "</div>" * 5000 + "<ul>" * 50 + "<li>x")
    assert read_document(tmp_path / "deep.html").text.startswith("deep")


def test_markdown(tmp_path):
    path = tmp_path / "notes.md"
    path.write_bytes(
        b"\xef\xbb\xbf---\r\ntitle: 'My notes'\r\ntags: [a]\r\n---\r\n# Head *ing*"
        b"\r\n\r\nSoft\r\nwrapped [link](http://x) &amp;."
        b"\r\n\r\n- a\r\n- b\r\n\r\n| x | y |\r\n|---|---|\r\n| 1 | 2 |\r\n\r\n```\r\n<b>code</b>  x\r\n```\r\n"
        b"<script>no()</script>\r\n"
    )
    document = read_document(path)
    assert (document.title, document.format) == ("My notes", "markdown")
    assert document.text == "Head ing\n\nSoft wrapped link &.\n\n- a\n- b\n\nx | y\n1 | 2\n\n<b>code</b>  x"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_in_its_encodings(encoding, tmp_path):
    path = tmp_path / "größe 読.txt"
    path.write_bytes("Größe\r\n\r\n\r\n\r\n読む  \r\n".encode(encoding))
    document = read_document(path)
    assert (document.text, document.title, document.format) == ("Größe\n\n読む", "größe 読", "text")


def test_epub_in_reading_order(tmp_path):
    document = read_document(write_epub(tmp_path / "book.epub"))
    assert (document.title, document.text, document.format) == ("The Sea & I", "First\n\nSecond énd", "epub")
    fonts = '<encryption xmlns="x"><EncryptedData><EncryptionMethod Algorithm="http://www.idpf.org/2008/embedding"/>'
    fonts += '<CipherReference URI="OPS/text/z.xhtml"/></EncryptedData></encryption>'
    path = write_epub(tmp_path / "named.zip", {"META-INF/encryption.xml": fonts})
    assert read_document(path).format == "epub", "told by its content; scrambled fonts do no harm"


def test_encrypted_pdf_with_an_empty_password_is_read(tmp_path):
    document = read_document(encrypted_pdf(tmp_path / "open.pdf", ""))
    assert document.text == PROSE and document.title == "Secret minutes"


def bad_file(name: str, folder: Path) -> Path:
    """Make the faulty file called `name`."""
    path = folder / name
    if name == "locked.pdf":
        return encrypted_pdf(path, "secret")
    chapter = CHAPTER.format("x")
    entity = '<!DOCTYPE p [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    drm = '<e xmlns="x"><EncryptedData><CipherReference URI="OPS/text/z.xhtml"/></EncryptedData></e>'
    books = {
        "hole.epub": {"OPS/text/z.xhtml": None},
        "xml.epub": {"OPS/book.opf": "<package>"},
        "bomb.epub": {"OPS/text/z.xhtml": chapter + " " * MAX_UNPACKED_BYTES},
        "entity.epub": {"OPS/book.opf": PACKAGE.format(doctype=entity)},
        "drm.epub": {"META-INF/encryption.xml": drm},
        "images.epub": {"OPS/text/z.xhtml": "<img/>", "OPS/text/a b.xhtml": "<img/>"},
        "empty-container.epub": {"META-INF/container.xml": "<container/>"},
        "spine.epub": {"OPS/book.opf": PACKAGE.format(doctype="").replace('idref="z"', 'idref="q"')},
    }
    if name in books:
        return write_epub(path, books[name])
    whole = pdf_bytes([[PROSE]])
    contents = {
        "truncated.pdf": whole[:60], "half.epub": write_epub(folder / "whole.epub").read_bytes()[:500],
        "scan.pdf": pdf_bytes([[], []]), "none.pdf": pdf_bytes([]), "fake.pdf": b"<html><p>Not found</html>",
        "garbage.pdf": b"%PDF-1.7\n" + bytes(range(256)) * 20, "empty.pdf": b"", "empty.txt": b"",
        "blank.md": b" \n\t\n",
        "latin.txt": "naïve".encode("latin-1"), "image.png": b"\x89PNG\r\n\x1a\n\0\0", "utf16.txt": b"\xff\xfea\0b",
        "zeros": b"ab\0cd", "other.docx": b"PK\x03\x04" + bytes(40), "scripts.html": b"<script>x</script>",
        "wrong.html": b'<meta charset="ascii"><p>\xff\xfe\xfa\x81</p>',
    }  # fmt: skip
    path.write_bytes(contents[name])
    return path


BAD_FILES = {
    "truncated.pdf": "damaged", "scan.pdf": "OCR", "none.pdf": "no pages", "garbage.pdf": "damaged",
    "fake.pdf": "looks like html", "empty.pdf": "empty", "empty.txt": "is empty", "blank.md": "is empty",
    "locked.pdf": "encrypted", "half.epub": "damaged", "hole.epub": "OPS/text/z.xhtml is missing",
    "xml.epub": "not valid XML", "bomb.epub": "64 MiB", "entity.epub": "entities", "drm.epub": "DRM",
    "images.epub": "no text", "empty-container.epub": "names no package file", "spine.epub": "not listed",
    "latin.txt": "byte 2", "image.png": "not UTF-8", "utf16.txt": "not UTF-16", "zeros": "zero at byte 2",
    "other.docx": "not a text file", "scripts.html": "is empty", "wrong.html": "ascii",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line(name, tmp_path, capfd, caplog):
    path = bad_file(name, tmp_path)
    with pytest.raises(ValueError) as caught:
        read_document(path, flag="--file")
    message = str(caught.value)
    assert message.startswith("--file: ") and name in message and BAD_FILES[name] in message, message
    assert "\n" not in message and len(message) < 400
    assert capfd.readouterr() == ("", "") and not caplog.records, "the libraries stay quiet"


def test_paths_that_are_no_file_and_missing_packages(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no file at .* but a folder"):
        read_document(tmp_path)
    with pytest.raises(ValueError, match="no file at .*nowhere.pdf'; give"):
        read_document(tmp_path / "nowhere.pdf")
    (tmp_path / "a.pdf").write_bytes(pdf_bytes([["text"]]))
    monkeypatch.setattr("longqlora.cli.importlib.util.find_spec", lambda name: None)
    for name, package in (("a.pdf", "pypdf"), ("b.html", "beautifulsoup4"), ("c.md", "markdown-it-py")):
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text("<p>x")
        with pytest.raises(ValueError, match=f"{package}.*requirements-extras.txt"):
            read_document(tmp_path / name)
