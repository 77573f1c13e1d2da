"""Flat files of token ids (`X.bin`) with a JSON sidecar (`X.bin.json`) that says what they hold.

The `.bin` part is what LongLoRA and LongQLoRA evaluate on: little-endian ids one after the other, uint16, or uint32
where the vocabulary needs it, no header. Their files have no sidecar and are read as uint16. Document lengths in the
sidecar are in tokens, BOS and EOS included.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from longqlora.cli import require_file
from longqlora.files import atomic_file, file_sha256, read_json, write_json
from longqlora.reading import COUNTS, NONE, TEXT, check_kinds

ID_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SIDECAR_KINDS = {"dtype": (TEXT,), "sha256": (TEXT, NONE), "document_lengths": (COUNTS, NONE)}
SCAN_TOKENS = 2**22
# Enough ids that a real uint16 text cannot have a zero at every second place.
DTYPE_PROBE_TOKENS = 64


def sidecar_path(path: str | os.PathLike) -> Path:
    return Path(f"{Path(path)}.json")


@dataclass(frozen=True)
class TokenFile:
    """An open token file. `tokens` is a read-only memory map, uint16 or uint32, shape [num_tokens]."""

    path: Path
    tokens: np.memmap
    sidecar: dict[str, Any] | None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def sha256(self) -> str:
        """Hash of the file. Raises ValueError where the sidecar tells another."""
        found, told = file_sha256(self.path), (self.sidecar or {}).get("sha256")
        if told is not None and told != found:
            raise ValueError(
                f"{str(self.path)!r} is not the file that {sidecar_path(self.path).name} describes (sha256 differs); "
                "tokenize again, or remove the sidecar if the file is right"
            )
        return found

    def check_ids(self, vocab_size: int) -> None:
        """Raise ValueError with the first position whose id is not below `vocab_size`."""
        for start in range(0, self.num_tokens, SCAN_TOKENS):
            block = self.tokens[start : start + SCAN_TOKENS]
            if int(block.max()) >= vocab_size:
                offset = int(np.argmax(block >= vocab_size))
                raise ValueError(
                    f"{str(self.path)!r}: id {int(block[offset])} at position {start + offset} is outside the "
                    f"vocabulary of {vocab_size}; the file was made with another tokenizer or dtype than {block.dtype}"
                )


def open_token_file(path: str | os.PathLike, *, dtype: str | None = None, flag: str = "--data_path") -> TokenFile:
    """Map a token file into memory and check it against its sidecar, if it has one.

    dtype: "uint16" or "uint32"; None takes the sidecar's, or uint16 without sidecar. flag: the option that gave the
    path, for errors. Raises ValueError for a file that is missing, empty, of a size that is no multiple of the id size,
    or at odds with its sidecar.
    """
    path = require_file(path, flag)
    sidecar = read_sidecar(path)
    if sidecar and dtype and dtype != sidecar["dtype"]:
        raise ValueError(f"{str(path)!r} is {sidecar['dtype']} by its sidecar, but {dtype} was asked for")
    name = sidecar["dtype"] if sidecar else dtype or "uint16"
    num_bytes, id_bytes, place = path.stat().st_size, ID_DTYPES[name].itemsize, f"{flag}: {str(path)!r}"
    if num_bytes == 0:
        raise ValueError(f"{place} is empty")
    if num_bytes % id_bytes:
        raise ValueError(f"{place} has {num_bytes} bytes, no multiple of {id_bytes}: not a {name} file, or cut off")
    tokens = np.memmap(path, dtype=ID_DTYPES[name], mode="r")
    if sidecar and len(tokens) != sidecar.get("num_tokens"):
        found = f"holds {len(tokens)} {name} tokens, but its sidecar says {sidecar.get('num_tokens')!r}"
        raise ValueError(f"{place} {found}; the file is cut off or not the one that was described")
    if sidecar is None and dtype is None:
        probe = tokens[1::2][:DTYPE_PROBE_TOKENS]
        if len(probe) == DTYPE_PROBE_TOKENS and not probe.any() and tokens[0::2][:DTYPE_PROBE_TOKENS].any():
            raise ValueError(f"{place} has no sidecar and looks like uint32, not uint16; give the dtype")
    return TokenFile(path, tokens, sidecar)


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The checked sidecar of a token file; None where it has none."""
    location = sidecar_path(path)
    if not location.is_file():
        return None
    sidecar = read_json(location, "sidecar")
    check_kinds({"dtype": None, **sidecar}, SIDECAR_KINDS, f"sidecar {str(location)!r}")
    dtype = sidecar["dtype"]
    if dtype not in ID_DTYPES:
        raise ValueError(f"sidecar {str(location)!r}: dtype {dtype!r} is not one of {', '.join(ID_DTYPES)}")
    return sidecar


def write_token_file(
    path: str | os.PathLike,
    documents: Iterable[Sequence[int]],
    *,
    tokenizer_name: str,
    vocab_size: int,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> dict[str, Any]:
    """Write the ids of documents and the sidecar, which is returned, in memory that grows by one number a document.

    bos_token_id, eos_token_id: put before / after each document when not None. Both files appear when all is written.
    Raises ValueError for an id outside the vocabulary, and when there is no token to write.
    """
    path, dtype = Path(path), "uint16" if vocab_size <= 2**16 else "uint32"
    prefix, suffix = ([] if token is None else [token] for token in (bos_token_id, eos_token_id))
    lengths: list[int] = []
    digest = hashlib.sha256()
    with atomic_file(path, "wb") as file:
        for ids in documents:
            row = np.concatenate([np.asarray(part, dtype=np.int64) for part in (prefix, ids, suffix)])
            if len(row) == 0:
                continue
            bad = np.flatnonzero((row < 0) | (row >= vocab_size))
            if len(bad):
                place = f"document {len(lengths)}: id {row[bad[0]]} at position {bad[0]}"
                raise ValueError(f"{place} is outside the vocabulary of {vocab_size}")
            data = row.astype(ID_DTYPES[dtype]).tobytes()
            file.write(data)
            digest.update(data)
            lengths.append(len(row))
        if not lengths:
            raise ValueError(f"no tokens to write to {str(path)!r}: every document was empty or dropped")
    sidecar = {
        "format": "token ids, little-endian, no header",
        "tokenizer": tokenizer_name,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "num_tokens": sum(lengths),
        "num_documents": len(lengths),
        "add_bos": bos_token_id is not None,
        "add_eos": eos_token_id is not None,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "sha256": digest.hexdigest(),
        "document_lengths": lengths,
    }
    write_json(sidecar_path(path), sidecar)
    return sidecar
