"""Write the Python source found on this machine as train / validation jsonl.

    python script/data/python_corpus.py --output_dir output/corpus [--packages] [--max_chars 10000]

Sources are the standard library and, with --packages, every installed package whose licence is permissive. A file
belongs to the validation split by a hash of its path below its root ("json/decoder.py"), so the split is the same on
every machine and Python version. Lines of training files that touch 50 bytes in a row of a validation file are left
out, so no 50 tokens stand in both, whatever the tokenizer. Output: train.jsonl and validation.jsonl, rows {"text",
"path"}, and sources.json with the name, version, licence and size of what was read.
"""

import argparse
import hashlib
import json
import re
import sysconfig
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from longqlora.cli import run_main
from longqlora.data.overlap import HeldOut, text_bytes
from longqlora.files import atomic_file, write_json
from longqlora.outputs import OutputFolder, check_outputs

STDLIB = Path(sysconfig.get_paths()["stdlib"])
VALIDATION_PERCENT = 5
MIN_BYTES, MAX_BYTES, MAX_MEAN_LINE = 512, 1_000_000, 120
SOURCES = "sources.json"
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|HPND|Zlib|Unlicense|0BSD)\b", re.I)
RESTRICTED = re.compile(r"\b(L?GPL|AGPL|MPL|Mozilla|EPL|CDDL|Proprietary)", re.I)


def is_validation(path: str) -> bool:
    """Decide the split of a file from its POSIX path below its root."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 100 < VALIDATION_PERCENT


def read_source(file: Path) -> str | None:
    """Text of one file; None when it is no UTF-8 or looks generated (tables, minified data)."""
    try:
        if not MIN_BYTES <= file.stat().st_size <= MAX_BYTES:
            return None
        text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if len(text) / (text.count("\n") + 1) <= MAX_MEAN_LINE else None


def stdlib_files() -> list[tuple[str, Path]]:
    skip = {"site-packages", "dist-packages", "encodings", "__pycache__", "lib-dynload"}
    files = [path.relative_to(STDLIB) for path in STDLIB.rglob("*.py")]
    return sorted((file.as_posix(), STDLIB / file) for file in files if skip.isdisjoint(file.parts))


def licence_of(dist: metadata.Distribution) -> str:
    meta = dist.metadata
    parts = [meta.get("License-Expression") or "", (meta.get("License") or "").split("\n")[0][:80]]
    parts += [c.split("::")[-1].strip() for c in meta.get_all("Classifier") or [] if c.startswith("License")]
    return "; ".join(dict.fromkeys(p for p in parts if p and p != "OSI Approved"))


def package_files(dist: metadata.Distribution) -> list[tuple[str, Path]]:
    files = [f for f in dist.files or [] if f.suffix == ".py" and ".." not in f.parts]
    return sorted((str(f), Path(str(dist.locate_file(f)))) for f in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for train.jsonl and validation.jsonl")
    parser.add_argument("--packages", action="store_true", help="also read the installed packages")
    parser.add_argument("--max_chars", type=int, help="cut each training file after so many characters, so that a "
                        "short run sees many files (default: none is cut)")  # fmt: skip
    args = parser.parse_args()
    if args.max_chars is not None and args.max_chars < MIN_BYTES:
        raise ValueError(f"--max_chars: must be at least {MIN_BYTES}, got {args.max_chars}")
    check_outputs({"--output_dir": OutputFolder(args.output_dir, SOURCES)}, {"the standard library": STDLIB})

    origins = [("python", sysconfig.get_python_version(), "PSF-2.0", stdlib_files())]
    if args.packages:
        for dist in sorted(metadata.distributions(), key=lambda d: str(d.metadata["Name"]).lower()):
            licence = licence_of(dist)
            if PERMISSIVE.search(licence) and not RESTRICTED.search(licence):
                origins.append((dist.metadata["Name"], dist.version, licence, package_files(dist)))

    # Paths by their text: a text that is there twice counts once.
    splits: dict[str, dict[str, str]] = {"validation": {}, "train": {}}
    sources = []
    for name, version, licence, files in origins:
        texts = {path: text for path, file in files if (text := read_source(file)) is not None}
        for path, text in texts.items():
            if is_validation(path):
                splits["validation"].setdefault(text, path)
            else:
                splits["train"].setdefault(text[: args.max_chars], path)
        if texts:
            size = {"files": len(texts), "bytes": sum(len(text.encode()) for text in texts.values())}
            sources.append({"name": name, "version": version, "licence": licence, **size})
    # First, since the folder is known by it.
    write_json(args.output_dir / SOURCES, sources)
    held_out = HeldOut(map(text_bytes, splits["validation"]))
    own = {text: held_out.lines_not_shared(text) for text in tqdm(splits["train"], desc="lines shared with validation")}
    num_read, num_kept = (sum(map(len, texts)) for texts in (own, own.values()))
    print(f"train: {1 - num_kept / num_read:.1%} left out, lines that stand in validation files too")
    splits["train"] = {own[text]: path for text, path in splits["train"].items() if len(own[text]) >= MIN_BYTES}
    for split, paths in splits.items():
        path = args.output_dir / f"{split}.jsonl"
        with atomic_file(path) as file:
            for text, source in paths.items():
                file.write(json.dumps({"text": text, "path": source}, ensure_ascii=False) + "\n")
        print(f"{split}: {len(paths)} files, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
