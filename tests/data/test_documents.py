"""Documents: each format to text, every bad file as one line, and their uses: training data, chat and prompts."""

import io
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from longqlora.data.documents import find_files, read_document, with_documents
from longqlora.data.row import text_of_row
from longqlora.data.source import open_source
from longqlora.inference import generation
from longqlora.inference.chat.session import ChatSession
from longqlora.inference.generation import GenerationOptions

EXTRACT, INFERENCE, CHAT = "script/data/extract_text.py", "script/inference/inference.py", "script/inference/chat.py"

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
    "two.pdf": (pdf_bytes([["One page", "of interna-", "tional text."], ["Two."]]),
                "One page\nof international text.\n\nTwo."),
    "SHOUT.PDF": (pdf_bytes([["a"]]), "a"),
    "book.epub": (epub_bytes({"META-INF/encryption.xml": FONTS}), "First\n\nSecond énd"),
    "a.html": (HTML.format("utf-8").encode(), HTML_TEXT),
    "b.htm": (HTML.format("windows-1252").encode("cp1252", "xmlcharrefreplace"), HTML_TEXT),
    "c.xhtml": (b"\xef\xbb\xbf<html><body><p>plain</p></body></html>", "plain"),
    "deep.html": (b"<div>" * 5000 + b"deep" + b"</div>" * 5000, "deep"),
    "notes.md": ("# Head *ing*\r\n\r\n\r\n\r\n- a  \r\n".encode("utf-8-sig"), "# Head *ing*\n\n- a"),
    "größe 読.txt": ("Größe\r\n読む".encode("utf-16"), "Größe\n読む"),
    "code.py": (b"  x = 1\r\ty\n", "  x = 1\n\ty"),
    "clean.txt": ("cafe\u0301 co\u00adop\u200berate\ufeff\u00a0b\x07\fnext\n".encode(), "café cooperate b\n\nnext"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD_FILES)
def test_text_of_each_format(name, tmp_path, capfd, recwarn):
    data, text = GOOD_FILES[name]
    (tmp_path / name).write_bytes(data)
    assert read_document(tmp_path / name) == text
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
    "deep.html": (b"<div>" * 20_000 + b"deep", "nested more than 10,000 deep; save it as text"),
    "deep.epub": (epub_bytes({"OPS/text/z.xhtml": "<i>" * 20_000}), "nested more than 10,000 deep"),
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


def test_what_an_archive_unpacks_to_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("longqlora.data.documents.MAX_UNPACKED_BYTES", 2**20)
    (tmp_path / "a.epub").write_bytes(epub_bytes({"x": b"\0" * 2**19}))
    assert read_document(tmp_path / "a.epub")
    (tmp_path / "a.epub").write_bytes(epub_bytes({"x": b"\0" * 2**19, "y": b"\0" * 2**19}))
    with pytest.raises(ValueError, match="a.epub': it unpacks to more than 1 MiB; split it"):
        read_document(tmp_path / "a.epub")


def test_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("a connection"))
    remote = '<link rel="stylesheet" href="http://a.test/"/><iframe src="http://a.test/"></iframe><p>x</p>'
    (tmp_path / "a.html").write_text(f'<base href="http://a.test/">{remote}<img src="http://a.test/x.png">')
    (tmp_path / "b.epub").write_bytes(epub_bytes({"OPS/text/z.xhtml": CHAPTER.format(remote)}))
    assert read_document(tmp_path / "a.html") == "x"
    assert "x" in read_document(tmp_path / "b.epub")


# Their uses


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A folder of documents in the working directory, good and bad, known and not, with one in a folder below."""
    files = {
        "b.pdf": pdf_bytes([["Text of the PDF."]]), "größe.epub": epub_bytes(), "a.md": b"# Text of the notes",
        "c.txt": b"x", "sub/d.txt": b"Text below.\r\n", "broken.pdf": b"%PDF-1.4 broken", "photo.png": b"\x89PNG\r\n\0",
        ".hidden.txt": b"hidden",
    }  # fmt: skip
    (tmp_path / "library" / "sub").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "library" / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "library"


def rows_of(path: str) -> list[tuple[str, str]]:
    rows = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    return [(row["source"], row["text"]) for row in rows]


def test_extract_text(library, run_in_process):
    args = ["--input", "library", "--recursive", "--output_file", "new/texts.jsonl", "--min_characters", 5]
    code, out, err = run_in_process(EXTRACT, *args)
    assert code == 0 and "4 written" in out and "1 failed" in out and "1 left out" in out
    assert rows_of("new/texts.jsonl") == [
        ("a.md", "# Text of the notes"), ("b.pdf", "Text of the PDF."), ("größe.epub", "First\n\nSecond énd"),
        ("sub/d.txt", "Text below."),
    ]  # fmt: skip
    errors = [row for row in err.splitlines() if row.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: broken.pdf: ") and "Traceback" not in err
    assert os.listdir("new") == ["texts.jsonl"]
    open_source("new/texts.jsonl", "train_file").check(text_of_row)


def test_each_file_is_read_once(library, run_in_process):
    inputs = ["library/a.md", "library", str(library / "a.md"), "library/sub"]
    assert run_in_process(EXTRACT, "--input", *inputs, "--output_file", "out.jsonl")[0] == 0
    assert [source for source, _ in rows_of("out.jsonl")] == ["a.md", "b.pdf", "c.txt", "d.txt", "größe.epub"]


def test_file_names_that_are_no_unicode(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"na\xefve.txt"), "w") as file:
        file.write("text")
    [(name, path)] = find_files([str(tmp_path)], [".txt"], is_recursive=False)
    assert name == "na\ufffdve.txt" and path.read_text() == "text"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--input", "library/broken.pdf"], ["1 failed", "nothing was written"]),
        (["--input", "library", "--min_characters", 999], ["--min_characters 999"]),
        (["--input", "library", "--min_characters", 0], ["--min_characters", "at least 1"]),
        (["--input", "library", "nowhere"], ["--input", "nothing at 'nowhere'"]),
        (["--input", "empty"], ["no file found", "--recursive"]),
    ],
)
def test_extract_text_refuses(args, words, library, run_in_process, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out.jsonl").write_text("old")
    code, _, err = run_in_process(EXTRACT, "--output_file", "out.jsonl", *args)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and all(word in last for word in words), err
    assert (tmp_path / "out.jsonl").read_text() == "old" and not list(tmp_path.glob(".*"))


def test_files_stand_before_the_question_in_chat(library):
    session = ChatSession(SimpleNamespace(context_size=400), "vicuna_v1.1", GenerationOptions(max_new_tokens=10))
    session.encode = lambda messages: [0] * sum(len(message["content"].split()) for message in messages)
    documents = [(str(library / "b.pdf"), "Text of the PDF."), (str(library / "größe.epub"), "First\n\nSecond énd")]
    for path, _ in documents:
        assert "read" in session.run_command(f"/file {path}")
    content = session.messages("And now?", documents=session.documents)[0]["content"]
    assert content == with_documents("And now?", documents) and with_documents("And now?", []) == "And now?"
    assert content.startswith(f"Below is the text of {library / 'b.pdf'}.\n\nText of the PDF.\n\nBelow is the text of ")
    assert content.endswith("Second énd\n\nThe text ends here.\n\nAnd now?")


def test_files_stand_before_the_prompt_of_inference(library, run_in_process, tiny_model_dir, monkeypatch):
    seen, encode = [], generation.encode_prompt
    spy = lambda tokenizer, text, **options: seen.append(text) or encode(tokenizer, text, **options)  # noqa: E731
    monkeypatch.setattr(generation, "encode_prompt", spy)
    model = ["--model_name_or_path", tiny_model_dir, "--context_size", 512, "--max_new_tokens", 2, "--no-do_sample"]
    files = ["--file", "library/b.pdf", "--file", "library/c.txt"]
    assert run_in_process(INFERENCE, *model, *files, "--prompt", "And now?")[0] == 0
    assert seen == [with_documents("And now?", [("library/b.pdf", "Text of the PDF."), ("library/c.txt", "x")])]


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        (INFERENCE, ["--prompt", "a", "--file", "library"], ["--file", "no file", "library"]),
        (INFERENCE, ["--prompt", "a", "--file", "library/a.md", "--file", "library/broken.pdf"], ["broken.pdf"]),
        (INFERENCE, ["--input_file", "x.jsonl", "--output_file", "y", "--file", "library/a.md"], ["--input_file"]),
        (CHAT, ["--file", "library/broken.pdf"], ["--file: ", "broken.pdf"]),
    ],
)
def test_bad_files_are_refused_before_the_model_loads(
    script, args, words, library, run_in_process, tiny_model_dir, monkeypatch
):
    for place in ("arguments.load_from_arguments", "load.load_weights"):
        monkeypatch.setattr(f"longqlora.inference.{place}", lambda *args, **kwargs: pytest.fail("loaded"))
    code, _, err = run_in_process(script, "--model_name_or_path", tiny_model_dir, *args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in words), err


def test_chat_begins_with_its_files(library, run_in_process, tiny_model_dir, tmp_path):
    saved = tmp_path / "chat.json"
    args = ["--model_name_or_path", tiny_model_dir, "--context_size", 512, "--max_new_tokens", 8]
    args += ["--file", library / "a.md", "--file", library / "b.pdf"]
    code, _, err = run_in_process(CHAT, *args, input=f"/save {saved}\n")
    assert code == 0 and f"read {library / 'b.pdf'}: " in err
    texts = [document["text"] for document in json.loads(saved.read_text())["documents"]]
    assert texts == ["# Text of the notes", "Text of the PDF."]
