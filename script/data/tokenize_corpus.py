"""Turn texts into a file of token ids (.bin with a JSON sidecar) for perplexity measurements.

    python script/data/tokenize_corpus.py --input books/ more.jsonl --tokenizer MODEL --output_file books.bin

Inputs: text files; folders of .txt, .text, .md or .jsonl files, searched in depth; JSON-lines files with
one {"text": ...} per line. All may be gzipped (.gz). A text file, or a line of a JSON-lines file, is one
document. Documents keep their order: inputs as given, files in a folder by path. CRLF is read as LF.
Special tokens written out in a text are read as plain text.
"""

import argparse
import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from longqlora.cli import run_main
from longqlora.data.jsonl import UTF8_BOM, check_unread, checked_text, found_keys, parse_line
from longqlora.data.token_file import sidecar_path, token_file_writer
from longqlora.outputs import check_outputs
from longqlora.plot import plot_length_histogram, require_matplotlib

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSON_SUFFIX = ".jsonl"
BAR_WIDTH = 40


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    boolean = argparse.BooleanOptionalAction
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="text files, .jsonl files or folders")
    parser.add_argument("--output_file", type=Path, required=True, help=".bin file to write; its sidecar is named "
                        "after it, with .json added")  # fmt: skip
    parser.add_argument("--tokenizer", required=True, help="folder or hub name of a tokenizer or model")
    parser.add_argument("--text_key", default="text", help="key of the text in .jsonl lines (default: %(default)s)")
    parser.add_argument("--add_bos", action=boolean, default=False, help="put BOS before each document (default: no)")
    parser.add_argument("--add_eos", action=boolean, default=True, help="put EOS after each document (default: yes)")
    parser.add_argument("--min_tokens", type=int, default=1, help="keep only documents of at least this many tokens, "
                        "not counting BOS and EOS (default: %(default)s)")  # fmt: skip
    parser.add_argument("--plot", help="image (.png, .pdf or .svg) of the document lengths")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the tokenizer")
    return parser.parse_args()


def kind_of(path: Path) -> str:
    """The suffix that tells how to read a file, .gz aside."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def input_files(inputs: list[Path]) -> list[Path]:
    """The files to read, in order. A file named outright is read as text whatever its suffix."""
    files = []
    for path in inputs:
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not is_hidden(p.relative_to(path)))
            found = [p for p in inside if kind_of(p) in (*TEXT_SUFFIXES, JSON_SUFFIX)]
            if not found:
                raise ValueError(
                    f"--input: no {', '.join(TEXT_SUFFIXES)} or {JSON_SUFFIX} file (or .gz of one) in {str(path)!r}"
                )
            if len(found) < len(inside):
                print(f"{path}: {len(inside) - len(found)} files of other kinds passed over")
            files += found
        else:
            raise ValueError(f"--input: no file or folder at {str(path)!r}")
    return files


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_documents(path: Path, text_key: str) -> Iterator[str]:
    """Yield the texts of one file; `ValueError` names the file, and the line in a .jsonl file."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            if kind_of(path) == JSON_SUFFIX:
                for number, line in enumerate(file, start=1):
                    line = line.removeprefix(UTF8_BOM) if number == 1 else line
                    if line.strip():
                        yield json_text(line, text_key, f"{path}, line {number}")
            else:
                yield decode(file.read(), str(path))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from None


def json_text(line: bytes, text_key: str, place: str) -> str:
    try:
        row = parse_line(line)
        if text_key not in row:
            raise ValueError(f"no key {text_key!r} (found {found_keys(row)}); name the key with --text_key")
        text = checked_text(row[text_key], repr(text_key))
        check_unread(row, (text_key,))
        return text.replace("\r\n", "\n")
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def special_id(tokenizer, name: str, *, wanted: bool) -> int | None:
    if not wanted:
        return None
    token_id = getattr(tokenizer, f"{name}_token_id")
    if token_id is None:
        raise ValueError(f"--add_{name}: the tokenizer has no {name.upper()} token; pass --no-add_{name}")
    return token_id


def length_table(lengths: list[int]) -> str:
    """Documents and tokens by length, in doublings, as text."""
    lines = [f"{'tokens in document':>21} {'documents':>10} {'tokens':>14}"]
    rows: dict[int, list[int]] = {}
    for length in lengths:
        row = rows.setdefault(length.bit_length() - 1, [0, 0])
        row[0] += 1
        row[1] += length
    most = max(count for count, _ in rows.values())
    for power in range(min(rows), max(rows) + 1):
        count, tokens = rows.get(power, (0, 0))
        bar = "#" * -(-BAR_WIDTH * count // most)
        lines.append(f"{2**power:>9} - {2 ** (power + 1) - 1:>9} {count:>10} {tokens:>14,} {bar}".rstrip())
    lines.append(f"{'all':>21} {len(lengths):>10} {sum(lengths):>14,}")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    if args.min_tokens < 1:
        raise ValueError(f"--min_tokens: must be at least 1, got {args.min_tokens}")
    if args.plot:
        require_matplotlib(args.plot)
    files = input_files(args.input)
    outputs = {"--output_file": [args.output_file, sidecar_path(args.output_file)], "--plot": args.plot}
    check_outputs(outputs, {"--input": [*args.input, *files], "--tokenizer": args.tokenizer})

    from tqdm import tqdm
    from transformers import AutoTokenizer

    local = os.path.expanduser(args.tokenizer)
    if args.tokenizer.startswith((".", "/", "~")) and not os.path.isdir(local):
        raise ValueError(f"--tokenizer: no folder at {args.tokenizer!r}; give the folder of a tokenizer or model")
    source = local if os.path.isdir(local) else args.tokenizer
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    num_dropped = 0
    with token_file_writer(
        args.output_file,
        tokenizer_name=args.tokenizer,
        vocab_size=max(len(tokenizer), tokenizer.vocab_size),
        bos_token_id=special_id(tokenizer, "bos", wanted=args.add_bos),
        eos_token_id=special_id(tokenizer, "eos", wanted=args.add_eos),
    ) as writer:
        with tqdm(total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True) as bar:
            for path in files:
                for text in read_documents(path, args.text_key):
                    # BOS and EOS are added by the writer: whether a tokenizer does so depends on its files.
                    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
                        "input_ids"
                    ]
                    if len(ids) < args.min_tokens:
                        num_dropped += 1
                    else:
                        writer.add_document(ids)
                bar.update(path.stat().st_size)
    print(length_table(writer.document_lengths))
    print(f"dropped: {num_dropped} documents of fewer than {args.min_tokens} tokens")
    print(f"wrote {args.output_file}: {writer.num_tokens:,} tokens, {writer.dtype}")
    if args.plot:
        plot_length_histogram(writer.document_lengths, args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    run_main(main)
