"""Flat files of token ids (`X.bin`) with a JSON sidecar (`X.bin.json`) that says what they hold.

The `.bin` part is what LongLoRA and LongQLoRA evaluate on: little-endian ids one after the other,
uint16, or uint32 where the vocabulary needs it, no header. Their files have no sidecar and are read as
uint16. The sidecar: format, tokenizer, vocab_size, dtype, num_tokens, document_lengths (in tokens,
BOS and EOS included), add_bos, add_eos, bos_token_id, eos_token_id, sha256.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from longqlora.cli import require_file
from longqlora.files import atomic_file, read_json, write_json

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
FORMAT = "token ids, little-endian, no header"
SCAN_TOKENS = 2**22
# Enough ids that a real uint16 text cannot have a zero at every second place.
DTYPE_PROBE_TOKENS = 64


def dtype_for_vocab(vocab_size: int) -> str:
    """The smallest dtype name that holds the ids 0 .. vocab_size - 1."""
    if not 1 <= vocab_size <= 2**32:
        raise ValueError(f"vocab_size {vocab_size} is outside 1 .. 2**32")
    return "uint16" if vocab_size <= 2**16 else "uint32"


def sidecar_path(path: str | os.PathLike) -> Path:
    return Path(f"{Path(path)}.json")


@dataclass(frozen=True)
class TokenFile:
    """An open token file. `tokens` is a read-only memory map, uint16 or uint32, shape [num_tokens]."""

    path: Path
    tokens: np.memmap
    dtype: str
    sidecar: dict[str, Any] | None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, computed once; `ValueError` if the sidecar tells another."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        found, told = digest.hexdigest(), (self.sidecar or {}).get("sha256")
        if told is not None and told != found:
            raise ValueError(
                f"{str(self.path)!r} is not the file that {sidecar_path(self.path).name} describes (sha256 differs); "
                "tokenize again, or remove the sidecar if the file is right"
            )
        return found

    def check_ids(self, vocab_size: int) -> None:
        """Raise `ValueError` with the first position whose id is not below `vocab_size`."""
        for start in range(0, self.num_tokens, SCAN_TOKENS):
            block = self.tokens[start : start + SCAN_TOKENS]
            if int(block.max()) >= vocab_size:
                offset = int(np.argmax(block >= vocab_size))
                raise ValueError(
                    f"{str(self.path)!r}: id {int(block[offset])} at position {start + offset} is outside the "
                    f"vocabulary of {vocab_size}; the file was made with another tokenizer or is not {self.dtype}"
                )


def open_token_file(path: str | os.PathLike, *, dtype: str | None = None, flag: str = "--data_path") -> TokenFile:
    """Map a token file into memory and check it against its sidecar, if it has one.

    `dtype`: "uint16" or "uint32"; None takes the sidecar's, or uint16 without sidecar. `flag` names the
    option that gave the path, for messages. Raises `ValueError` for a file that is missing, empty, of a
    size that is no multiple of the id size, or at odds with its sidecar.
    """
    path = require_file(path, flag)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    sidecar = _read_sidecar(path)
    if sidecar and dtype and dtype != sidecar["dtype"]:
        raise ValueError(f"{str(path)!r} is {sidecar['dtype']} by its sidecar, but {dtype} was asked for")
    name = sidecar["dtype"] if sidecar else dtype or "uint16"
    num_bytes, id_bytes = path.stat().st_size, DTYPES[name].itemsize
    if num_bytes == 0:
        raise ValueError(f"{flag}: {str(path)!r} is empty")
    if num_bytes % id_bytes:
        raise ValueError(
            f"{flag}: {str(path)!r} has {num_bytes} bytes, no multiple of {id_bytes}: not a {name} token file, or "
            "cut off"
        )
    tokens = np.memmap(path, dtype=DTYPES[name], mode="r")
    if sidecar and len(tokens) != sidecar["num_tokens"]:
        raise ValueError(
            f"{flag}: {str(path)!r} holds {len(tokens)} {name} tokens, but its sidecar says {sidecar['num_tokens']}; "
            "the file is cut off or not the one that was described"
        )
    if sidecar is None and dtype is None:
        probe = tokens[1::2][:DTYPE_PROBE_TOKENS]
        if len(probe) == DTYPE_PROBE_TOKENS and not probe.any() and tokens[0::2][:DTYPE_PROBE_TOKENS].any():
            raise ValueError(f"{flag}: {str(path)!r} has no sidecar and looks like uint32, not uint16; give the dtype")
    return TokenFile(path, tokens, name, sidecar)


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    location = sidecar_path(path)
    if not location.is_file():
        return None
    sidecar = read_json(location, "sidecar")
    if not isinstance(sidecar, dict):
        raise ValueError(f"sidecar {str(location)!r} is not a JSON object")
    if sidecar.get("dtype") not in DTYPES:
        raise ValueError(f"sidecar {str(location)!r}: dtype {sidecar.get('dtype')!r} is not one of {', '.join(DTYPES)}")
    num_tokens = sidecar.get("num_tokens")
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int):
        raise ValueError(f"sidecar {str(location)!r}: num_tokens {num_tokens!r} is not a whole number")
    return sidecar


class TokenWriter:
    """Appends documents to an open token file; made by `token_file_writer`."""

    def __init__(self, file: IO[bytes], vocab_size: int, bos_token_id: int | None, eos_token_id: int | None):
        self.file, self.vocab_size = file, vocab_size
        self.dtype = dtype_for_vocab(vocab_size)
        self.prefix = [] if bos_token_id is None else [bos_token_id]
        self.suffix = [] if eos_token_id is None else [eos_token_id]
        self.document_lengths: list[int] = []
        self.digest = hashlib.sha256()

    @property
    def num_tokens(self) -> int:
        return sum(self.document_lengths)

    def add_document(self, ids: Sequence[int]) -> None:
        """Append one document, between BOS and EOS where they were asked for."""
        row = np.asarray([*self.prefix, *ids, *self.suffix], dtype=np.int64)
        if len(row) == 0:
            return
        bad = (row < 0) | (row >= self.vocab_size)
        if bad.any():
            position = int(np.argmax(bad))
            raise ValueError(
                f"document {len(self.document_lengths)}: id {int(row[position])} at position {position} is outside the "
                f"vocabulary of {self.vocab_size}"
            )
        data = row.astype(DTYPES[self.dtype]).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.document_lengths.append(len(row))


@contextmanager
def token_file_writer(
    path: str | os.PathLike,
    *,
    tokenizer_name: str,
    vocab_size: int,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> Iterator[TokenWriter]:
    """Write `path` and its sidecar document by document, in memory that grows by one number a document.

    `bos_token_id` / `eos_token_id`: put before / after each document when not None. Both files appear
    when the block ends without error; `ValueError` when no token was written.
    """
    path = Path(path)
    with atomic_file(path, "wb") as file:
        writer = TokenWriter(file, vocab_size, bos_token_id, eos_token_id)
        yield writer
        if not writer.document_lengths:
            raise ValueError(f"no tokens to write to {str(path)!r}: every document was empty or dropped")
    write_json(
        sidecar_path(path),
        {
            "format": FORMAT,
            "tokenizer": tokenizer_name,
            "vocab_size": vocab_size,
            "dtype": writer.dtype,
            "num_tokens": writer.num_tokens,
            "num_documents": len(writer.document_lengths),
            "add_bos": bos_token_id is not None,
            "add_eos": eos_token_id is not None,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "sha256": writer.digest.hexdigest(),
            "document_lengths": writer.document_lengths,
        },
    )
