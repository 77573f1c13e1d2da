"""Training runs in processes of their own that start quickly: forked from a server with everything imported."""

import json
import multiprocessing
import os
import resource
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import yaml
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["training_process_imports"])


def run_main_of_train(
    arguments: list[str], log: str, environment: dict[str, str], max_file_bytes: int | None = None
) -> None:
    """Body of the child: `python train.py ARGUMENTS`, output into `log`."""
    # The server passes over what it cannot import, and each run takes seconds more.
    assert "training_process_imports" in sys.modules, "the fork server has imported nothing"
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
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO / "tests" / "support"), str(REPO)])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def start(*arguments: object, log: Path, environment: dict[str, str] | None = None, max_file_bytes: int | None = None):
    """Start a training run in one process, with `exitcode`, `join` and `kill` (SIGKILL); output goes to `log`.

    max_file_bytes: size at which writing a file fails, as on a full disk.
    """
    ensure_server()
    words = [str(word) for word in arguments]
    process = CONTEXT.Process(
        target=run_main_of_train, args=(words, str(log), environment or {}, max_file_bytes), daemon=True
    )
    process.start()
    return process


def start_ranks(*arguments: object, log: Path, num_processes: int, **options) -> list:
    """Start training in one or several processes of one world."""
    if num_processes == 1:
        return [start(*arguments, log=log, **options)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    world |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
    environments = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    return [start(*arguments, log=log, environment=environment, **options) for environment in environments]


def wait_for(log: Path, text: str, timeout: float = 60) -> None:
    """Wait until a run has written `text`."""
    end = time.monotonic() + timeout
    while not (log.exists() and text in log.read_text(errors="replace")):
        assert time.monotonic() < end, log.read_text(errors="replace")[-3000:] if log.exists() else "no log"
        time.sleep(0.05)


def train(path: Path, *words: object, code: int = 0, num_processes: int = 1, **options) -> str:
    """Train with the YAML at `path`; every process must end with `code`. Returns the output."""
    log = path.with_suffix(".out")
    log.unlink(missing_ok=True)
    ranks = start_ranks("--train_args_file", path, *words, log=log, num_processes=num_processes, **options)
    for process in ranks:
        process.join(120)
    text = log.read_text(errors="replace")
    assert [process.exitcode for process in ranks] == [code] * num_processes, text[-4000:]
    return text


def fail(path: Path, *words: object, **options) -> str:
    """Train with the YAML at `path`, in vain; returns the one line that begins with error."""
    text = train(path, *words, code=2, **options)
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in text, text[-4000:]
    return errors[0]


def run_training(folder: Path, name: str, values: dict, *words: object, num_processes: int = 1) -> list[dict]:
    """Train with the settings `values`, output in folder/name; returns the log history."""
    path, output = folder / f"{name}.yaml", folder / name
    path.write_text(yaml.safe_dump({**values, "output_dir": str(output), "data_cache_dir": str(folder / "cache")}))
    train(path, *words, num_processes=num_processes)
    return history_of(output)


def history_of(output_dir: Path) -> list[dict]:
    """What a finished run logged."""
    return json.loads((output_dir / "train_results.json").read_text())["log_history"]


def losses_of(history: list[dict]) -> dict[int, float]:
    """Training losses by step."""
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def weights_of(folder: Path) -> dict:
    """The weights that a checkpoint or final/ holds."""
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def same_weights(first: Path, second: Path) -> bool:
    """Whether two folders hold the same weights, bit by bit."""
    one, other = weights_of(first), weights_of(second)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, but the lock and the log of a later attempt."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ".lock" and not name.endswith(".new")}
