"""Turn documents (PDF, EPUB, HTML, Markdown, text) into a jsonl file to train on.

    python script/data/extract_text.py --input papers/ books/dune.epub --recursive --output_file data/texts.jsonl

Each line is {"text": ..., "source": ...}, in the order of the sources' names: what train_file takes with sft: false.
source is the file's name, or its path below the folder given. A document that cannot be read is one line on stderr,
and the others are read; the exit code is 0 if any was written, else 2. In folders, files of other formats and hidden
ones are passed over.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from longqlora.cli import one_line, run_main
from longqlora.data.documents import FORMAT_LIST, READERS, find_files, read_document
from longqlora.files import atomic_file
from longqlora.outputs import check_outputs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH",
                        help=f"files and folders of documents ({FORMAT_LIST})")  # fmt: skip
    parser.add_argument("--output_file", type=Path, required=True, metavar="PATH", help="jsonl file to write")
    parser.add_argument("--min_characters", type=int, default=1, metavar="N",
                        help="leave out documents with less text than this (default: %(default)s)")  # fmt: skip
    parser.add_argument("--recursive", action="store_true", help="look into folders within folders (default: no)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.min_characters < 1:
        raise ValueError(f"--min_characters: must be at least 1, got {args.min_characters}")
    documents = sorted(find_files(args.input, READERS, is_recursive=args.recursive))
    check_outputs({"--output_file": args.output_file}, {"--input": [*args.input, *(path for _, path in documents)]})
    num_written = num_failed = num_short = num_characters = 0
    with atomic_file(args.output_file) as file:
        for name, path in tqdm(documents, desc="extract", unit="file"):
            try:
                text = read_document(path, flag=name)
            except (ValueError, OSError) as error:
                num_failed += 1
                tqdm.write(f"error: {one_line(error)}", file=sys.stderr)
                continue
            if len(text) < args.min_characters:
                num_short += 1
                continue
            file.write(json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n")
            num_written, num_characters = num_written + 1, num_characters + len(text)
        if not num_written:
            raise ValueError(
                f"--input: of {len(documents)} documents {num_failed} failed and {num_short} are shorter than "
                f"--min_characters {args.min_characters}; nothing was written"
            )
    short = f", {num_short} left out as too short" if num_short else ""
    print(f"{args.output_file}: {num_written} written ({num_characters:,} characters), {num_failed} failed{short}")


if __name__ == "__main__":
    run_main(main)
