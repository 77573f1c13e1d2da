"""Independent trials of an evaluation: split over processes, and resumable after a kill.

A trial is a JSON-ready mapping that says all that decides its result: a length, a depth and a seed, say.

    results = run_trials(trials, run_one, output_file=path, fingerprint=model_fingerprint(loaded), desc="passkey")
    write_json(path, {"cells": ..., "trials": results})       # on rank 0
    finish_trials(path)

With an output file, finished trials are kept beside it in hidden JSON-lines files, one per process
(`.NAME.json.trials-RANK.jsonl`): first the fingerprint of the run, then a line per trial. Lines reach the
file as soon as the trial is done; a line cut short by a kill is passed over.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from longqlora.distributed import barrier, gather_objects, is_main_process, print_main, rank, world_size
from longqlora.files import atomic_file

Trial = Mapping[str, object]


def run_trials(
    trials: Sequence[Trial],
    run_one: Callable[[Trial], dict],
    *,
    output_file: Path | None,
    fingerprint: dict,
    desc: str,
) -> list[dict]:
    """Results of all trials, in trial order, on every rank.

    trials: JSON-ready mappings, the same on every rank; equal ones are run once and share a result.
    run_one: gives the JSON-ready result of one trial. What is not finished is dealt out to the ranks in turn.
    output_file: finished trials are kept beside it, and taken up by a later run with the same fingerprint,
    whatever its number of processes and whatever trials were added or left out; None keeps nothing.
    fingerprint: JSON-ready facts that decide a result and are not in the trials: model, dtype, protocol.
    desc: label of the progress bar.

    A `ValueError` or `OSError` of `run_one` and a GPU out of memory end the run with one line on any rank.
    """
    keys = [_digest(trial) for trial in trials]
    by_key = dict(zip(keys, trials, strict=True))
    header = json.dumps({"fingerprint": _digest(fingerprint)})
    done = _take_up(output_file, header) if output_file else {}
    todo = [key for key in by_key if key not in done]
    if len(todo) < len(by_key):
        print_main(f"resuming: {len(by_key) - len(todo)} of {len(by_key)} trials already done")
    own = todo[rank() :: world_size()]
    finished: dict[str, dict] = {}
    file = _own_file(output_file, header).open("a", encoding="utf-8") if output_file else None
    try:
        for key in tqdm(own, desc=desc, unit="trial", disable=not is_main_process()):
            # Read back at once, so that a result is the same whether or not a kill lay between.
            line = json.dumps({"trial": key, "result": _attempt(run_one, by_key[key])})
            finished[key] = json.loads(line)["result"]
            if file:
                file.write(line + "\n")
                file.flush()
    finally:
        if file:
            file.close()
    for part in gather_objects(finished):
        done.update(part)
    return [done[key] for key in keys]


def finish_trials(output_file: Path | None) -> None:
    """Delete what `run_trials` kept, once the result is written; to be called on every rank."""
    if output_file:
        barrier()
        if is_main_process():
            for path in _kept_files(output_file):
                path.unlink()


def _digest(value: Mapping) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _kept_file(output_file: Path, number: int) -> Path:
    return output_file.with_name(f".{output_file.name}.trials-{number}.jsonl")


def _kept_files(output_file: Path) -> list[Path]:
    return sorted(output_file.parent.glob(f".{glob.escape(output_file.name)}.trials-*.jsonl"))


def _own_file(output_file: Path, header: str) -> Path:
    """This rank's file, begun with `header`; rank 0's was written by `_take_up`."""
    path = _kept_file(output_file, rank())
    if not is_main_process():
        path.write_text(header + "\n", encoding="utf-8")
    return path


def _take_up(output_file: Path, header: str) -> dict[str, dict]:
    """Finished trials of earlier processes, the same on every rank; rank 0 gathers them in one file."""
    done: dict[str, dict] = {}
    if is_main_process():
        output_file.parent.mkdir(parents=True, exist_ok=True)
        num_foreign = 0
        for path in _kept_files(output_file):
            first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            if first == header:
                done.update(_read_lines(lines))
            else:
                num_foreign += 1
        if num_foreign:
            print_main("partial results of other arguments found; starting anew")
        # One whole file takes the place of those of the earlier processes, whose number may have been another.
        with atomic_file(_kept_file(output_file, 0)) as file:
            file.write(header + "\n")
            file.writelines(json.dumps({"trial": key, "result": result}) + "\n" for key, result in done.items())
        for path in _kept_files(output_file):
            if path != _kept_file(output_file, 0):
                path.unlink()
    return gather_objects(done)[0]


def _read_lines(lines: Sequence[str]) -> dict[str, dict]:
    rows = {}
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["trial"]] = row["result"]
    return rows


def _attempt(run_one: Callable[[Trial], dict], trial: Trial) -> dict:
    try:
        return run_one(trial)
    except torch.OutOfMemoryError:
        failure = ValueError(f"out of GPU memory at {_brief(trial)}; shorten the trials, or pass --load_in_4bit")
        failure.from_one_rank = True
        raise failure from None
    except (ValueError, OSError) as error:
        # Only this rank meets it, so that this rank has to say it.
        error.from_one_rank = True
        raise


def _brief(trial: Trial) -> str:
    """The numbers of a trial, which say its size; its texts may be long."""
    numbers = [f"{name} {value}" for name, value in trial.items() if isinstance(value, (int, float))]
    return ", ".join(numbers) or "one trial"
