"""Test data never in training: 50 tokens in a row of a training text stand in no validation text."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from rigged_model import load_script
from tokenizers import Tokenizer

from longqlora.data.overlap import RUN_LENGTH, HeldOut, run_hashes, text_bytes

RNG = np.random.default_rng(0)
TOKENIZER = Tokenizer.from_file(str(REPO / "data" / "tiny-llama" / "tokenizer.json"))


@pytest.fixture
def script():
    return load_script("script/data/python_corpus.py")


def token_runs(texts) -> set[bytes]:
    """Every run of 50 token ids in `texts`, by the tokenizer of the demo and the suites."""
    encoded = (TOKENIZER.encode(text, add_special_tokens=False) for text in texts)
    rows = [np.array(encoding.ids, np.uint16).tobytes() for encoding in encoded]
    size = 2 * RUN_LENGTH
    return {row[start : start + size] for row in rows for start in range(0, len(row) - size + 1, 2)}


def write_corpus(script, monkeypatch, output_dir: Path, *words: str) -> tuple[list[str], list[str]]:
    """The training and the validation texts that it writes."""
    monkeypatch.setattr(sys, "argv", ["python_corpus.py", "--output_dir", str(output_dir), *words])
    script.main()
    rows = [(output_dir / f"{split}.jsonl").read_text().splitlines() for split in ("train", "validation")]
    return tuple([json.loads(row)["text"] for row in part] for part in rows)


@pytest.mark.parametrize("length", [1, 3, 7, 50])
def test_shared_runs_are_those_of_a_plain_search(length):
    held_out = [RNG.integers(0, 3, 90) for _ in range(3)]
    document = np.concatenate([RNG.integers(0, 5, 70), held_out[1][:60], [9], held_out[2][-50:], [9]])
    known = {tuple(row[start : start + length]) for row in held_out for start in range(len(row) - length + 1)}
    expected = np.zeros(len(document), bool)
    for start in range(len(document) - length + 1):
        expected[start : start + length] |= tuple(document[start : start + length]) in known
    np.testing.assert_array_equal(HeldOut(held_out, length).shared(document), expected)
    assert expected.any() and not expected.all() and not HeldOut(held_out, length).shared(document[:0]).any()
    assert len(run_hashes(document, length)) == len(document) - length + 1


def test_lines_that_are_held_out_are_left_out_until_none_is_left():
    secret = "a line of fifty bytes and more that must not be seen\nand another one\n"
    held_out = HeldOut([text_bytes(f"x = 1\n{secret}y = 2\n")])
    assert held_out.lines_not_shared(f"# é\nz\n{secret}end") == "# é\nend", "z's line end is shared"
    assert held_out.lines_not_shared(secret) == "" == held_out.lines_not_shared("")
    # What is joined when the middle is left out is shared anew.
    long = "b" * 49 + "\n" + "c" * 49 + "\n" + "d" * 60
    held_out = HeldOut(map(text_bytes, (long[:40] + "\n" + "c" * 20, "d" * 55, "q" * 30 + "\n" + "r" * 30)))
    text = "q" * 30 + "\n" + "d" * 60 + "\n" + "r" * 30
    assert held_out.lines_not_shared(text) == ""


def test_a_corpus_shares_no_50_tokens(script, monkeypatch, tmp_path):
    """Files that share a licence and a function; validation files are written as they are."""
    names = [f"module_{number}.py" for number in range(120)]
    licence = "# Licensed under some terms that every file repeats, word for word, at its beginning.\n"
    function = "def shared(value):\n" + "".join(f"    value = value * {n} + {n * n}\n" for n in range(20))
    originals = {}
    for name in names:
        own = "".join(f"{name[:-3]}_{n} = {RNG.integers(0, 10**9)}\n" for n in range(40))
        originals[name] = licence + own + (function if RNG.random() < 0.5 else "") + own[::-1] + "\n"
        (tmp_path / name).write_text(originals[name])
    monkeypatch.setattr(script, "stdlib_files", lambda: [(name, tmp_path / name) for name in names])
    train, validation = write_corpus(script, monkeypatch, tmp_path / "out")
    held_out = [originals[name] for name in names if script.is_validation(name)]
    assert validation == held_out and 0 < len(held_out) < len(train) == 120 - len(held_out)
    assert token_runs(originals[name] for name in names if not script.is_validation(name)) & token_runs(held_out)
    assert not token_runs(train) & token_runs(validation)
    assert all("_20 = " in text for text in train)
    part = write_corpus(script, monkeypatch, tmp_path / "part", "--max_chars", "900")
    assert part[1] == validation and len(part[0]) == len(train) and max(map(len, part[0])) <= 900 < min(map(len, train))


def test_what_is_held_out_leaves_the_training_texts(tmp_path, run_in_process):
    """A text of nothing else goes whole; evaluation rows stay what they are."""
    shared = "".join(f"Line {n} of a notice that the publisher puts into every book of his.\n" for n in range(30))
    own = ["".join(f"{name} {n} says {RNG.integers(0, 10**12)}\n" for n in range(60)) for name in ("Ada", "Bob", "Cy")]
    files = {"train": [shared + own[0], shared, own[1]], "eval": [own[2] + shared]}
    for name, texts in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = [x for name in files for x in (f"--{name}_file", tmp_path / f"{name}.jsonl")]
    code, printed, error = run_in_process("script/data/remove_overlap.py", *words, "--output_dir", tmp_path / "out")
    assert code == 0 and "2 of 3 texts" in printed, error
    rows = [(tmp_path / "out" / f"{split}.jsonl").read_text().splitlines() for split in ("train", "validation")]
    train, validation = ([json.loads(row)["text"] for row in part] for part in rows)
    assert train == own[:2] and validation == files["eval"]
    assert token_runs(files["train"]) & token_runs(validation) and not token_runs(train) & token_runs(validation)
    words[1] = words[3]
    code, _, error = run_in_process("script/data/remove_overlap.py", *words, "--output_dir", tmp_path / "none")
    assert code == 2 and "nothing is left" in error and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_demos_corpus_shares_no_50_tokens(script, monkeypatch, tmp_path):
    train, validation = write_corpus(script, monkeypatch, tmp_path)
    held_out = token_runs(validation)
    assert len(held_out) > 100_000 and len(train) > 500
    for text in train:
        assert held_out.isdisjoint(token_runs([text]))


@pytest.mark.slow
def test_the_books_share_no_50_tokens(shared_data):
    """PG-19's splits are by title."""
    held_out = token_runs(path.read_text() for path in (shared_data / "pg19" / "validation").glob("*.txt"))
    assert len(held_out) > 1_000_000
    for path in (shared_data / "pg19" / "train").glob("*.txt.gz"):
        assert held_out.isdisjoint(token_runs([gzip.decompress(path.read_bytes()).decode()])), path.name
