"""Where a run goes on: which checkpoint, whether it can be resumed, and what has changed since it was written."""

from pathlib import Path

from longqlora.distributed import world_size
from longqlora.files import file_sha256
from longqlora.run_record import read_run_record
from longqlora.settings.config import DataConfig
from longqlora.settings.reader import Settings
from longqlora.training.checkpoint import checkpoint_to_resume
from longqlora.training.checkpoint_contents import check_contents

# Settings that may differ between a run and its continuation without changing a loss.
HARMLESS = {
    "resume_from_checkpoint", "overwrite_output_dir", "output_dir", "save_steps", "save_total_limit", "save_strategy",
    "logging_steps", "logging_dir", "disable_tqdm", "report_to", "dataloader_num_workers", "dataloader_pin_memory",
    "local_rank", "gpu_memory", "data_cache_dir", "preprocessing_num_workers",
}  # fmt: skip


def data_hashes(data: DataConfig) -> dict[str, str]:
    """SHA-256 of each data file by its key."""
    files = {"train_file": data.train_file, "eval_file": data.eval_file}
    return {key: file_sha256(path) for key, path in files.items() if path}


def choose_start(settings: Settings) -> tuple[Path | None, str]:
    """The checkpoint that the settings name, or None, and a line that says so; the checkpoint itself is not read.

    Raises ValueError where output_dir holds another run.
    """
    return checkpoint_to_resume(
        settings.training.get("resume_from_checkpoint"),
        settings.training["output_dir"],
        overwrite=settings.output.overwrite_output_dir,
    )


def resume_point(settings: Settings, data_sha256: dict[str, str]) -> tuple[Path | None, str, list[str]]:
    """The checkpoint a run starts from, or None; a line that says so; warnings for what changed since.

    Raises ValueError for a checkpoint that cannot be resumed, or where output_dir holds another run.
    """
    checkpoint, decision = choose_start(settings)
    if checkpoint is None:
        return None, decision, []
    changes = check_resumable(checkpoint, settings.as_dict(), world_size=world_size(), data_sha256=data_sha256)
    return checkpoint, decision, changes


def check_resumable(checkpoint: Path, arguments: dict, *, world_size: int, data_sha256: dict[str, str]) -> list[str]:
    """Compare a checkpoint's run with the present one; returns warnings for what changed and changes the losses.

    data_sha256: SHA-256 of the data files by key. Other data is a warning, as any setting that changed: to go on with
    more or better rows is a choice. Raises ValueError where going on is impossible: a file missing, damaged or unsafe
    to load, or ZeRO's optimizer states on another number of processes.
    """
    settings, record = flatten(arguments), read_run_record(checkpoint)
    before = (record or {}).get("world_size", world_size)
    if settings.get("deepspeed") and before != world_size:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} was written by {before} processes and ZeRO cannot resume on "
            f"{world_size}; start {before} processes"
        )
    check_contents(checkpoint, settings, num_processes=before)
    if record is None:
        return [f"{checkpoint} has no run record: its settings cannot be compared with the present ones"]
    old, new = flatten(record["arguments"]), settings
    changes = {key: (old.get(key), new.get(key)) for key in sorted((old.keys() | new.keys()) - HARMLESS)}
    changes["number of processes"] = (before, world_size)
    # What a file holds counts, not where it lies.
    for key, now in data_sha256.items():
        then = record.get("data_sha256", {}).get(key)
        if then:
            place = changes.pop(key)[1]
            changes[f"content of {key} {place}"] = (f"SHA-256 {then[:12]}", f"SHA-256 {now[:12]}")
    return [
        f"{key} was {then!r} and is now {now!r}: the losses will differ"
        for key, (then, now) in changes.items()
        if then != now
    ]


def flatten(sections: dict[str, dict]) -> dict:
    return {key: value for section in sections.values() for key, value in section.items()}
