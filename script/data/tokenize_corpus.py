"""Turn texts into a file of token ids (.bin with a JSON sidecar) for perplexity measurements.

    python script/data/tokenize_corpus.py --input books/ more.jsonl --tokenizer MODEL --output_file books.bin

Inputs: text files; JSON-lines files with one {"text": ...} per line; folders of such files (.txt, .text, .md, .jsonl),
searched in depth. All may be gzipped (.gz). A text file, or a line of a JSON-lines file, is one document. Documents
keep their order: inputs as given, files in a folder by path. CRLF is read as LF. Special tokens written out in a text
are read as plain text.
"""

import argparse
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from longqlora.cli import require_folder, run_main
from longqlora.data.columns import check_unread, found_keys
from longqlora.data.documents import find_files
from longqlora.data.jsonl import read_rows
from longqlora.data.prompt import checked_text, encode_texts
from longqlora.data.token_file import sidecar_path, write_token_file
from longqlora.files import decode_utf8
from longqlora.outputs import check_outputs
from longqlora.plot import plot_length_histogram
from longqlora.table import text_table

JSON_SUFFIX = ".jsonl"
SUFFIXES = (".txt", ".text", ".md", JSON_SUFFIX)


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
    parser.add_argument("--total_tokens", type=int, help="cut each document after its equal share of so many, so that "
                        "no long one outweighs the rest (default: none is cut)")  # fmt: skip
    parser.add_argument("--plot", help="image (.png, .pdf or .svg) of the document lengths")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the tokenizer")
    return parser.parse_args()


def read_documents(path: Path, text_key: str) -> Iterator[str]:
    """The texts of one file: the rows of a JSON-lines file, else all of it. ValueError names the file and the line."""

    def text_of(row: dict) -> str:
        if text_key not in row:
            raise ValueError(f"no key {text_key!r} (found {found_keys(row)}); name the key with --text_key")
        check_unread(row, (text_key,))
        return checked_text(row[text_key], repr(text_key))

    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            if path.name.removesuffix(".gz").lower().endswith(JSON_SUFFIX):
                yield from (text for _, text in read_rows(file, path, flag="--input", parse=text_of))
            else:
                yield decode_utf8(file.read(), "--input", str(path))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"--input: {str(path)!r} is not a complete gzip file ({error})") from None


def length_table(lengths: list[int]) -> str:
    """Documents and tokens by length, in doublings, as text."""
    powers = range(min(lengths).bit_length() - 1, max(lengths).bit_length())
    groups = {power: [length for length in lengths if length.bit_length() - 1 == power] for power in powers}
    rows = [(f"{2**power} - {2 ** (power + 1) - 1}", len(own), f"{sum(own):,}") for power, own in groups.items()]
    rows.append(("all", len(lengths), f"{sum(lengths):,}"))
    return text_table(("tokens in document", "documents", "tokens"), rows, num_left=0)


def main() -> None:
    args = parse_args()
    for name in ("min_tokens", "total_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name}: must be at least 1, got {value}")
    suffixes = [*SUFFIXES, *(f"{suffix}.gz" for suffix in SUFFIXES)]
    files = [path for _, path in find_files(args.input, suffixes, is_recursive=True)]
    outputs = {"--output_file": [args.output_file, sidecar_path(args.output_file)], "--plot": args.plot}
    check_outputs(outputs, {"--input": [*args.input, *files], "--tokenizer": args.tokenizer})

    from tqdm import tqdm

    from longqlora.model.base import load_tokenizer

    source = os.path.expanduser(args.tokenizer)
    if source.startswith((".", "/", "~")):
        require_folder(source, "--tokenizer")
    tokenizer = load_tokenizer(source, trust_remote_code=args.trust_remote_code, flag="--tokenizer")
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos") if getattr(args, f"add_{name}")}
    for name, token_id in special.items():
        if token_id is None:
            raise ValueError(f"--add_{name}: the tokenizer has no {name.upper()} token; pass --no-add_{name}")
    num_dropped = 0

    def texts() -> Iterator[str]:
        with tqdm(total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True) as bar:
            for path in files:
                for text in read_documents(path, args.text_key):
                    yield text.replace("\r\n", "\n")
                bar.update(path.stat().st_size)

    def documents() -> Iterator[Sequence[int]]:
        nonlocal num_dropped
        for ids in encode_texts(tokenizer, texts()):
            num_dropped += len(ids) < args.min_tokens
            if len(ids) >= args.min_tokens:
                yield ids

    kept = documents()
    if args.total_tokens:
        kept = list(kept)
        kept = [ids[: args.total_tokens // len(kept)] for ids in kept]
    written = write_token_file(
        args.output_file,
        kept,
        tokenizer_name=args.tokenizer,
        vocab_size=max(len(tokenizer), tokenizer.vocab_size),
        bos_token_id=special.get("bos"),
        eos_token_id=special.get("eos"),
    )
    print(length_table(written["document_lengths"]))
    print(f"dropped: {num_dropped} documents of fewer than {args.min_tokens} tokens")
    print(f"wrote {args.output_file}: {written['num_tokens']:,} tokens, {written['dtype']}")
    if args.plot:
        plot_length_histogram(written["document_lengths"], args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    run_main(main)
