"""Read and check jsonl training files: every error names the key, the file, the line, and the fix."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from component.cli import require_file
from component.prompt import check_messages

CONVERSATION_KEYS = ("conversation", "messages")
SFT_FORMS = '{"input": ..., "output": ...} or {"conversation": [{"role": ..., "content": ...}, ...]}'
UTF8_BOM = b"\xef\xbb\xbf"


def check_data_file(path: str | os.PathLike, *, sft: bool, flag: str) -> int:
    """Check every row of a jsonl file and return their number, at least 1.

    sft: rows are conversations, else texts. flag: the YAML key that gave the path.
    Raises ValueError "<flag>: <path> line 17: <what>; <fix>" at the first bad row.
    """
    num_rows = sum(1 for _ in iter_rows(path, sft=sft, flag=flag))
    if num_rows == 0:
        example = SFT_FORMS if sft else '{"text": ...}'
        raise ValueError(f"{flag}: {path} is empty; give one JSON object per line: {example}")
    return num_rows


def iter_rows(path: str | os.PathLike, *, sft: bool, flag: str) -> Iterator[tuple[int, str | list[dict]]]:
    """Yield (line number, content) of every row; the content is a text, or messages where `sft`.

    Blank lines, CRLF and a byte order mark are tolerated. Raises ValueError as `check_data_file` does.
    """
    path = require_file(path, flag)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(UTF8_BOM) if number == 1 else line
            if not line.strip():
                continue
            try:
                row = parse_line(line)
                content = messages_of_row(row) if sft else text_of_row(row)
            except ValueError as error:
                raise error_at(path, number, error, flag=flag) from None
            yield number, content


def error_at(path: str | os.PathLike, line_number: int, error: Exception | str, *, flag: str) -> ValueError:
    """The ValueError for what is wrong with one line of a file."""
    return ValueError(f"{flag}: {Path(path)} line {line_number}: {error}")


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object on a line of a jsonl file. Raises ValueError saying what is there instead."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from None
    try:
        row = json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deep; give one flat object per line") from None
    except ValueError as error:
        fix = "jsonl has one object per line, so write no array" if text.lstrip()[0] in "[]" else "mend the line"
        raise ValueError(f"not valid JSON ({error}); {fix}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object; give one object per line")
    return row


def text_of_row(row: dict[str, Any]) -> str:
    """The text of a pretraining row {"text": ...}. Raises ValueError where it has none."""
    if "text" not in row:
        keys = found_keys(row)
        if is_sft_row(row):
            raise ValueError(
                f'no key "text" but those of an SFT file ({keys}); set sft: true or give a pretraining file'
            )
        raise ValueError(f'no key "text" (found {keys}); give {{"text": ...}}')
    return checked_text(row["text"], '"text"')


def messages_of_row(row: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of an SFT row in any of its forms, ending with an answer. Raises ValueError where it has none."""
    key = next((key for key in CONVERSATION_KEYS if key in row), None)
    if key is not None:
        messages = messages_of_conversation(row[key], key)
    elif {"input", "output"} <= row.keys():
        messages = pair(checked_text(row["input"], '"input"'), checked_text(row["output"], '"output"'))
    elif "text" in row and not is_sft_row(row):
        raise ValueError('a pretraining row (key "text") in an SFT file; set sft: false or give an SFT file')
    else:
        missing = next((f'no key "{name}"' for name in ("input", "output") if name not in row), "")
        raise ValueError(f"{missing} (found {found_keys(row)}); give {SFT_FORMS}")
    return messages


def messages_of_conversation(conversation: Any, key: str) -> list[dict[str, str]]:
    """[{"role", "content"}, ...] from that same form or from [{"human", "assistant"}, ...]."""
    if not isinstance(conversation, list):
        raise ValueError(f'"{key}" is of type {type(conversation).__name__}; give a list of messages')
    if conversation and all(isinstance(turn, dict) and {"human", "assistant"} <= turn.keys() for turn in conversation):
        turns = [
            pair(checked_text(turn["human"], f'"human" of turn {number}'),
                 checked_text(turn["assistant"], f'"assistant" of turn {number}'))
            for number, turn in enumerate(conversation, start=1)
        ]  # fmt: skip
        return [message for turn in turns for message in turn]
    check_messages(conversation, last_role="assistant")
    return [
        {"role": message["role"], "content": checked_text(message["content"], f"the content of message {number}")}
        for number, message in enumerate(conversation, start=1)
    ]


def pair(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def checked_text(value: Any, name: str) -> str:
    """`value` if it is text that can be encoded. Raises ValueError otherwise."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is of type {type(value).__name__}; give a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"\\u{ord(value[error.start]):04x}"
        raise ValueError(f"{name} has half of a surrogate pair ({code}); write the whole character") from None
    return value


def is_sft_row(row: dict[str, Any]) -> bool:
    return bool(row.keys() & {"input", "output", *CONVERSATION_KEYS})


def found_keys(row: dict[str, Any]) -> str:
    """The keys of a row for an error message, shortened."""
    keys = [key if len(key) <= 40 else f"{key[:40]}..." for key in row]
    return ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "") if keys else "no keys"
