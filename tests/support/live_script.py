"""A script of the repository in a process of its own, watched and signalled while it runs."""

import os
import signal
import subprocess
import sys
import tempfile
import time

from conftest import REPO


class LiveScript:
    """The running script; a context, at whose end it is killed."""

    def __init__(self, script: str, *arguments, cwd, environment=os.environ):
        self.file = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, str(REPO / script), *map(str, arguments)], cwd=cwd, text=True, bufsize=1,
            env={**environment, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
            stdin=subprocess.PIPE, stdout=self.file, stderr=subprocess.STDOUT,
            # Tests that run in a shell's background are started with Ctrl-C ignored, and so would their children be.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    @property
    def output(self) -> str:
        """All that it wrote so far."""
        return os.pread(self.file.fileno(), 2**20, 0).decode(errors="ignore")

    def wait_for(self, text: str, *, after: int = 0, num_times: int = 1) -> None:
        """Wait until `text` was written so often, beyond the first `after` characters."""
        deadline = time.monotonic() + 120
        while self.output.count(text, after) < num_times:
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.output}"
            assert time.monotonic() < deadline, f"no {text!r} in: {self.output}"
            time.sleep(0.02)

    def press_ctrl_c(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def __enter__(self) -> "LiveScript":
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.wait()
