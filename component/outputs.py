"""Where a command may put its results: decided here for every script, before any work.

    check_outputs({"--output_file": path, "--plot": image}, {"--data_path": ids, "--base_model": folder})

A result file of an earlier run is replaced. What is never replaced: what the command reads, another of its own
outputs, anything that is no plain file, and a folder that the command did not write itself.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from longqlora.files import partial_name

Place = str | os.PathLike
IMAGE_FORMATS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class OutputFolder:
    """A folder that a command fills or replaces.

    marker: path within it by which the command knows a folder of its own. overwrite: whether such a one may go.
    """

    path: Place
    marker: str
    overwrite: bool = field(default=True, kw_only=True)


Output = Place | OutputFolder


def check_outputs(
    outputs: Mapping[str, Output | Sequence[Output] | None], inputs: Mapping[str, Place | Sequence[Place] | None]
) -> None:
    """Raise ValueError where writing `outputs` would lose something, or cannot work; writes nothing.

    Both by the flag or name that gave them; None, and inputs that are no paths (hub names), are passed over. An
    output must not be an input or another output, nor lie within a folder of them or around one: by resolved path and
    by inode, with the hidden names that are kept beside it until it is whole.
    """
    taken = [(name, Path(os.path.expanduser(path)), "reads") for name, path in listed(inputs)]
    taken = [(name, path, verb) for name, path, verb in taken if os.path.exists(path)]
    for name, output in listed(outputs):
        folder = output if isinstance(output, OutputFolder) else None
        path = Path(folder.path if folder else output)
        fault = fault_of_place(path, is_folder=folder is not None)
        if not fault and name == "--plot" and path.suffix.lower() not in IMAGE_FORMATS:
            fault = f"must end in one of {', '.join(IMAGE_FORMATS)}"
        for other_name, other, verb in taken:
            if not fault and (overlaps(path, other) or (verb == "writes" and overlaps(other, path))):
                fault = f"overlaps {str(other)!r}, which {other_name} {verb}; choose another place"
        if not fault and folder and path.is_dir() and any(path.iterdir()):
            if not (path / folder.marker).exists():
                fault = f"is not empty, and no folder of this command ({folder.marker} is missing); choose another"
            elif not folder.overwrite:
                fault = "is not empty; choose another folder or pass --overwrite"
        if fault:
            raise ValueError(f"{name}: {str(path)!r} {fault}")
        taken.append((name, path, "writes"))
        check_writable(name, path)


def check_results(args: argparse.Namespace, inputs: Mapping[str, Place | Sequence[Place] | None]) -> None:
    """`check_outputs` for --output_file and, where the script has it, --plot."""
    check_outputs({"--output_file": args.output_file, "--plot": getattr(args, "plot", None)}, inputs)


def listed(given: Mapping) -> list[tuple[str, Output]]:
    """(name, path) of every path there is."""
    rows = {name: paths if isinstance(paths, (list, tuple)) else [paths] for name, paths in given.items()}
    return [(name, path) for name, paths in rows.items() for path in paths if path]


def fault_of_place(path: Path, *, is_folder: bool) -> str | None:
    """Why `path` cannot be an output: what exists there is of another kind, or its name is none."""
    # As in --output_file=~/x, which a shell leaves as it is.
    if (home := os.path.expanduser(path)) != str(path):
        return f"would be a folder named '~'; write {home!r}"
    if is_folder:
        if path.exists() and not path.is_dir():
            return "is a file; give the path of a folder"
        return "has no name of its own; name the folder" if path.name in ("", "..") else None
    if path.is_dir():
        return "is a folder; give the path of a file"
    # /dev/stdout is a link, which the result would replace.
    is_special = (path.exists() and not path.is_file()) or os.path.realpath(path.parent) == "/dev"
    return "is a device, pipe or socket; give the path of a file" if is_special else None


def overlaps(output: Path, other: Path) -> bool:
    """Whether writing `output`, its temporary file or the trials kept beside it, would touch `other`."""
    places, found = (output, partial_name(output)), spellings(other)
    own = [spelling for path in places for spelling in spellings(path)]
    return (
        any(a.is_relative_to(b) or b.is_relative_to(a) for a in own for b in found)
        or any(os.path.exists(path) and os.path.exists(other) and path.samefile(other) for path in places)
        or any(b.name.startswith(f".{output.name}.") and b.parent == own[0].parent for b in found)
    )


def spellings(path: Path) -> tuple[Path, Path]:
    """`path` without links but itself where it is one, and where it leads."""
    return Path(os.path.realpath(path.parent), path.name), Path(os.path.realpath(path))


def check_writable(name: str, path: Path) -> None:
    folder = next(parent for parent in path.parents if os.path.lexists(parent))
    try:
        with suppress(FileNotFoundError):
            # Its name is the longer one.
            os.lstat(partial_name(path))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name}: cannot write in {str(path.parent)!r} ({error.strerror}); choose another") from None
