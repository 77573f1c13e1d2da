"""Runs the cells of a suite: each training once, then what is measured of it, every finished cell a JSON file.

The scripts run as they stand, in processes forked from this one, which has imported what they need: a start takes 8
seconds otherwise. So this process starts no thread and touches no GPU; on a machine with one, scripts start afresh.
"""

import ctypes
import json
import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import datasets  # noqa: F401  what the scripts import, once
import matplotlib.figure  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
import yaml
from tqdm import tqdm

import longqlora.inference.load  # noqa: F401
import longqlora.model.merge  # noqa: F401
import longqlora.training.trainer  # noqa: F401
from longqlora.cli import require_file
from longqlora.files import atomic_file, read_json, remove, write_json
from longqlora.table import grouped
from reproduction.cost import num_saved_parameters
from reproduction.suite import MEASURES, REPO, Cell, Dataset, Scale

FORK = multiprocessing.get_context("fork")
PR_SET_PDEATHSIG = 1
NUM_LAST_LINES = 12
# A thread of tqdm's would be copied by no fork, and its locks would.
tqdm.monitor_interval = 0


class ScriptError(Exception):
    """A script ended with another code than 0; the log has its words."""


@dataclass(frozen=True)
class Scripts:
    """Runs scripts of the repository one after the other, from its root, into one log."""

    log: Path
    num_threads: int | None = None

    def run(self, words: Sequence[str]) -> float:
        """Run `python WORDS`; returns its seconds."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ python {shlex.join(words)}\n")
        started = time.monotonic()
        if (code := self.exit_code(words)) != 0:
            raise ScriptError(f"{words[0]} ended with exit code {code}")
        return round(time.monotonic() - started, 2)

    def exit_code(self, words: Sequence[str]) -> int:
        if torch.cuda.is_available():
            with self.log.open("ab") as file:
                return subprocess.call([sys.executable, *words], cwd=REPO, stdout=file, stderr=file)
        process = FORK.Process(target=self.child, args=(list(words),))
        process.start()
        process.join()
        return process.exitcode

    def child(self, words: list[str]) -> None:
        end_with_parent()
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", buffering=1, closefd=False) for number in (1, 2))
        os.chdir(REPO)
        # The parent's bar is none of this process's.
        tqdm._instances.clear()
        # Also where their number stays: torch makes its pool anew here, and not in several threads of a script at once.
        torch.set_num_threads(self.num_threads or torch.get_num_threads())
        script = str(REPO / words[0])
        sys.argv = [script, *words[1:]]
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")


def end_with_parent() -> None:
    """Have the system kill this process when its parent ends, however that ends (Linux)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # A parent under pytest, or in a shell's background, may have changed it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def prepare(scale: Scale, dataset: Dataset, num_threads: int | None) -> None:
    """Make what of the data set is not there yet, and write its train.yaml."""
    for path, words in dataset.missing.items():
        log = scale.output_dir / "logs" / f"{dataset.name}-{path.name}.log"
        print(f"making {path}: python {shlex.join(words)}\n  log: {log}", flush=True)
        try:
            Scripts(log, num_threads).run(words)
        except ScriptError as error:
            raise ValueError(f"{dataset.name}: {error}; {last_lines(log)}") from None
        if not path.exists():
            raise ValueError(f"{dataset.name}: {words[0]} did not write {str(path)!r}; correct scales.yaml")
    for name in ("train_file", "data_path"):
        require_file(REPO / getattr(dataset, name), f"{dataset.name}: {name}")
    with atomic_file(dataset.train_args_file) as file:
        yaml.safe_dump(scale.train_settings(dataset), file, sort_keys=False)


def last_lines(log: Path) -> str:
    if not log.is_file():
        return f"{log} was never written"
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return f"last lines of {log}:\n" + "\n".join(f"    {line}" for line in lines[-NUM_LAST_LINES:])


def measure(cell: Cell, scripts: Scripts, facts: Mapping, seconds: dict) -> None:
    """Measure a cell whose training is done and write its file, whole or not at all."""
    own = dict(seconds)
    if cell.own.get("merge"):
        own["merge"] = scripts.run(cell.merge_words())
    found = {}
    for what in MEASURES:
        own[what] = scripts.run(cell.measure_words(what))
        found[what] = read_json(cell.output_file(what))
    perplexity = found["perplexity"]["results"]
    kept = ("seq_len", "perplexity", "loss", "accuracy", "num_windows", "num_windows_nonfinite", "loss_by_position",
            "protocol")  # fmt: skip
    record = {
        "name": cell.name,
        "dataset": cell.dataset.name,
        "seed": cell.seed,
        "settings": dict(cell.overrides),
        "own": dict(cell.own),
        "commands": cell.commands(),
        "perplexity": [{name: result[name] for name in kept} for result in perplexity],
        "passkey": {name: found["passkey"][name] for name in ("protocol", "cells")},
        "seconds": own,
        "files": cell.dataset.fingerprint(),
        "date": time.strftime("%Y-%m-%d"),
        **facts,
    }
    if cell.seed is not None:
        results = read_json(cell.work / "train_results.json")
        losses = [[entry["step"], entry["loss"]] for entry in results["log_history"] if "loss" in entry]
        numbers = {"num_steps": results["global_step"], "num_parameters": num_saved_parameters(cell.work / "final")}
        record["training"] = {**numbers, "flops": cell.flops, "losses": losses}
    write_json(cell.path, record)


def run_job(cells: Sequence[Cell], scripts: Scripts, facts: Mapping, *, keep_adapters: bool) -> None:
    """Body of a worker: one training, unless it was kept, and every cell that reads it. Exit code 1: not all worked."""
    end_with_parent()
    cell, seconds, is_whole = cells[0], {}, True
    times = cell.work / "seconds.json"
    try:
        if cell.seed is not None and not times.is_file():
            remove(cell.work)
            seconds["train"] = scripts.run(cell.train_words())
            # Written last: it says that the training is whole.
            write_json(times, seconds)
        elif cell.seed is not None:
            seconds = read_json(times)
        for cell in cells:
            try:
                measure(cell, scripts, facts, seconds)
            except ScriptError as error:
                note(scripts.log, f"{cell.name}: {error}")
                is_whole = False
    except ScriptError as error:
        note(scripts.log, f"{cell.name}: {error}")
        sys.exit(1)
    if not is_whole:
        sys.exit(1)
    if not keep_adapters:
        remove(cell.work)


def note(log: Path, text: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def is_finished(cell: Cell) -> bool:
    try:
        return "perplexity" in json.loads(cell.path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False


def run_cells(
    cells: Sequence[Cell], facts: Mapping, *, num_workers: int, num_threads: int | None, keep_adapters: bool
) -> list[tuple[Cell, Path]]:
    """Run every cell that is not finished, `num_workers` trainings at a time; returns those that failed, with the log.

    Cells that share a training are one job, so it runs once and goes when all have read it.
    """
    left = {cell.key: cell for cell in cells if not is_finished(cell)}
    by_training = grouped([{"train_key": cell.train_key, "cell": cell} for cell in left.values()], "train_key")
    jobs = [[entry["cell"] for entry in group] for group in by_training.values()]
    total = len({cell.key for cell in cells})

    def start(job: list[Cell]):
        log = job[0].scale.output_dir / "logs" / f"{job[0].work.name}.log"
        scripts = Scripts(log, 1 if num_workers > 1 else num_threads)
        process = FORK.Process(target=run_job, args=(job, scripts, facts), kwargs={"keep_adapters": keep_adapters})
        process.start()
        return process, job, log

    return watch(jobs, start, num_workers, total=total, num_done=total - len(left))


def watch(
    jobs: list[list[Cell]], start: Callable, num_workers: int, *, total: int, num_done: int
) -> list[tuple[Cell, Path]]:
    """Keep `num_workers` jobs running under a progress bar over cells; kill them when this is interrupted."""
    waiting, running, failed = list(reversed(jobs)), {}, []
    with tqdm(total=total, initial=num_done, desc="cells", unit="cell", mininterval=0.5, smoothing=0) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < num_workers:
                    process, job, log = start(waiting.pop())
                    running[process.sentinel] = process, job, log
                    bar.set_postfix_str(job[0].name)
                for sentinel in wait(list(running)):
                    process, job, log = running.pop(sentinel)
                    process.join()
                    lost = [cell for cell in job if not is_finished(cell)]
                    failed += [(cell, log) for cell in lost]
                    for cell in lost:
                        bar.write(f"FAILED {cell.name}; {last_lines(log)}", file=sys.stderr)
                    bar.update(len(job) - len(lost))
        finally:
            for process, _, _ in running.values():
                process.kill()
                process.join()
    return failed
