"""The keys of a row: those that carry text are read, or the row is refused; those that describe it may stand beside."""

import re
from collections.abc import Collection, Iterator
from typing import Any

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


def found_keys(row: dict[str, Any]) -> str:
    """The keys of a row for an error message, shortened."""
    keys = [key if len(key) <= 40 else f"{key[:40]}..." for key in row]
    return ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "") if keys else "no keys"
