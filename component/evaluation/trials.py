"""Independent trials of an evaluation: split over processes, and resumable after a kill.

A trial is a JSON-ready mapping that says all that decides its result: a length, a depth and a seed, say.

    results = run_trials(trials, run_one, output_file=path, fingerprint=model_fingerprint(loaded), desc="passkey")
    write_json(path, {"cells": ..., "trials": results})       # on rank 0
    finish_trials(path)

With an output file, finished trials are kept beside it in hidden JSON-lines files, one per process
(`.NAME.json.trials-RANK.jsonl`). A line reaches the file as soon as its trial is done and names the run that it
belongs to; a line that a kill cut short is ignored.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from longqlora.distributed import barrier, gather_objects, is_main_process, print_main, rank, world_size

Trial = Mapping[str, object]


def run_trials(
    trials: Sequence[Trial],
    run_one: Callable[[Trial], dict],
    *,
    output_file: Path | None,
    fingerprint: Mapping,
    desc: str,
) -> list[dict]:
    """Results of all trials, in trial order, on every rank.

    trials: JSON-ready mappings, the same on every rank; equal ones are run once and share a result.
    run_one: gives the JSON-ready result of one trial. Unfinished trials are dealt out to the ranks in turn.
    output_file: finished trials are kept beside it for a later run with the same fingerprint, whatever its number of
    processes and whatever trials were added or left out; None keeps nothing.
    fingerprint: JSON-ready facts that decide a result beside the trials (model, dtype, protocol), as rank 0 has them.

    A `ValueError` or `OSError` of `run_one` and a GPU out of memory end the run with one line on any rank.
    """
    run = _digest(fingerprint)
    run, kept = gather_objects((run, _read_kept(output_file, run) if is_main_process() else {}))[0]
    keys = [_digest(trial) for trial in trials]
    by_key = dict(zip(keys, trials, strict=True))
    done = {key: kept[key] for key in by_key if key in kept}
    if done:
        print_main(f"resuming: {len(done)} of {len(by_key)} trials already done")
    own = [key for key in by_key if key not in done][rank() :: world_size()]
    finished: dict[str, dict] = {}
    path = Path(os.devnull)
    if output_file:
        output_file.parent.mkdir(parents=True, exist_ok=True)
        path = output_file.with_name(f".{output_file.name}.trials-{rank()}.jsonl")
    with path.open("a", encoding="utf-8") as file:
        for key in tqdm(own, desc=desc, unit="trial", disable=not is_main_process()):
            line = json.dumps({"run": run, "trial": key, "result": attempt(run_one, by_key[key])})
            # Read back at once, so that a result is the same whether or not a kill lay between.
            finished[key] = json.loads(line)["result"]
            # The break before the line ends one that a kill cut short.
            file.write(f"\n{line}\n")
            file.flush()
    for part in gather_objects(finished):
        done.update(part)
    return [done[key] for key in keys]


def finish_trials(output_file: Path | None) -> None:
    """Delete what `run_trials` kept, once the result is written; to be called on every rank."""
    barrier()
    if is_main_process():
        for path in _kept_files(output_file):
            path.unlink()


def _digest(value: Mapping) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _kept_files(output_file: Path | None) -> list[Path]:
    if not output_file:
        return []
    return sorted(output_file.parent.glob(f".{glob.escape(output_file.name)}.trials-*.jsonl"))


def _read_kept(output_file: Path | None, run: str) -> dict[str, dict]:
    """Finished trials of `run` by key, from the files of all earlier processes."""
    kept, num_others = {}, 0
    for path in _kept_files(output_file):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row.get("run") == run:
                kept[row["trial"]] = row["result"]
            else:
                num_others += 1
    if num_others and not kept:
        print_main("partial results of other arguments found; starting anew")
    return kept


def attempt(run_one: Callable[[Trial], dict], trial: Trial) -> dict:
    try:
        return run_one(trial)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            # The numbers of a trial say its size; its texts may be long.
            numbers = [f"{name} {value}" for name, value in trial.items() if isinstance(value, (int, float))]
            where = ", ".join(numbers) or "one trial"
            advice = "lower the length or --batch_size, or pass --load_in_4bit"
            error = ValueError(f"out of GPU memory at {where}; {advice}")
        # Only this rank meets it, so that this rank has to say it.
        error.from_one_rank = True
        raise error from error.__cause__
