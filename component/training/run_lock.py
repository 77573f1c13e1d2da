"""One run at a time in an output_dir: its first process holds a lock, which the system releases when it ends.

The lock is POSIX's (fcntl), which NFS passes on to its server. A mount with `nolock` or `local_lock` knows the runs
of its own machine only.
"""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from longqlora.cli import one_line
from longqlora.distributed import gather_objects, is_main_process

LOCK_NAME = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def check_unlocked(output_dir: str | Path) -> None:
    """Refuse an output_dir that another run holds, on any rank, and write nothing."""
    path = Path(output_dir) / LOCK_NAME
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            acquire(file, fcntl.LOCK_SH)


def lock_output_dir(output_dir: str | Path) -> tuple[IO | None, list[str]]:
    """Lock `output_dir` for as long as the returned file is open; also returns notices.

    To be called on every rank. Raises ValueError on all of them where rank 0 cannot get the lock.
    """
    file, refusal, notices = None, None, []
    if is_main_process():
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            file = (Path(output_dir) / LOCK_NAME).open("a+", encoding="utf-8")
            notices = acquire(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        except ValueError as error:
            refusal = one_line(error)
        except OSError as error:
            refusal = (
                f"output_dir: cannot write in {str(output_dir)!r} ({error.strerror or error}); give another folder"
            )
    refusal = gather_objects(refusal)[0]
    if refusal:
        raise ValueError(refusal)
    return file, notices


def acquire(file: IO, kind: int) -> list[str]:
    """Lock `file`, or raise ValueError with process and host of the run that holds it; returns notices."""
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        folder = str(Path(file.name).parent)
        if error.errno in UNSUPPORTED:
            return [f"output_dir: the file system of {folder!r} has no locks ({error}); start no second run there"]
        if error.errno not in HELD:
            raise
        file.seek(0)
        raise ValueError(
            f"output_dir: another run writes to {folder!r} ({file.read() or 'just started'}); wait for its end, or "
            "choose another folder"
        ) from None
    return []
