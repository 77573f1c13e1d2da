"""Token files and their maker, script/data/tokenize_corpus.py: round trips, and every way a file can be wrong."""

import gzip
import importlib.util
import json

import numpy as np
import pytest

from longqlora.cli import run_main
from longqlora.data.token_file import dtype_for_vocab, open_token_file, sidecar_path, write_token_file

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
    "folder": (lambda path: (path.unlink(), path.mkdir()), "no file at"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "odd": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "5 bytes, no multiple of 2"),
    "short": (lambda path: path.write_bytes(path.read_bytes()[:-2]), "holds 2 uint16 tokens, but its sidecar says 3"),
    "changed": (lambda path: path.write_bytes(path.read_bytes()[::-1]), "sha256 differs"),
    "count": (lambda path: change_sidecar(path, num_tokens="many"), "num_tokens 'many'"),
    "dtype": (lambda path: change_sidecar(path, dtype="int8"), "dtype 'int8'"),
    "wrong dtype": (lambda path: change_sidecar(path, dtype="uint32"), "no multiple of 4"),
    "no json": (lambda path: sidecar_path(path).write_text("{"), "not valid JSON"),
    "no object": (lambda path: sidecar_path(path).write_text("[1]"), "not a JSON object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused(tmp_path, name):
    damage, message = BROKEN[name]
    path = write(tmp_path / "x.bin")
    damage(path)
    with pytest.raises(ValueError, match=message):
        _ = open_token_file(path).sha256


def test_asked_dtype_that_does_not_fit_is_refused(tmp_path):
    for dtype, message in (("uint32", "is uint16 by its sidecar, but uint32"), ("int8", "'int8' is not one of")):
        with pytest.raises(ValueError, match=message):
            open_token_file(write(tmp_path / "x.bin"), dtype=dtype)


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
    with pytest.raises(ValueError, match="no tokens to write"):
        write(path, [[]])
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.bin.json"]
    for vocab_size in (0, 2**32 + 1):
        with pytest.raises(ValueError, match="vocab_size"):
            dtype_for_vocab(vocab_size)


# The script


@pytest.fixture
def tokenizer_dir(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_tokenize_every_kind_of_input(tmp_path, tokenizer_dir, tiny_tokenizer, run_script):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden.txt").write_text("never")
    (folder / "skip.pdf").write_bytes(b"%PDF")
    (folder / "a.txt").write_bytes("\ufeffthe quick\r\nfox".encode())
    (folder / "deep" / "b.md.gz").write_bytes(gzip.compress(b"lazy dog"))
    lines = [{"body": "seven </s> wizards\r\n"}, {"body": "x"}, {"body": ""}]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("\n\n".join(map(json.dumps, lines)).encode()))
    (tmp_path / "odd.tex").write_text("river night")
    out = tmp_path / "out.bin"
    outcome = run_script(
        TOKENIZE, "--input", folder, tmp_path / "rows.jsonl.gz", tmp_path / "odd.tex", "--tokenizer", tokenizer_dir,
        "--text_key", "body", "--add_bos", "--min_tokens", "2", "--output_file", out, "--plot", tmp_path / "l.png",
        check=True,
    )  # fmt: skip
    texts = ["the quick\nfox", "lazy dog", "seven </s> wizards\n", "river night"]
    encoded = tiny_tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    assert open_token_file(out).tokens.tolist() == [id for ids in encoded for id in (1, *ids, 2)]
    assert "dropped: 2 documents" in outcome.stdout
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tokenize(repo, tmp_path, tokenizer_dir, monkeypatch, capsys):
    """Run the script in this process, expect exit code 2, return its one line of error."""

    def run(*changes, input, tokenizer=tokenizer_dir, out=tmp_path / "out.bin"):
        spec = importlib.util.spec_from_file_location("script_under_test", repo / TOKENIZE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        words = ["--input", input, "--tokenizer", tokenizer, "--output_file", out, *changes]
        monkeypatch.setattr("sys.argv", [TOKENIZE, *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            run_main(module.main)
        stderr = capsys.readouterr().err
        errors = [line for line in stderr.splitlines() if line.startswith("error:")]
        assert exit_info.value.code == 2 and len(errors) == 1 and stderr.endswith(errors[0] + "\n"), stderr
        return errors[0]

    return run


BAD_CORPORA = {
    "key": ("x.jsonl", b'\n{"txt": "a"}\n', "x.jsonl line 2: no key 'text' (found txt)"),
    "lost text": ("x.jsonl", b'{"text": "a", "abstract": "b"}\n', 'line 1: the key "abstract" carries text'),
    "number": ("x.jsonl", b'{"text": 3}\n', "line 1: 'text' is of type int"),
    "line bytes": ("x.jsonl", b'{"text": "\xe9"}\n', "line 1: not UTF-8"),
    "latin": ("x.txt", b"\xe9t\xe9", "x.txt' is not UTF-8"),
    "gzip": ("x.txt.gz", gzip.compress(b"text" * 99)[:-9], "not a complete gzip file"),
    "no gzip": ("x.txt.gz", b"plain", "not a complete gzip file"),
    "empty": ("x.txt", b"", "no tokens to write"),
}


@pytest.mark.parametrize("name", BAD_CORPORA)
def test_bad_corpus_is_named_in_one_line(tmp_path, tokenize, name):
    filename, data, message = BAD_CORPORA[name]
    (tmp_path / filename).write_bytes(data)
    assert message in tokenize(input=tmp_path / filename) and not (tmp_path / "out.bin").exists()


def test_bad_arguments(tmp_path, tokenizer_dir, tokenize):
    text = tmp_path / "x.txt"
    text.write_text("a b c")
    assert "--input: nothing at" in tokenize(input=tmp_path / "absent")
    assert "no file found; give files or folders with .txt, .text" in tokenize(input=tokenizer_dir)
    assert "no folder at" in tokenize(input=text, tokenizer=tmp_path / "absent")
    assert "which --input reads" in tokenize(input=text, out=text)
    assert "is a folder" in tokenize(input=text, out=tmp_path)
    assert "--min_tokens: must be at least 1" in tokenize("--min_tokens", "0", input=text)
    assert "must end in one of .png" in tokenize("--plot", "x.doc", input=text)


@pytest.mark.realdata
def test_llama2_ids_of_a_book_are_those_of_the_reference(tmp_path, shared_data, run_script):
    book, out = shared_data / "pg19/validation/356.txt", tmp_path / "book.bin"
    run_script(TOKENIZE, "--input", book, "--tokenizer", shared_data / "llama2_tokenizer", "--output_file", out,
               check=True)  # fmt: skip
    reference = open_token_file(shared_data / "pg19/pg19_validation_28of50.llama2.uint16.bin")
    assert np.array_equal(open_token_file(out).tokens, reference.tokens[:60258])
