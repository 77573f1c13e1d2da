"""Scripts in processes of their own that start quickly: forked from the server of `training_process`."""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from training_process import CONTEXT, ensure_server

STREAMS = ("stdin", "stdout", "stderr")


def run_main_of_script(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Body of the child: `python WORDS`, its streams in files of `folder`."""
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(STREAMS):
        descriptor = os.open(Path(folder) / name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    runpy.run_path(words[0], run_name="__main__")


def run_forked(words: list[str], *, cwd, input: str, timeout: float, environment: dict) -> subprocess.CompletedProcess:
    """As subprocess.run on `python WORDS` with text captured, some seconds sooner."""
    ensure_server()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "stdin").write_text(input, encoding="utf-8")
        before = os.getcwd()
        os.chdir(cwd or before)
        try:
            # The child starts where its parent is.
            process = CONTEXT.Process(target=run_main_of_script, args=(words, folder, environment))
            process.start()
        finally:
            os.chdir(before)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout)
        outputs = [(Path(folder) / name).read_text(encoding="utf-8", errors="replace") for name in STREAMS[1:]]
    return subprocess.CompletedProcess(words, process.exitcode, *outputs)
