"""Scripts in processes of their own that start quickly: forked from a server with everything imported."""

import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

from longqlora.distributed import free_port

REPO = Path(__file__).resolve().parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
CONTEXT = multiprocessing.get_context("forkserver")
# What a script imports, once, so that each run of a test starts in a fraction of a second.
CONTEXT.set_forkserver_preload([
    "bitsandbytes", "datasets", "deepspeed", "matplotlib.figure", "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama", "longqlora.training.trainer",
])  # fmt: skip


def run_main_of_script(words: list[str], streams: list[str], environment: dict[str, str], cwd, max_file_bytes) -> None:
    """Body of the child: `python WORDS`; streams: files of stdin, stdout and stderr."""
    # The server passes over what it cannot import, and each run takes seconds more.
    assert "longqlora.training.trainer" in sys.modules, "the fork server has imported nothing"
    os.environ.update(environment)
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    for number, file in enumerate(streams):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    os.chdir(cwd or ".")
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    torch.set_num_threads(1)
    if environment.get("TRANSFORMERS_VERBOSITY") == "error":
        transformers.logging.set_verbosity_error()
    runpy.run_path(words[0], run_name="__main__")


def start_script(words: list, streams: list, environment: dict, *, cwd=None, max_file_bytes=None, daemon=True):
    """Start `python WORDS`: a process with `exitcode`, `join` and `kill` (SIGKILL).

    max_file_bytes: size at which writing a file fails, as on a full disk.
    """
    with patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    arguments = ([str(word) for word in words], [str(file) for file in streams], environment, cwd, max_file_bytes)
    process = CONTEXT.Process(target=run_main_of_script, args=arguments, daemon=daemon)
    process.start()
    return process


def start_world(words: list, streams: list, *, num_processes: int, environment: dict | None = None, **options) -> list:
    """Start `python WORDS` in the processes of one world; several get the variables that a launcher sets."""
    if num_processes == 1:
        return [start_script(words, streams, environment or {}, **options)]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **(environment or {})}
    world |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
    environments = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    return [start_script(words, streams, environment, **options) for environment in environments]


def run_script(script: str, *args, cwd=None, input="", timeout=120, env=None, check=False):
    """Run a script of the repository to its end, quietly, on one thread: as `subprocess.run` with text captured.

    The process is forked. Where there is a GPU it starts afresh, since imports read what `env` says of it.
    """
    words = [str(REPO / script), *map(str, args)]
    environment = {**os.environ, **QUIET, **(env or {})}
    if torch.cuda.is_available():
        options = {"cwd": cwd, "input": input, "timeout": timeout, "env": environment}
        outcome = subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
            streams[0].write_text(input, encoding="utf-8")
            process = start_script(words, streams, environment, cwd=cwd, daemon=False)
            process.join(timeout)
            if process.exitcode is None:
                process.kill()
                process.join()
                raise subprocess.TimeoutExpired(words, timeout)
            outputs = [file.read_text(encoding="utf-8", errors="replace") for file in streams[1:]]
        outcome = subprocess.CompletedProcess(words, process.exitcode, *outputs)
    said = f"{outcome.stdout[-3000:]}\n{outcome.stderr[-3000:]}"
    assert not check or outcome.returncode == 0, f"{script} ended with {outcome.returncode}\n{said}"
    return outcome
