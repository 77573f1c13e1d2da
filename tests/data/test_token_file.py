"""Token files and their maker, script/data/tokenize_corpus.py: round trips, and every way a file can be wrong."""

import gzip
import json

import numpy as np
import pytest

from longqlora.data.token_file import open_token_file, sidecar_path, write_token_file

TOKENIZE = "script/data/tokenize_corpus.py"


def write(path, documents=((5, 6, 7),), *, vocab_size=320, **options):
    write_token_file(path, documents, tokenizer_name="tiny", vocab_size=vocab_size, **options)
    return path


@pytest.mark.parametrize("vocab_size, dtype", [(320, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_round_trip(tmp_path, vocab_size, dtype):
    top = vocab_size - 1
    path = write(tmp_path / "a" / "x.bin", [[5, top], [], [7]], vocab_size=vocab_size, bos_token_id=1, eos_token_id=2)
    file = open_token_file(path)
    assert file.tokens.tolist() == [1, 5, top, 2, 1, 2, 1, 7, 2]
    assert file.tokens.dtype == np.dtype(dtype) and path.stat().st_size == 9 * np.dtype(dtype).itemsize
    assert file.sidecar["document_lengths"] == [4, 2, 3] and file.sidecar["dtype"] == dtype
    assert file.sidecar["sha256"] == file.sha256
    file.check_ids(vocab_size)
    with pytest.raises(ValueError, match=f"is {dtype} by its sidecar, but int32"):
        open_token_file(path, dtype="int32")


def test_files_without_sidecar(tmp_path):
    path = tmp_path / "x.bin"
    np.array([1, 2, 3, 70000], dtype="<u4").tofile(path)
    assert open_token_file(path).num_tokens == 8, "uint16 unless told"
    assert open_token_file(path, dtype="uint32").tokens.tolist() == [1, 2, 3, 70000]
    np.arange(200, dtype="<u4").tofile(path)
    with pytest.raises(ValueError, match="looks like uint32"):
        open_token_file(path)
    assert open_token_file(path, dtype="uint16").num_tokens == 400


def change_sidecar(path, **values):
    sidecar = json.loads(sidecar_path(path).read_text())
    sidecar_path(path).write_text(json.dumps({**sidecar, **values}))


BROKEN = {
    "missing": (lambda path: path.unlink(), "no file at"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "odd": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "5 bytes, no multiple of 2"),
    "short": (lambda path: path.write_bytes(path.read_bytes()[:-2]), "holds 2 uint16 tokens, but its sidecar says 3"),
    "changed": (lambda path: path.write_bytes(path.read_bytes()[::-1]), "sha256 differs"),
    "count": (lambda path: change_sidecar(path, num_tokens="many"), "its sidecar says 'many'"),
    "dtype": (lambda path: change_sidecar(path, dtype="int8"), "dtype 'int8'"),
    "wrong dtype": (lambda path: change_sidecar(path, dtype="uint32"), "no multiple of 4"),
    "no json": (lambda path: sidecar_path(path).write_text("{"), "not valid JSON"),
    "no object": (lambda path: sidecar_path(path).write_text("[1]"), "no JSON object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused(tmp_path, name):
    damage, message = BROKEN[name]
    path = write(tmp_path / "x.bin")
    damage(path)
    with pytest.raises(ValueError, match=message):
        _ = open_token_file(path).sha256


def test_first_id_outside_the_vocabulary_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("longqlora.data.token_file.SCAN_TOKENS", 3)
    file = open_token_file(write(tmp_path / "x.bin", [[5, 6, 7, 8, 300, 9, 310]]))
    with pytest.raises(ValueError, match="id 300 at position 4 is outside the vocabulary of 300"):
        file.check_ids(300)


@pytest.mark.parametrize("ids", [[320], [3, -1]])
def test_writer_refuses_bad_ids_and_keeps_what_was_there(tmp_path, ids):
    path = write(tmp_path / "x.bin", [[5]])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"document 1: id {ids[-1]} at position .* outside the vocabulary"):
        write(path, [[1, 2], ids])
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.bin.json"]


# The script


def test_tokenize_every_kind_of_input(tmp_path, tiny_model_dir, tiny_tokenizer, run_in_process):
    folder, out = tmp_path / "texts", tmp_path / "out.bin"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden.txt").write_text("never")
    (folder / "skip.pdf").write_bytes(b"%PDF")
    (folder / "a.txt").write_bytes("\ufeffthe quick\r\nfox".encode())
    (folder / "deep" / "b.md.gz").write_bytes(gzip.compress(b"lazy dog"))
    lines = [{"body": "seven </s> wizards\r\n"}, {"body": "x"}, {"body": ""}]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("\n\n".join(map(json.dumps, lines)).encode()))
    (tmp_path / "odd.tex").write_text("river night")
    code, printed, _ = run_in_process(
        TOKENIZE, "--input", folder, tmp_path / "rows.jsonl.gz", tmp_path / "odd.tex", "--tokenizer", tiny_model_dir,
        "--text_key", "body", "--add_bos", "--min_tokens", "2", "--output_file", out, "--plot", tmp_path / "l.png",
    )  # fmt: skip
    texts = ["the quick\nfox", "lazy dog", "seven </s> wizards\n", "river night"]
    encoded = tiny_tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    assert open_token_file(out).tokens.tolist() == [id for ids in encoded for id in (1, *ids, 2)]
    assert code == 0 and "dropped: 2 documents" in printed
    run_in_process(
        TOKENIZE, "--input", folder, "--tokenizer", tiny_model_dir, "--output_file", out, "--total_tokens", 5
    )
    assert open_token_file(out).tokens.tolist() == [id for ids in encoded[:2] for id in (*ids[:2], 2)]
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


# Name: (file of texts, its content, further arguments, the error).
BAD_CORPORA = {
    "key": ("x.jsonl", b'\n{"txt": "a"}\n', [], "x.jsonl line 2: no key 'text' (found txt)"),
    "lost text": ("x.jsonl", b'{"text": "a", "abstract": "b"}\n', [], 'line 1: the key "abstract" carries text'),
    "number": ("x.jsonl", b'{"text": 3}\n', [], "line 1: 'text' is of type int"),
    "latin": ("x.txt", b"\xe9t\xe9", [], "x.txt' is not UTF-8"),
    "gzip": ("x.txt.gz", gzip.compress(b"text" * 99)[:-9], [], "not a complete gzip file"),
    "no gzip": ("x.txt.gz", b"plain", [], "not a complete gzip file"),
    "empty": ("x.txt", b"", [], "no tokens to write"),
    "no known file": ("x.pdf", b"", ["--input", "."], "no file found; give files or folders with .txt, .text"),
    "no input": ("x.txt", b"a", ["--input", "absent"], "--input: nothing at 'absent'"),
    "no tokenizer": ("x.txt", b"a", ["--tokenizer", "./absent"], "--tokenizer: no folder at './absent'"),
    "no length": ("x.txt", b"a", ["--min_tokens", "0"], "--min_tokens: must be at least 1"),
    "no end": ("x.txt", b"a", ["--total_tokens", "0"], "--total_tokens: must be at least 1"),
    "no image": ("x.txt", b"a", ["--plot", "x.doc"], "must end in one of .png"),
}


@pytest.mark.parametrize("name", BAD_CORPORA)
def test_bad_corpus_is_one_line(tmp_path, tiny_model_dir, run_in_process, monkeypatch, name):
    filename, data, arguments, message = BAD_CORPORA[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / filename).write_bytes(data)
    words = ["--input", filename, "--tokenizer", tiny_model_dir, "--output_file", "out.bin", *arguments]
    code, _, stderr = run_in_process(TOKENIZE, *words)
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and stderr.endswith(errors[0] + "\n") and message in errors[0], stderr
    assert not (tmp_path / "out.bin").exists()


@pytest.mark.realdata
def test_llama2_ids_of_a_book_are_those_of_the_reference(tmp_path, shared_data, run_in_process):
    book, out = shared_data / "pg19/validation/356.txt", tmp_path / "book.bin"
    run_in_process(TOKENIZE, "--input", book, "--tokenizer", shared_data / "llama2_tokenizer", "--output_file", out)
    reference = open_token_file(shared_data / "pg19/pg19_validation_28of50.llama2.uint16.bin")
    assert np.array_equal(open_token_file(out).tokens, reference.tokens[:60258])
