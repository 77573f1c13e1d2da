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

from component.distributed import gather_objects, is_main_process

LOCK_NAME = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def lock_output_dir(output_dir: str | Path) -> tuple[IO | None, list[str]]:
    """Lock `output_dir` for as long as the returned file is open; also returns notices.

    Raises ValueError on every rank, with process and host, when another run holds it.
    """
    file, refusal, notices = None, None, []
    if is_main_process():
        path = Path(output_dir) / LOCK_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                notices.append(f"output_dir: its file system has no locks ({error}); start no second run there")
            elif file is not None and error.errno in HELD:
                refusal = f"output_dir: another run writes to {str(output_dir)!r} ({holder(file)}); "
                refusal += "wait for its end, or choose another folder"
            else:
                refusal = f"output_dir: cannot write to {str(output_dir)!r} ({error.strerror}); choose another folder"
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
    refusal = gather_objects(refusal)[0]
    if refusal:
        raise ValueError(refusal)
    return file, notices


def holder(file: IO) -> str:
    """Process and host as the run that holds the lock wrote them."""
    file.seek(0)
    return file.read() or "just started"
