"""Training runs in processes of their own that start quickly: forked from a server with everything imported."""

import json
import multiprocessing
import os
import resource
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

import yaml

REPO = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["training_process_imports"])


def run_main_of_train(
    arguments: list[str], log: str, environment: dict[str, str], max_file_bytes: int | None = None
) -> None:
    """Body of the child: `python train.py ARGUMENTS`, output into `log`."""
    os.environ.update(environment)
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["train.py", *arguments]
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(REPO))
    import train
    from longqlora.cli import run_main

    run_main(train.main)


def ensure_server() -> None:
    """Start the server, once. It imports from the path of its environment, whatever this process has (Python 3.11)."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO / "tests"), str(REPO)])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def start(*arguments: object, log: Path, environment: dict[str, str] | None = None, max_file_bytes: int | None = None):
    """Start a training run; the process has `exitcode`, `join` and `kill` (SIGKILL).

    max_file_bytes: size at which writing a file fails, as on a full disk.
    """
    ensure_server()
    words = [str(word) for word in arguments]
    process = CONTEXT.Process(
        target=run_main_of_train, args=(words, str(log), environment or {}, max_file_bytes), daemon=True
    )
    process.start()
    return process


def finish(process, log: Path, timeout: float = 120) -> None:
    """Wait for a run that must succeed."""
    process.join(timeout)
    text = log.read_text(errors="replace") if log.exists() else ""
    assert process.exitcode == 0, f"training ended with {process.exitcode}\n{text[-4000:]}"


def start_world(*arguments: object, log: Path, num_processes: int) -> list:
    """Start training in several processes of one world."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port
    }  # fmt: skip
    ranks = []
    for rank in range(num_processes):
        environment = {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        ranks.append(start(*arguments, log=log, environment=environment))
    return ranks


def finish_world(*arguments: object, log: Path, num_processes: int) -> None:
    """Run training in several processes of one world; all must succeed."""
    for process in start_world(*arguments, log=log, num_processes=num_processes):
        finish(process, log)


def fail(path: Path, *arguments: object, num_processes: int = 1, max_file_bytes: int | None = None) -> str:
    """Train with the YAML at `path`; every process must end with 2. Returns the one line that begins with error."""
    log = path.with_suffix(".failed")
    log.unlink(missing_ok=True)
    words = ("--train_args_file", path, *arguments)
    if num_processes > 1:
        ranks = start_world(*words, log=log, num_processes=num_processes)
    else:
        ranks = [start(*words, log=log, max_file_bytes=max_file_bytes)]
    for process in ranks:
        process.join(120)
    text = log.read_text(errors="replace")
    assert [process.exitcode for process in ranks] == [2] * num_processes, text[-4000:]
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in text, text[-4000:]
    return errors[0]


def run_training(folder: Path, name: str, values: dict, *words: object, num_processes: int = 1) -> list[dict]:
    """Train with the settings `values`, output in folder/name; returns the log history."""
    path, output = folder / f"{name}.yaml", folder / name
    path.write_text(yaml.safe_dump({**values, "output_dir": str(output), "data_cache_dir": str(folder / "cache")}))
    log = path.with_suffix(".log")
    if num_processes > 1:
        finish_world("--train_args_file", path, *words, log=log, num_processes=num_processes)
    else:
        finish(start("--train_args_file", path, *words, log=log), log)
    return history_of(output)


def history_of(output_dir: Path) -> list[dict]:
    """What a finished run logged."""
    return json.loads((output_dir / "train_results.json").read_text())["log_history"]


def losses_of(history: list[dict]) -> dict[int, float]:
    """Training losses by step."""
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
