"""What command lines share: how bad input ends, what they ask of the machine, the names of dtypes."""

import importlib.util
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

# Characters of an error that anyone reads: the setting comes first, the fix last.
MAX_LINE = 780
USER_ERRORS = (ValueError, OSError)
# --dtype, and the attribute of torch that it names.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def run_main(main: Callable[[], None]) -> None:
    """Run `main`; turn a user's mistake into one line on stderr and exit code 2.

    `ValueError` and `OSError` are the user's to correct (a bad value, a missing file, a full disk). Any other exception
    is our defect and keeps its traceback. LONGQLORA_TRACEBACK=1 keeps it always. Under a launcher only rank 0 prints,
    since every rank meets the same bad input.
    """
    try:
        main()
    except USER_ERRORS as error:
        if os.environ.get("LONGQLORA_TRACEBACK") == "1":
            raise
        # Open progress bars are closed, so that the error begins on a line of its own.
        for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", [])):
            bar.close()
        if os.environ.get("RANK", "0") == "0" or getattr(error, "from_one_rank", False):
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        # A plain sys.exit would wait for the other ranks in a collective that will never come.
        sys.stdout.flush()
        os._exit(2) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, an `OSError` with its path; long ones without their middle."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < MAX_LINE else f"{text[:540]} [...] {text[-200:]}"


def require_file(path: str | os.PathLike, flag: str) -> Path:
    """Return `path` if it is a file; `flag` names the option or YAML key that gave it."""
    if not Path(path).is_file():
        raise ValueError(f"{flag}: no file at {str(path)!r}; give the path of an existing file")
    return Path(path)


def require_folder(path: str | os.PathLike, flag: str) -> Path:
    """Return `path` if it is a folder; `flag` names the option or YAML key that gave it."""
    if not Path(path).is_dir():
        raise ValueError(f"{flag}: no folder at {str(path)!r}; give the path of an existing folder")
    return Path(path)


def require_stdin() -> TextIO:
    """sys.stdin, which Python leaves out of a process that was started without one."""
    if sys.stdin is None:
        raise ValueError("standard input is closed; give a terminal, a pipe, a file, or < /dev/null")
    return sys.stdin


def require_extra(module: str, package: str, *, extra: str) -> None:
    """Raise ValueError naming the command that installs `package`, of an extra, where `module` cannot be imported."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this needs the package {package}: pip install -e .[{extra}], or -r requirements-extras.txt")


def dtype_of(name: str):
    """The torch.dtype that --dtype names; None for "auto"."""
    import torch

    return None if name == "auto" else getattr(torch, DTYPES[name])


def go_offline_unless_reachable() -> None:
    """Where the Hugging Face hub cannot be reached, tell its libraries so; to be called before they are imported.

    They would ask for every file again and again otherwise, for half a minute. What the user set stays, and behind a
    proxy the hub is taken to answer.
    """
    from urllib.request import getproxies

    if "HF_HUB_OFFLINE" in os.environ or getproxies():
        return
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("://")[-1].split("/")[0].split(":")[0]
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
