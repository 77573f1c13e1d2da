"""A run ends with one line on SIGTERM, and none is left over when its launcher ends."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import REPO, ZERO2
from training_process import start, wait_for

from longqlora.distributed import free_port
from longqlora.training.termination import is_launcher


@pytest.mark.parametrize("deepspeed", [None, ZERO2])
def test_sigterm_ends_with_one_line(write_yaml, deepspeed):
    path, out = write_yaml(max_steps=10_000, save_steps=3, save_total_limit=1, deepspeed=deepspeed)
    log = path.with_suffix(".out")
    process = start("--train_args_file", path, log=log)
    wait_for(log, "step 5:")
    (out / ".final.partial").mkdir()
    process.terminate()
    process.join(30)
    assert process.exitcode == 143
    lines = [line for line in log.read_text().splitlines() if "SIGTERM" in line]
    assert len(lines) == 1 and f"the last good checkpoint is {out}/checkpoint-" in lines[0]
    assert "Traceback" not in log.read_text() and not {".saving", ".final.partial"} & set(os.listdir(out))
    assert (Path(lines[0].split("checkpoint is ")[1]) / "trainer_state.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
@pytest.mark.parametrize("launcher,flag", [("deepspeed", "--num_gpus"), ("torchrun", "--nproc_per_node")])
def test_training_ends_with_its_launcher(write_yaml, launcher, flag, signum):
    path, _ = write_yaml(max_steps=100_000, save_strategy="no")
    log = path.with_suffix(".out")
    # Where the tests' own interpreter has no scripts, those of the path.
    binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": binaries}
    command = [launcher, flag, "2", "--master_port", str(free_port()), "train.py", "--train_args_file", str(path)]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=REPO, stdout=output, stderr=output, env=environment)
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


COMMANDS = {
    "python /venv/bin/deepspeed train.py": True,
    "python -u -m deepspeed.launcher.launch --world_info=x train.py": True,
    "python -m torch.distributed.run train.py": True,
    "/venv/bin/torchrun train.py": True,
    "python3.11 -m accelerate.commands.launch train.py": True,
    "bash -c 'python -u -m deepspeed.launcher.launch train.py'": False,
    "bash run.sh deepspeed": False,
    "/bin/bash ./deepspeed": False,
    "sh /home/me/bin/accelerate launch": False,
    "python train.py": False,
    "": False,
}


@pytest.mark.parametrize("command,expected", COMMANDS.items())
def test_is_launcher(command, expected):
    assert is_launcher(SimpleNamespace(cmdline=lambda: shlex.split(command))) == expected
