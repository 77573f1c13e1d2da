"""How a run is stopped from outside: SIGTERM, and the end of its launcher.

`deepspeed train.py` is three processes: the one the user sees starts deepspeed.launcher.launch, and that the trainer.
A SIGTERM ends the first only, and kill -9 of torchrun or of either ends nothing below; the trainer would go on unseen.
"""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from longqlora.distributed import is_main_process

LAUNCHERS = {
    "deepspeed", "ds", "torchrun", "accelerate", "deepspeed.launcher.launch", "deepspeed.launcher.runner",
    "torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch",
}  # fmt: skip
SECONDS_BETWEEN_LOOKS, SECONDS_TO_END = 1, 20
EXIT_CODE = 128 + signal.SIGTERM


def end_with_launcher() -> None:
    """End this process when a launcher above it ends. Without one (`python train.py`, nohup) do nothing."""
    launchers = list(itertools.takewhile(is_launcher, psutil.Process().parents()))

    def watch() -> None:
        # One that ended and that nobody waited for is a zombie.
        with suppress(psutil.Error):
            while all(x.is_running() and x.status() != psutil.STATUS_ZOMBIE for x in launchers):
                time.sleep(SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)
        # A signal waits for the call that the main thread is in, which may be a collective without partners.
        time.sleep(SECONDS_TO_END)
        os._exit(EXIT_CODE)

    if launchers:
        threading.Thread(target=watch, daemon=True).start()


def is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    if words and Path(words[0]).name.startswith("python"):
        words = [word for word in words[1:] if not word.startswith("-")]
    # A shell is none, with the same text in one argument or running a script of that name, which may end before us.
    return bool(words) and Path(words[0]).name in LAUNCHERS


def end_on_sigterm(before_the_end: Callable[[], str]) -> None:
    """On SIGTERM call `before_the_end` on rank 0, print the line that it returns and end with code 143."""
    owner = os.getpid()

    def handler(signum, frame) -> None:
        # Not in the workers forked from this process. Output buffers may be in use: write past them.
        if os.getpid() == owner and is_main_process():
            sys.stderr.isatty() and os.write(2, b"\n")
            os.write(2, f"ended by SIGTERM; {before_the_end()}\n".encode())
        os._exit(EXIT_CODE)

    signal.signal(signal.SIGTERM, handler)
