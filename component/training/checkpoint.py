"""Checkpoints on disk: complete or absent, found and rotated.

A checkpoint is written into `output_dir/.saving` and renamed to `checkpoint-N` when every rank has
finished, so that a killed run leaves either the whole folder or none.
"""

import re
from pathlib import Path

from longqlora.files import remove, replace_folder

STAGING = ".saving"
FINAL = "final"
MARK_OF_COMPLETENESS = "trainer_state.json"


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
    None. Raises ValueError when output_dir holds results of another run and none of the ways to treat them was chosen.
    """
    existing = list_checkpoints(output_dir)
    word = str(requested or "false").lower()
    if word == "true" and existing:
        return existing[-1], f"resuming from {existing[-1]}"
    start = None
    if word not in ("true", "false"):
        start = Path(requested)
        if not (start / MARK_OF_COMPLETENESS).is_file():
            raise ValueError(
                f"resume_from_checkpoint: {requested!r} has no {MARK_OF_COMPLETENESS}; it is no complete checkpoint"
            )
    goes_on = start is not None and start.resolve() in [path.resolve() for path in existing]
    results = [path.name for path in existing[-1:]] + [FINAL] * (Path(output_dir) / FINAL).exists()
    if results and not goes_on and not overwrite:
        resume = "--resume_from_checkpoint true to go on, " if existing else ""
        raise ValueError(
            f"output_dir: {str(output_dir)!r} holds {' and '.join(results)} of an earlier run; add "
            f"{resume}--overwrite_output_dir true to replace it, or choose another folder"
        )
    if start:
        return start, f"resuming from {start}"
    missing = f"no complete checkpoint in {output_dir} yet: " if word == "true" else ""
    return None, f"{missing}starting from the beginning"


def clear_staging(output_dir: str | Path) -> None:
    """Delete the staging folder, which a killed run or a full disk may have left half-written."""
    remove(Path(output_dir) / STAGING)


def publish(output_dir: str | Path, name: str) -> None:
    """Give a finished checkpoint in the staging folder its final name."""
    staging = Path(output_dir) / STAGING
    replace_folder(staging / name, Path(output_dir) / name)
    remove(staging)


def rotate(output_dir: str | Path, limit: int | None, keep: str | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest nor the folder `keep`."""
    if limit is None:
        return
    kept = Path(keep).resolve() if keep else None
    for path in list_checkpoints(output_dir)[:-limit]:
        if path.resolve() != kept:
            remove(path)
