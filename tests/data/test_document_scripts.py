"""Documents in use: extract_text.py to training data, /file in the chat, --file in inference.py and chat.py."""

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPO, sentences
from test_documents import epub_bytes, pdf_bytes

from longqlora.data.dataset import build_dataset
from longqlora.data.documents import find_files, with_documents
from longqlora.inference.chat.session import ChatSession
from longqlora.inference.generation import GenerationOptions
from longqlora.settings.config import DataConfig

EXTRACT, INFERENCE, CHAT = "script/data/extract_text.py", "script/inference/inference.py", "script/inference/chat.py"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a script in this process from another folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run_it(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(REPO / script), run_name="__main__")
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run_it


@pytest.fixture
def library(tmp_path) -> Path:
    """A folder of documents, good and bad, known and not, with one in a folder below."""
    folder = tmp_path / "library"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.pdf").write_bytes(pdf_bytes([["Text of the PDF."]]))
    (folder / "größe.epub").write_bytes(epub_bytes())
    (folder / "a.md").write_text("# Text of the notes", encoding="utf-8")
    (folder / "c.txt").write_text("x", encoding="utf-8")
    (folder / "sub" / "d.txt").write_text("Text below.\r\n", encoding="utf-8")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    (folder / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / ".hidden.txt").write_text("hidden")
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]


def test_extract_text_to_training_data(library, run, tmp_path, tiny_tokenizer):
    code, out, err = run(EXTRACT, "--input", "library", "--recursive", "--output_file", "new/texts.jsonl",
                         "--min_characters", 5)  # fmt: skip
    assert code == 0
    assert [(row["source"], row["text"]) for row in rows_of(tmp_path / "new" / "texts.jsonl")] == [
        ("a.md", "# Text of the notes"), ("b.pdf", "Text of the PDF."), ("größe.epub", "First\n\nSecond énd"),
        ("sub/d.txt", "Text below."),
    ]  # fmt: skip
    assert "4 written" in out and "1 failed" in out and "1 left out" in out
    errors = [row for row in err.splitlines() if row.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: broken.pdf: ") and "Traceback" not in err
    config = DataConfig(train_file="", max_seq_length=512, data_cache_dir=str(tmp_path / "cache"))
    dataset, report = build_dataset(tmp_path / "new" / "texts.jsonl", tiny_tokenizer, config)
    assert report.num_rows == 4
    assert tiny_tokenizer.decode(dataset[2]["input_ids"]) == "<s>First\n\nSecond énd</s>"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["texts.jsonl"]


def test_each_file_is_read_once(library, run, tmp_path):
    inputs = ["library/a.md", "library", str(library / "a.md"), "library/sub"]
    assert run(EXTRACT, "--input", *inputs, "--output_file", "out.jsonl")[0] == 0
    sources = [row["source"] for row in rows_of(tmp_path / "out.jsonl")]
    assert sources == ["a.md", "b.pdf", "c.txt", "d.txt", "größe.epub"]


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
        (["--input", "library", "--output_file", "library"], ["--output_file", "is a folder"]),
        (["--input", "library", "--output_file", "library/a.md/out.jsonl"], ["library/a.md"]),
    ],
)
def test_extract_text_refuses(args, words, library, run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out.jsonl").write_text("old")
    code, out, err = run(EXTRACT, "--output_file", "out.jsonl", *args)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and all(word in last for word in words), err
    assert (tmp_path / "out.jsonl").read_text() == "old" and "Traceback" not in err
    assert not list(tmp_path.glob(".*"))


def test_chat_reads_every_format_in_one_wording(library):
    session = ChatSession(SimpleNamespace(context_size=400), "vicuna_v1.1", GenerationOptions(max_new_tokens=10))
    session.encode = lambda messages: [0] * sum(len(message["content"].split()) for message in messages)
    documents = [(str(library / "b.pdf"), "Text of the PDF."), (str(library / "größe.epub"), "First\n\nSecond énd")]
    for path, _ in documents:
        assert "read" in session.run_command(f"/file {path}")
    content = session.messages("And now?", documents=session.documents)[0]["content"]
    assert content == with_documents("And now?", documents)
    assert content.startswith(f"Below is the text of {library / 'b.pdf'}.\n\nText of the PDF.\n\nBelow is the text of ")
    assert content.endswith("Second énd\n\nThe text ends here.\n\nAnd now?")
    assert with_documents("And now?", []) == "And now?"
    result = session.run_command(f"/file {library / 'broken.pdf'}")
    assert result.startswith("error: /file: ") and "damaged" in result and len(session.documents) == 2


def test_inference_puts_files_before_the_prompt(library, run, tiny_model_dir, monkeypatch):
    import longqlora.inference.generation as generation

    seen, encode = [], generation.encode_prompt
    monkeypatch.setattr(
        generation,
        "encode_prompt",
        lambda tokenizer, text, **options: seen.append(text) or encode(tokenizer, text, **options),
    )
    model = ["--model_name_or_path", tiny_model_dir, "--context_size", 512, "--max_new_tokens", 2, "--no-do_sample"]
    files = ["--file", "library/b.pdf", "--file", "library/c.txt"]
    assert run(INFERENCE, *model, *files, "--prompt", "And now?")[0] == 0
    assert seen == [with_documents("And now?", [("library/b.pdf", "Text of the PDF."), ("library/c.txt", "x")])]
    (library / "long.txt").write_text(sentences(2000))
    too_long = [*model, "--file", "library/long.txt", "--prompt", "And now?"]
    code, _, err = run(INFERENCE, *too_long)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: the prompt has ") and "--truncate_prompt" in last
    code, _, err = run(INFERENCE, *too_long, "--truncate_prompt")
    assert code == 0 and "warning: kept 510 of " in err


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        (INFERENCE, ["--prompt", "a", "--file", "nowhere.pdf"], ["--file", "no file", "nowhere.pdf"]),
        (INFERENCE, ["--prompt", "a", "--file", "library"], ["--file", "no file", "library"]),
        (INFERENCE, ["--prompt", "a", "--file", "library/a.md", "--file", "library/broken.pdf"], ["broken.pdf"]),
        (INFERENCE, ["--input_file", "x.jsonl", "--output_file", "y", "--file", "library/a.md"], ["--input_file"]),
        (CHAT, ["--file", "library/broken.pdf"], ["--file: ", "broken.pdf"]),
        (CHAT, ["--file", "library/nothing.txt"], ["--file: ", "no file"]),
    ],
)
def test_bad_files_are_refused_before_the_model_loads(script, args, words, library, run, tiny_model_dir, monkeypatch):
    for place in ("arguments.load_from_arguments", "load.load_for_inference"):
        monkeypatch.setattr(f"longqlora.inference.{place}", lambda *args, **kwargs: pytest.fail("loaded"))
    code, _, err = run(script, "--model_name_or_path", tiny_model_dir, *args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in words), err


def test_chat_begins_with_its_files(library, run, tiny_model_dir, tmp_path, monkeypatch):
    saved, script = tmp_path / "chat.json", tmp_path / "lines"
    script.write_text(f"/save {saved}\n")
    # A real file, since the chat sets the encoding of its input.
    with script.open() as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        args = ["--model_name_or_path", tiny_model_dir, "--context_size", 512, "--max_new_tokens", 8]
        code, _, err = run(CHAT, *args, "--file", library / "a.md", "--file", library / "b.pdf")
    assert code == 0 and f"read {library / 'b.pdf'}: " in err
    texts = [document["text"] for document in json.loads(saved.read_text())["documents"]]
    assert texts == ["# Text of the notes", "Text of the PDF."]
