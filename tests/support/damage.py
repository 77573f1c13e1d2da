"""Damage to files that users hand over: whole files, single values, and random mutations."""

import copy
import json
import random
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import yaml

from longqlora.cli import USER_ERRORS, one_line

MAX_SECONDS = 10


class Hung(BaseException):
    """Something took longer than MAX_SECONDS."""


@contextmanager
def no_hang():
    """Raise Hung, which no `except Exception` hides, where the block takes longer than MAX_SECONDS."""

    def stop(signum, frame) -> None:
        raise Hung

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def outcome(use: Callable[[], object], *words: str) -> str:
    """ "ran", or the one line that `run_main` would print, which must be short and hold `words`; all else is raised."""
    try:
        with no_hang():
            use()
    except USER_ERRORS as error:
        line = one_line(error)
        assert len(line) < 800, f"longer than anyone reads: {line}"
        assert not [word for word in words if word not in line], f"{words} not all in: {line}"
        return line
    return "ran"


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(change(file.read_bytes()))


# What can happen to any file.
FILE_DAMAGES = {
    "empty": rewrite(lambda data: b""),
    "blank": rewrite(lambda data: b" \n"),
    "cut in half": rewrite(lambda data: data[: len(data) // 2]),
    "cut at the end": rewrite(lambda data: data[:-3]),
    "not UTF-8": rewrite(lambda data: b"\xff\xfe\xfa" + data),
    "zeros": rewrite(lambda data: bytes(len(data))),
    "text": rewrite(lambda data: b"hello world\n" * 9),
    "a list": rewrite(lambda data: b"[1, 2]"),
    "a number": rewrite(lambda data: b"17"),
    "null": rewrite(lambda data: b"null"),
    "nested": rewrite(lambda data: b"[" * 100_000),
    "nested objects": rewrite(lambda data: b'{"a": ' * 50_000 + b"1" + b"}" * 50_000),
    "a long number": rewrite(lambda data: b'{"a": ' + b"9" * 9999 + b"}"),
    "a web page": rewrite(lambda data: b"<!DOCTYPE html><html><body>404</body></html>"),
    "of git lfs": rewrite(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
    "a folder": replace_by_folder,
    "a dangling link": lambda file: (file.unlink(), file.symlink_to("nowhere")),
}
NESTED = json.loads('{"a": ' * 60 + "[]" + "}" * 60)
ODD_VALUES = [
    None, True, False, 0, 1, -1, 7, 10**9, 10**18, -(10**30), 10**400, 0.5, -2.5, 1e300, float("inf"), float("nan"),
    "", "x", "17", "true", "auto", "../../etc/passwd", "/dev/null", "\ud800", "\x00", "{{ x }}", "a" * 5000,
    [], [1], ["x"], [None], [[]], [0.5, "a"], {}, {"a": 1}, {"": None}, {"type": "x"}, NESTED,
]  # fmt: skip


def places(value, path=()) -> list[tuple]:
    """The path of every value within `value`, its own first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in items for place in places(child, (*path, key)))]


def mutate_value(value, rng: random.Random):
    """A copy of JSON-like `value` with one to three of its parts dropped, replaced, added or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        # A long vocabulary is as likely to be met as one key.
        tops = list(value) if isinstance(value, dict) else []
        start = (rng.choice(tops),) if tops else ()
        place = rng.choice(places(value[start[0]], start) if start else [()])
        if not place:
            return copy.deepcopy(rng.choice(ODD_VALUES))
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        key, kind = place[-1], rng.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice([f"{key}x", str(key).upper(), "0"])] = parent.pop(key)
        elif kind == 2 and isinstance(parent[key], int | float) and abs(parent[key]) < 1e15:
            parent[key] = rng.choice([-parent[key], parent[key] * 10**9, parent[key] + 0.5, str(parent[key])])
        elif kind == 3:
            parent[key] = [parent[key], copy.deepcopy(parent[key])]
        else:
            parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return value


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` with bytes flipped, left out, doubled, put in, or cut off."""
    changed, kind = bytearray(data), rng.randrange(5)
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice([1, 1, 2, 8, 64]))
    if kind == 0:
        for position in range(start, end):
            changed[position] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[start:end]
    elif kind == 2:
        changed[start:start] = data[start:end] * rng.choice([1, 3, 1000])
    elif kind == 3:
        changed[start:start] = rng.choice(
            [b"{", b"}", b"[", b'"', b",", b":", b"\x00", b"\xff", b"- ", b"&a *a", b"\n"]
        )
    else:
        del changed[start:]
    return bytes(changed)


def mutated(data: bytes, rng: random.Random, *, is_yaml: bool = False) -> bytes:
    """One random mutation of a file of JSON, or of YAML: of its bytes or of its values."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    value = mutate_value(yaml.safe_load(data) if is_yaml else json.loads(data), rng)
    if is_yaml:
        return yaml.safe_dump(value).encode("utf-8", "surrogatepass")
    return json.dumps(value).encode()
