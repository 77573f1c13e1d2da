"""One run at a time in an output_dir, and none left over when its launcher ends."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import REPO
from training_process import fail, finish, start, start_world

import longqlora.training.run_lock
from longqlora.training.run_lock import lock_output_dir
from longqlora.training.termination import is_launcher


@pytest.fixture(autouse=True)
def nothing_goes_on():
    yield
    for process in multiprocessing.active_children():
        process.kill()


def wait_for(path: Path, text: str, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not (path.exists() and text in path.read_text(errors="replace")):
        assert time.monotonic() < end, path.read_text(errors="replace")[-3000:] if path.exists() else "no log"
        time.sleep(0.05)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_second_run_in_one_folder_ends_at_once(write_yaml, num_processes):
    path, out = write_yaml(max_steps=10_000, save_steps=2)
    log = path.with_suffix(".out")
    ranks = start_world("--train_args_file", path, log=log, num_processes=num_processes)
    wait_for(log, "step 4:")
    for words in ((), ("--resume_from_checkpoint", "true"), ("--overwrite_output_dir", "true")):
        error = fail(path, *words, num_processes=num_processes)
        assert f"process {ranks[0].pid} on {socket.gethostname()}" in error and str(out) in error
    assert all(rank.is_alive() for rank in ranks)
    for rank in ranks:
        rank.kill()
        rank.join()
    # A killed run holds nothing.
    log = path.with_suffix(".next")
    finish(start("--train_args_file", path, "--max_steps", 1, "--overwrite_output_dir", "true", log=log), log)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(longqlora.training.run_lock.fcntl, "lockf", no_locks)
    file, (notice,) = lock_output_dir(tmp_path / "out")
    assert "no locks" in notice


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "disk that is not there")
    with pytest.raises(ValueError, match=f"output_dir: cannot write in '{tmp_path / 'out'}' .*; give another folder"):
        lock_output_dir(tmp_path / "out")
    with pytest.raises(ValueError, match="output_dir: cannot write in '/proc/out' .No such file or directory."):
        lock_output_dir("/proc/out")


@pytest.mark.parametrize("deepspeed", [None, str(REPO / "train_args" / "deepspeed" / "zero2.json")])
def test_sigterm_ends_with_one_line(write_yaml, deepspeed):
    path, out = write_yaml(max_steps=10_000, save_steps=3, save_total_limit=1, deepspeed=deepspeed)
    log = path.with_suffix(".out")
    process = start("--train_args_file", path, log=log)
    wait_for(log, "step 5:")
    process.terminate()
    process.join(30)
    assert process.exitcode == 143
    lines = [line for line in log.read_text().splitlines() if "SIGTERM" in line]
    assert len(lines) == 1 and f"the last good checkpoint is {out}/checkpoint-" in lines[0]
    assert "Traceback" not in log.read_text() and not (out / ".saving").exists()
    named = Path(lines[0].split("checkpoint is ")[1])
    assert (named / "trainer_state.json").is_file()


LAUNCHERS = {
    "deepspeed": ["--num_gpus", "2"],
    "torchrun": ["--nproc_per_node", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_training_ends_with_its_launcher(write_yaml, launcher, signum):
    path, out = write_yaml(max_steps=100_000, save_strategy="no")
    log = path.with_suffix(".out")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    binaries = Path(sys.executable).parent
    command = [str(binaries / launcher), *LAUNCHERS[launcher], "--master_port", port]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{binaries}:{os.environ['PATH']}"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "train.py", "--train_args_file", str(path)], cwd=REPO, stdout=output, stderr=output,
            env={**os.environ, **environment},
        )  # fmt: skip
    wait_for(log, "step 2:", timeout=180)
    below = psutil.Process(process.pid).children(recursive=True)
    trainers = [child for child in below if "train.py" in child.cmdline()]
    assert len(trainers) >= 2
    os.kill(process.pid, signum)
    # Not waited for: a dead launcher that nobody reaped counts as gone too.
    _, alive = psutil.wait_procs(trainers, timeout=40)
    for child in alive:
        child.kill()
    process.wait()
    assert not alive


COMMANDS = [
    (["python", "/venv/bin/deepspeed", "train.py"], True),
    (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "train.py"], True),
    (["python", "-m", "torch.distributed.run", "train.py"], True),
    (["/venv/bin/torchrun", "train.py"], True),
    (["bash", "-c", "python -u -m deepspeed.launcher.launch train.py"], False),
    (["bash", "run.sh", "deepspeed"], False),
    (["/bin/bash", "./deepspeed"], False),
    (["sh", "/home/me/bin/accelerate", "launch"], False),
    (["python3.11", "-m", "accelerate.commands.launch", "train.py"], True),
    ([], False),
    (["python", "train.py"], False),
]


@pytest.mark.parametrize("words,expected", COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_is_launcher(words, expected):
    assert is_launcher(type("Process", (), {"cmdline": lambda self: words})()) == expected
