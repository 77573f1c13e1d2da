"""The rows of jsonl files: every error names the key, the file, the line, and the fix.

A row is read whole or refused: a key that carries text and is not read ends the run (`check_unread`).
"""

import json
import os
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from longqlora.cli import require_file
from longqlora.data.prompt import check_messages, checked_text

T = TypeVar("T")
UTF8_BOM = b"\xef\xbb\xbf"
# Last words of the keys that describe a row and are no part of its text: "id", "conversation_id", "createdAt", "file".
METADATA_WORDS = frozenset(
    "id ids pid qid uid uuid guid hash sha md index idx source sources origin dataset subset corpus split fold set "
    "dump name names type types kind category categories class classes label labels domain domains topic topics tag "
    "tags keywords lang language languages license copyright url urls uri link links path paths file filename title "
    "titles author authors creator publisher date dates time timestamp created updated added year at version revision "
    "model models generator engine meta metadata format encoding length len size tokens count score scores rating "
    "level quality difficulty status state country ip agent collection identifier extractor langs languages lid "
    "separator seperator language_script warcinfo".split()
)


def read_rows(
    lines: Iterable[bytes], path: str | os.PathLike, *, flag: str, parse: Callable[[dict], T] = dict, first: int = 1
) -> Iterator[tuple[int, T]]:
    """(line number, parsed object) of the lines of the file `path`; blank lines and byte order marks are passed over.

    Raises ValueError "<flag>: <path> line 17: <what>; <fix>" for a line that is no JSON object, or that `parse` refuses
    with a ValueError. flag: the option or YAML key that gave the path; first: number of the first line.
    """
    for number, line in enumerate(lines, start=first):
        if not is_blank(line):
            try:
                row = parse(parse_line(line))
            except ValueError as error:
                raise error_at(path, number, error, flag=flag) from None
            yield number, row


def check_data_file(path: str | os.PathLike, *, sft: bool, flag: str) -> int:
    """Check every row of a training file, of conversations where `sft`, and return their number, at least 1."""
    with require_file(path, flag).open("rb") as file:
        for _ in read_rows(file, path, flag=flag, parse=messages_of_row if sft else text_of_row):
            pass
    return len(index_rows(path, sft=sft, flag=flag)["line"])


def index_rows(path: str | os.PathLike, *, sft: bool, flag: str) -> dict[str, array]:
    """The lines of a file that are not blank: columns "line", counted from 1, and "offset", its first byte."""
    index, offset = {"line": array("q"), "offset": array("q")}, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not is_blank(line):
                index["line"].append(number)
                index["offset"].append(offset)
            offset += len(line)
    if not index["line"]:
        example = SFT_EXAMPLES if sft else '{"text": ...}'
        raise ValueError(f"{flag}: {path} is empty; give one JSON object per line: {example}")
    return index


def is_blank(line: bytes) -> bool:
    return not line.removeprefix(UTF8_BOM).strip()


def error_at(path: str | os.PathLike, line_number: int, error: Exception | str, *, flag: str) -> ValueError:
    """The ValueError for what is wrong with one line of a file."""
    return ValueError(f"{flag}: {Path(path)} line {line_number}: {error}")


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object on a line of a jsonl file. Raises ValueError saying what is there instead."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from None
    try:
        row = json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deep; give one flat object per line") from None
    except ValueError as error:
        fix = "jsonl has one object per line, so write no array" if text.lstrip()[0] in "[]" else "correct the line"
        raise ValueError(f"not valid JSON ({error}); {fix}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object; give one object per line")
    return row


def text_of_row(row: dict[str, Any]) -> str:
    """The text of a pretraining row {"text": ...}. Raises ValueError where it has none, or text elsewhere."""
    if "text" not in row:
        keys = found_keys(row)
        if is_sft_row(row):
            raise ValueError(f'no key "text" but those of an SFT file ({keys}); set sft: true or give pretraining rows')
        raise ValueError(f'no key "text" (found {keys}); give {{"text": ...}}')
    text = checked_text(row["text"], '"text"')
    check_unread(row, ("text",))
    return text


class SftForm(NamedTuple):
    """A form of an SFT row: keys that it needs, keys that it reads too (beside "system"), and its reader."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any]], list[dict[str, str]]]


def messages_of_row(row: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of an SFT row in any of `SFT_FORMS`, ending with an answer. Raises ValueError where it has none."""
    form = sft_form(row)
    messages = form.read(row)
    system = checked_text(row["system"], '"system"') if row.get("system") is not None else ""
    if system.strip():
        if messages[0]["role"] == "system":
            raise ValueError(f'"system" beside a system message in "{form.needed[0]}"; keep one of them')
        messages = [{"role": "system", "content": system}, *messages]
    check_unread(row, (*form.needed, *form.optional, "system"))
    return messages


def sft_form(row: dict[str, Any]) -> SftForm:
    """The first form whose keys the row has; files made of several forms hold null for the keys of the others."""
    for present in ({key for key, value in row.items() if value is not None}, row.keys()):
        for form in SFT_FORMS:
            if set(form.needed) <= present:
                return form
    if "text" in row and not is_sft_row(row):
        raise ValueError('a pretraining row (key "text") in an SFT file; set sft: false or give an SFT file')
    nearest = max(SFT_FORMS, key=lambda form: len(row.keys() & set(form.needed)))
    missing = next(key for key in nearest.needed if key not in row)
    raise ValueError(f'no key "{missing}" (found {found_keys(row)}); give {SFT_EXAMPLES}')


def messages_of_instruction(row: dict[str, Any]) -> list[dict[str, str]]:
    """Alpaca: the instruction and, where there is one, the input on the next line, after the turns of a history."""
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in history):
        raise ValueError('"history" is no list of [question, answer]; give the earlier turns so')
    parts = [checked_text(row[key], f'"{key}"') for key in ("instruction", "input") if row.get(key) is not None]
    question = "\n".join(part for part in parts if part.strip())
    return [*messages_of_pairs(history, '"history"'), *messages_of_pairs([(question, row["output"])], '"output"')]


def messages_of_lists(row: dict[str, Any]) -> list[dict[str, str]]:
    """ChunkLlama's dialogues: the user's messages under "inputs", the answers under "outputs"."""
    inputs, outputs = row["inputs"], row["outputs"]
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError('"inputs" and "outputs" are no lists of equal length; give an output for each input')
    return messages_of_pairs(zip(inputs, outputs, strict=True), 'a text in "inputs" or "outputs"')


def messages_of_conversation(row: dict[str, Any], *, key: str) -> list[dict[str, str]]:
    """[{"role", "content"}, ...] from that same form or from [{"human", "assistant"}, ...] under `key`."""
    conversation = row[key]
    if not isinstance(conversation, list):
        raise ValueError(f'"{key}" is of type {type(conversation).__name__}; give a list of messages')
    keys = ("human", "assistant")
    if conversation and all(isinstance(turn, dict) and set(keys) <= turn.keys() for turn in conversation):
        pairs = enumerate(([turn["human"], turn["assistant"]] for turn in conversation), start=1)
        messages = [m for number, pair in pairs for m in messages_of_pairs([pair], f"a text of turn {number}")]
    else:
        keys = ("role", "content")
        check_messages(conversation, last_role="assistant")
        messages = [{name: message[name] for name in keys} for message in conversation]
    for number, turn in enumerate(conversation, start=1):
        check_unread(turn, keys, where=f'turn {number} of "{key}": ')
    return messages


def messages_of_pairs(pairs: Iterable[Sequence[Any]], name: str) -> list[dict[str, str]]:
    """The messages of (question, answer) pairs; `name` is where they come from, for the ValueError."""
    turns = [turn for pair in pairs for turn in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": checked_text(text, name)} for role, text in turns]


def check_unread(row: dict[str, Any], read: Collection[str], *, where: str = "") -> None:
    """Raise ValueError for a key that carries text and is not among the keys that were `read`.

    Allowed are numbers, empty values, names of `METADATA_WORDS`, a text that was read under another key too, and the
    whole row as one "text", as tatsu-lab/alpaca has it.
    """
    known = {text.strip() for key in read if key in row for text in texts_in(row[key])}
    unread = [
        key
        for key, value in row.items()
        if not (
            key in read
            or is_metadata(key, value)
            or known.issuperset(text.strip() for text in texts_in(value))
            or (key == "text" and isinstance(value, str) and all(text in value for text in known))
        )
    ]
    if unread:
        names = ", ".join(f'"{key[:40]}"' for key in unread[:10]) + (", ..." if len(unread) > 10 else "")
        keys, them = (f"keys {names} carry", "them") if len(unread) > 1 else (f"key {names} carries", "it")
        beside = ", ".join(name for name in row if name in read)
        raise ValueError(
            f'{where}the {keys} text that is not read beside {beside}; remove {them}, or put {them} under "meta"'
        )


def is_metadata(key: str, value: Any = None) -> bool:
    """Whether `key` names a description, or `value` is an object of nothing but such keys (WildChat's "header")."""
    last_word = re.findall(r"[a-z]+|[A-Z]+[a-z]*", key)[-1:]
    if any(name.lower() in METADATA_WORDS for name in (key, *last_word)):
        return True
    return isinstance(value, dict) and all(is_metadata(name) for name, inner in value.items() if any(texts_in(inner)))


def texts_in(value: Any) -> Iterator[str]:
    """The strings of a JSON value that are not blank, at any depth."""
    if isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)
    elif isinstance(value, str) and value.strip():
        yield value


def is_sft_row(row: dict[str, Any]) -> bool:
    return any(row.keys() & set(form.needed) for form in SFT_FORMS)


def found_keys(row: dict[str, Any]) -> str:
    """The keys of a row for an error message, shortened."""
    keys = [key if len(key) <= 40 else f"{key[:40]}..." for key in row]
    return ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "") if keys else "no keys"


# The forms of an SFT row, in the order in which they are tried.
SFT_FORMS = (
    SftForm(("conversation",), (), partial(messages_of_conversation, key="conversation")),
    SftForm(("messages",), (), partial(messages_of_conversation, key="messages")),
    SftForm(("instruction", "output"), ("input", "history"), messages_of_instruction),
    SftForm(("input", "output"), ("history",), messages_of_instruction),
    SftForm(("inputs", "outputs"), (), messages_of_lists),
)
SFT_EXAMPLES = (
    '{"instruction": ..., "input": ..., "output": ...}, {"input": ..., "output": ...} or '
    '{"conversation": [{"role": ..., "content": ...}, ...]}'
)
