"""Write docs/settings.md: every key of a training YAML that is this repository's own.

    python script/list_settings.py

The table is made from the dataclasses that read the keys, and a test keeps the file equal to it.
"""

import argparse
import dataclasses
from pathlib import Path

from longqlora.cli import run_main

HEAD = """# Settings

A training YAML holds `key: value` lines; `--key value` on the command line overrides one of them:

    deepspeed train.py --train_args_file train_args/llama2-7b-pretrain.yaml --max_steps 100

Keys are those below and those of transformers'
[TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments).
A key alone on the command line is true. Relative input paths are looked up below the working directory, then below
the repository. An unknown key, a value of the wrong type or a missing file ends the run with one line and exit code 2
before anything is loaded. `--dry_run` checks everything, weights by the headers of their files.

This file is written by `python script/list_settings.py`.
"""
TITLES = {
    "model": "Model", "context": "Context", "attention": "Attention", "adapter": "What is trained", "memory": "Memory",
    "parallel": "Several GPUs for one row", "data": "Data", "output": "Output", "log": "Log",
}  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

    from longqlora.files import atomic_file

    with atomic_file(Path(__file__).resolve().parents[1] / "docs" / "settings.md") as file:
        file.write(settings_page())


def settings_page() -> str:
    """The text of docs/settings.md."""
    from longqlora.settings.config import SECTIONS
    from longqlora.settings.reader import REMOVED, RENAMED, TRAINING_DEFAULTS
    from longqlora.training.checks import UNSUPPORTED

    parts = [HEAD]
    for name, title in TITLES.items():
        fields = dataclasses.fields(SECTIONS[name])
        rows = [(f"`{field.name}`", shown_default(field), field.metadata["help"]) for field in fields]
        parts.append(f"## {title}\n\n{table(('key', 'default', 'meaning'), rows)}")
    rows = [("`output_dir`", "required"), *((f"`{key}`", f"`{value}`") for key, value in TRAINING_DEFAULTS.items())]
    parts.append(f"## TrainingArguments with another default here\n\n{table(('key', 'default'), rows)}")
    rows = [(f"`{old}`", f"`{new}`") for old, new in RENAMED.items()]
    removed = ", ".join(f"`{key}`" for key in REMOVED)
    parts.append(
        "## Former names\n\nThey are read under the name that the installed transformers knows, with a notice. "
        f"Without a successor, and ignored: {removed}.\n\n{table(('key', 'read as'), rows)}"
    )
    rows = [(f"`{key}`", fix) for key, fix in UNSUPPORTED.items()]
    parts.append(f"## Refused\n\n{table(('key', 'why'), rows)}")
    return "\n".join(parts)


def shown_default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "none"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    run_main(main)
