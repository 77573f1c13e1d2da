"""Checkpoints on disk: complete or absent, found and rotated.

A checkpoint is written into `output_dir/.saving` and renamed to `checkpoint-N` when every rank has
finished, so that a killed run leaves either the whole folder or none.
"""

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from component.files import replace_folder

STAGING = ".saving"
FINAL = "final"
MARK_OF_COMPLETENESS = "trainer_state.json"


@dataclass
class OutputConfig:
    """Where a run writes and what becomes of an earlier run there."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "delete the checkpoints of an earlier run in output_dir"}
    )


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [
        (int(match[1]), path)
        for path in (Path(output_dir).iterdir() if Path(output_dir).is_dir() else [])
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / MARK_OF_COMPLETENESS).is_file()
    ]
    return [path for _, path in sorted(found)]


def checkpoint_to_resume(requested: str | None, output_dir: str | Path, *, overwrite: bool) -> tuple[Path | None, str]:
    """The checkpoint a run starts from, or None, and a line that says so.

    requested: value of resume_from_checkpoint: a folder, "true" for the last one in output_dir, or
    None. Raises ValueError when output_dir holds checkpoints and none of the ways to treat them was chosen.
    """
    existing = list_checkpoints(output_dir)
    word = str(requested or "false").lower()
    if word == "true":
        if not existing:
            return None, f"no complete checkpoint in {output_dir} yet: starting from the beginning"
        return existing[-1], f"resuming from {existing[-1]}"
    if word != "false":
        path = Path(requested)
        if not (path / MARK_OF_COMPLETENESS).is_file():
            raise ValueError(
                f"resume_from_checkpoint: {requested!r} has no {MARK_OF_COMPLETENESS}; it is no complete checkpoint"
            )
        return path, f"resuming from {path}"
    if existing and not overwrite:
        raise ValueError(
            f"output_dir: {str(output_dir)!r} holds {existing[-1].name} of an earlier run; add "
            "--resume_from_checkpoint true to go on, --overwrite_output_dir true to delete it, or choose another folder"
        )
    return None, "starting from the beginning"


def remove_checkpoints(output_dir: str | Path) -> None:
    for path in [*list_checkpoints(output_dir), Path(output_dir) / FINAL]:
        shutil.rmtree(path, ignore_errors=True)


def clear_staging(output_dir: str | Path) -> Path:
    """An empty staging folder, without what a killed run left there."""
    staging = Path(output_dir) / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(output_dir: str | Path, name: str) -> Path:
    """Give a finished checkpoint in the staging folder its final name."""
    staging, target = Path(output_dir) / STAGING, Path(output_dir) / name
    replace_folder(staging / name, target)
    shutil.rmtree(staging, ignore_errors=True)
    return target


def rotate(output_dir: str | Path, limit: int | None, keep: str | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest nor the folder `keep`."""
    if limit is None:
        return
    kept = Path(keep).resolve() if keep else None
    for path in list_checkpoints(output_dir)[:-limit]:
        if path.resolve() != kept:
            shutil.rmtree(path)
