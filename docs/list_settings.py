"""Write docs/settings.md: every key of a training YAML that is this repository's own.

    python docs/list_settings.py

The table is made from the dataclasses that read the keys, and a test keeps the file equal to it.
"""

import argparse
import dataclasses
from pathlib import Path

from longqlora.cli import run_main
from longqlora.table import page_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

    from longqlora.files import atomic_file

    text = settings_page()
    with atomic_file(PAGE) as file:
        file.write(text)


def settings_page() -> str:
    """The text of docs/settings.md: its head as it is, then a table for each section."""
    from longqlora.settings.config import SECTIONS, UNSUPPORTED
    from longqlora.settings.reader import REMOVED, RENAMED, TRAINING_DEFAULTS

    parts = [PAGE.read_text(encoding="utf-8").split("\n## ")[0]]
    for name, section in SECTIONS.items():
        rows = [(code(item.name), default(item), item.metadata["help"]) for item in dataclasses.fields(section)]
        parts.append(f"{name.capitalize()}\n\n{section.__doc__}\n\n{page_table(('key', 'default', 'meaning'), rows)}")
    rows = [("`output_dir`", "required"), *((code(key), code(value)) for key, value in TRAINING_DEFAULTS.items())]
    parts.append(f"TrainingArguments with another default here\n\n{page_table(('key', 'default'), rows)}")
    rows = [(code(old), code(new)) for old, new in RENAMED.items()]
    parts.append(
        "Former names\n\nThey are read under the name that the installed transformers knows, with a notice. Without a "
        f"successor, and ignored: {', '.join(map(code, REMOVED))}.\n\n{page_table(('key', 'read as'), rows)}"
    )
    rows = [(code(key), fix) for key, fix in UNSUPPORTED.items()]
    parts.append(f"Refused\n\n{page_table(('key', 'why'), rows)}")
    return "\n## ".join(parts)


def code(value: object) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def default(item: dataclasses.Field) -> str:
    names = {dataclasses.MISSING: "required", None: "none"}
    return names[item.default] if item.default in names else code(item.default)


if __name__ == "__main__":
    run_main(main)
