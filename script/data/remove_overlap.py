"""Take out of training texts what stands in held-out ones: no 50 bytes in a row are left in both.

    python script/data/remove_overlap.py --train_file train.jsonl --eval_file held_out.jsonl --output_dir output/corpus

Both files have rows {"text": ...}. A line of a training text that touches 50 bytes in a row of an evaluation text is
left out, and so is a text of which less than --min_characters are left. No token is shorter than a byte, so no 50
tokens stand in both either, whatever the tokenizer. Writes train.jsonl and, as they were, the evaluation rows as
validation.jsonl.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from longqlora.cli import require_file, run_main
from longqlora.data.jsonl import read_rows
from longqlora.data.overlap import HeldOut, text_bytes
from longqlora.data.row import text_of_row
from longqlora.files import atomic_file
from longqlora.outputs import OutputFolder, check_outputs

TRAIN, VALIDATION = "train.jsonl", "validation.jsonl"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True, metavar="PATH", help='jsonl file, rows {"text": ...}')
    parser.add_argument("--eval_file", required=True, metavar="PATH", help="jsonl file of what must stay unseen")
    parser.add_argument("--output_dir", type=Path, required=True, help=f"folder for {TRAIN} and {VALIDATION}")
    parser.add_argument("--min_characters", type=int, default=512, metavar="N",
                        help="leave out texts of which less is left (default: %(default)s)")  # fmt: skip
    return parser.parse_args()


def texts_of(path: str, flag: str) -> list[str]:
    with require_file(path, flag).open("rb") as file:
        texts = [text for _, text in read_rows(file, path, flag=flag, parse=text_of_row)]
    if not texts:
        raise ValueError(f'{flag}: {path} is empty; give one {{"text": ...}} per line')
    return texts


def main() -> None:
    args = parse_arguments()
    if args.min_characters < 1:
        raise ValueError(f"--min_characters: must be at least 1, got {args.min_characters}")
    inputs = {"--train_file": args.train_file, "--eval_file": args.eval_file}
    check_outputs({"--output_dir": OutputFolder(args.output_dir, TRAIN)}, inputs)
    texts, held_out = (texts_of(path, flag) for flag, path in inputs.items())
    known = HeldOut(map(text_bytes, held_out))
    left = [known.lines_not_shared(text) for text in tqdm(texts, desc="lines that are held out", unit="text")]
    kept = [text for text in left if len(text) >= args.min_characters]
    if not kept:
        raise ValueError(f"--train_file: nothing is left of {args.train_file} without what {args.eval_file} holds")
    for name, rows in ((TRAIN, kept), (VALIDATION, held_out)):
        with atomic_file(args.output_dir / name) as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows)
    num_read, num_kept = (sum(map(len, part)) for part in (texts, kept))
    print(f"train: {len(kept)} of {len(texts)} texts, {1 - num_kept / num_read:.2%} of their characters left out")


if __name__ == "__main__":
    run_main(main)
