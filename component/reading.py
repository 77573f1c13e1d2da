"""Load boundaries: whatever a library raises over a user's file becomes one line that names it.

    with reading("model_name_or_path", folder, "give a folder that is whole", part="config.json of "):
        config = AutoConfig.from_pretrained(folder)

Within stands the call of the library alone, so that a defect of ours keeps its traceback. LONGQLORA_TRACEBACK=1 shows
the library's beneath the line. Imports nothing heavy.
"""

import math
import os
import reprlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

MAX_CAUSE = 300


@contextmanager
def reading(flag: str, path: str | os.PathLike, fix: str, *, part: str = "") -> Iterator[None]:
    """Turn any failure within into a ValueError "<flag>: <part>'<path>' cannot be read (<cause>); <fix>".

    flag: the option or YAML key that gave `path`; part: what of it is read. A GPU out of memory passes.
    """
    try:
        yield
    # A panic of a library in Rust (tokenizers) is no Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ValueError(f"{flag}: {part}{str(path)!r} cannot be read ({cause_of(error)}); {fix}") from error


def cause_of(error: BaseException) -> str:
    """What a library says in `error`, on one line and short; with the type, where the text alone may mean nothing."""
    text = " ".join(str(error).split())
    if not isinstance(error, OSError | ValueError) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= MAX_CAUSE else f"{text[:MAX_CAUSE]}..."


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raise ValueError(message) where the block computes for longer. Only the main thread gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame) -> None:
        raise ValueError(message)

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


Kind = tuple[str, Callable[[Any], bool]]
NONE: Kind = "null", lambda value: value is None
TEXT: Kind = "text", lambda value: isinstance(value, str)
SWITCH: Kind = "true or false", lambda value: isinstance(value, bool)
COUNT: Kind = "a whole number of at least 0", lambda value: type(value) is int and 0 <= value < 2**63
POSITIVE: Kind = "a whole number of at least 1", lambda value: type(value) is int and 1 <= value < 2**63
NUMBER: Kind = (
    "a finite number", lambda value: type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
)  # fmt: skip
TEXTS: Kind = "a list of texts", lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value)
COUNTS: Kind = "a list of whole numbers", lambda value: isinstance(value, list) and all(map(COUNT[1], value))
MAPPING: Kind = "a mapping", lambda value: isinstance(value, dict)
NUMBERS: Kind = "a mapping to numbers", lambda value: isinstance(value, dict) and all(map(NUMBER[1], value.values()))
ROWS: Kind = "a list of mappings", lambda value: isinstance(value, list) and all(isinstance(x, dict) for x in value)


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, tuple[Kind, ...]], place: str) -> None:
    """Raise ValueError for the first of `values` that is of none of its `kinds`; those without kinds may be anything.

    place: of the values, for the error.
    """
    for name, allowed in kinds.items():
        if name in values and not any(fits(values[name]) for _, fits in allowed):
            what = " or ".join(text for text, _ in allowed)
            raise ValueError(f"{place}: {name} is {reprlib.repr(values[name])}, not {what}; correct it")
