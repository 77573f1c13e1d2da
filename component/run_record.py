"""What a run was: settings, software versions and commit, kept beside its weights for the tools that read them."""

import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from longqlora.files import read_json

RECORD_NAME = "run_record.json"
MAX_PROCESSES = 2**20
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "accelerate", "datasets", "tokenizers")


def software_versions() -> dict[str, str]:
    """Versions of Python and the packages that decide a number, and this repository's commit."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {**versions, "commit": commit()}


def commit() -> str:
    """Commit of the checkout this file is in, "+dirty" with uncommitted changes, or "unknown"."""
    # No tag is looked for, so the commit itself is the description.
    git = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+dirty"]
    try:
        return subprocess.check_output(git, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def make_run_record(arguments: dict, **facts) -> dict:
    """arguments: the resolved configuration, section by section; facts: what the run found out."""
    return {"command": command_line(), "arguments": arguments, **facts, "versions": software_versions()}


def command_line() -> list[str]:
    """The words this process was started with, without the value of a token."""
    return [
        "(left out)" if re.fullmatch(r"--hub[_-]token", before) else re.sub(r"(hub[_-]token=).*", r"\1(left out)", word)
        for before, word in zip(["", *sys.argv], sys.argv, strict=False)
    ]


def read_run_record(folder: str | Path) -> dict | None:
    """Record in `folder`, or in the run folder above a checkpoint; None where there is none."""
    for path in (Path(folder) / RECORD_NAME, Path(folder).resolve().parent / RECORD_NAME):
        if path.is_file():
            record = read_json(path, "run record")
            if not has_form_of_record(record):
                raise ValueError(
                    f"run record: {str(path)!r} does not have the form that train.py writes; put the original back, or "
                    "delete it to go on without what it says"
                )
            return record
    return None


def has_form_of_record(record: dict) -> bool:
    """Whether `record` holds what its readers take for granted: settings by section, hashes by key, a count."""
    arguments = record.get("arguments")
    if not isinstance(arguments, dict):
        return False
    num_processes, hashes = record.get("world_size", 1), record.get("data_sha256", {})
    has_sections = all(isinstance(section, dict) for section in (*arguments.values(), hashes))
    has_hashes = has_sections and all(isinstance(value, str) for value in hashes.values())
    return has_hashes and type(num_processes) is int and 0 < num_processes <= MAX_PROCESSES
