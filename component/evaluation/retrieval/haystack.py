"""Prompts of an exact length with a needle in them, and the user's own text as the haystack around it."""

import bisect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longqlora.cli import require_file
from longqlora.data.prompt import encode_after
from longqlora.files import decode_utf8

# After a full stop with its closing quotes, and before a line break.
BORDER = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s)|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d]*|(?<=\S)(?=\n)")
# A passage without any border is cut at a space, so that the needle still comes near its depth.
MAX_PIECE_CHARACTERS = 1000
BETWEEN_TEXTS = "\n\n"


@dataclass(frozen=True)
class NeedlePrompt:
    """Ids of a prompt: `before`, haystack, `needle`, haystack, `after`.

    split: (number of tokens, depth 0 .. 1) -> so much haystack, in two parts that the needle comes between.
    """

    before: list[int]
    needle: list[int]
    after: list[int]
    split: Callable[[int, float], tuple[list[int], list[int]]]

    @property
    def min_length(self) -> int:
        """Tokens of a prompt without any haystack."""
        return len(self.before) + len(self.needle) + len(self.after)

    def num_haystack_tokens(self, length: int) -> int:
        """Tokens of haystack in a prompt of `length` tokens; ValueError where not even the needle fits."""
        if length < self.min_length:
            raise ValueError(
                f"length {length} is too short for needle and question, which need {self.min_length} tokens of this "
                "tokenizer; give a longer one"
            )
        return length - self.min_length

    def build(self, *, length: int, depth: float) -> list[int]:
        """Ids of a prompt of exactly `length` tokens."""
        first, second = self.split(self.num_haystack_tokens(length), depth)
        return [*self.before, *first, *self.needle, *second, *self.after]


def read_haystack(paths: Sequence[str | os.PathLike]) -> str:
    """The text of all files, in the order given; of a folder its .txt files, by name, subfolders included."""
    texts, flag = [], "--haystack"
    for path in map(Path, paths):
        files = sorted(found for found in path.rglob("*.txt") if found.is_file()) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{flag}: no .txt file in the folder {str(path)!r}; give text files")
        for file in files:
            text = decode_utf8(require_file(file, flag).read_bytes(), flag, str(file))
            if "\0" in text:
                raise ValueError(f"{flag}: {str(file)!r} is a binary file; give text")
            texts.append(text.replace("\r\n", "\n").replace("\r", "\n").strip())
    whole = BETWEEN_TEXTS.join(filter(None, texts))
    if not whole:
        raise ValueError(f"{flag}: the files hold no text; give others")
    return whole


def pieces(text: str) -> Iterator[str]:
    """`text` cut at its sentence borders; every piece but the first starts with the white space before it."""
    start = 0
    for end in [*(found.end() for found in BORDER.finditer(text)), len(text)]:
        while end - start > MAX_PIECE_CHARACTERS:
            space = text.rfind(" ", start + 1, start + MAX_PIECE_CHARACTERS)
            cut = space if space > 0 else start + MAX_PIECE_CHARACTERS
            yield text[start:cut]
            start = cut
        if end > start:
            yield text[start:end]
            start = end


class Haystack:
    """`text` as ids of `tokenizer`, as many as are asked for; repeated where it is too short.

    ids: the tokens so far. borders: places in `ids`, ascending, where a sentence begins. num_tokens_once:
    tokens of the text itself, None as long as its end was not reached.
    """

    def __init__(self, tokenizer, text: str):
        self.tokenizer, self.text = tokenizer, text
        self.ids: list[int] = []
        self.borders: list[int] = []
        self.num_tokens_once: int | None = None
        self._pieces = pieces(text)

    def grow(self, num_tokens: int) -> None:
        """Have at least `num_tokens` ids."""
        while len(self.ids) < num_tokens:
            piece = next(self._pieces, None)
            if piece is None:
                if not self.ids:
                    raise ValueError("the tokenizer turns the haystack into no tokens at all; give another text")
                self.num_tokens_once = self.num_tokens_once or len(self.ids)
                self._pieces = pieces(BETWEEN_TEXTS + self.text)
                continue
            self.borders.append(len(self.ids))
            self.ids += encode_after(self.tokenizer, ".", piece)

    def num_repeats(self, num_tokens: int) -> int:
        """How often the text occurs, at least in part, in `num_tokens` tokens."""
        self.grow(num_tokens)
        return -(-num_tokens // self.num_tokens_once) if self.num_tokens_once else 1

    def split(self, num_tokens: int, depth: float) -> tuple[list[int], list[int]]:
        """The first `num_tokens` ids, cut in two at the sentence border nearest to `depth` (0 start .. 1 end).

        With depth 1 the second part is empty, even if the last sentence is not whole.
        """
        self.grow(num_tokens)
        borders = self.borders[: bisect.bisect_left(self.borders, num_tokens)] or [0]
        nearest = num_tokens if depth == 1 else min(borders, key=lambda border: abs(border - depth * num_tokens))
        return self.ids[:nearest], self.ids[nearest:num_tokens]
