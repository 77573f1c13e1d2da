"""Training runs in processes of their own: started, waited for, and what they leave."""

import json
import os
import time
from pathlib import Path

from safetensors.torch import load_file
from script_process import REPO, start_world


def start_ranks(*arguments: object, log: Path, num_processes: int, **options) -> list:
    """Start `train.py ARGUMENTS` in the processes of one world; output goes to `log`. options: of `start_script`."""
    words, streams = [REPO / "train.py", *arguments], [os.devnull, log, log]
    return start_world(words, streams, num_processes=num_processes, **options)


def start(*arguments: object, **options):
    """The same in one process."""
    return start_ranks(*arguments, num_processes=1, **options)[0]


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


def history_of(output_dir: Path) -> list[dict]:
    """What a finished run logged."""
    return json.loads((output_dir / "train_results.json").read_text())["log_history"]


def losses_of(output_dir: Path) -> dict[int, float]:
    """Training losses of a finished run by step."""
    return {entry["step"]: entry["loss"] for entry in history_of(output_dir) if "loss" in entry}


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
