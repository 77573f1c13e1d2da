"""The output_dir of a run: one run at a time, checkpoints whole or absent, an earlier run kept until it is replaced.

The lock is POSIX's (fcntl), released by the system when the process ends. NFS passes it on to its server; a mount with
`nolock` or `local_lock` knows the runs of its own machine only.
"""

import fcntl
import itertools
import os
import socket
from pathlib import Path
from typing import IO

from longqlora.cli import one_line
from longqlora.distributed import gather_objects, is_main_process
from longqlora.files import partial_name, remove, replace_folder
from longqlora.run_record import RECORD_NAME
from longqlora.settings.config import Notice
from longqlora.training.resume import FINAL, list_checkpoints

LOG_NAME, LOCK_NAME, RESULTS_NAME = "train.log", ".lock", "train_results.json"
STAGING = ".saving"


class RunFolder:
    """The output_dir of one run.

    A checkpoint is written into `staging` and renamed when every rank has finished. `earlier` are the checkpoints that
    this run does not continue. When it has a result of its own they become `checkpoint-N.abandoned`, so that none is
    resumed from or counted; a run that overwrites then deletes them.
    """

    def __init__(self, path: str | Path, resumed_from: Path | None) -> None:
        self.path = Path(path)
        self.staging = self.path / STAGING
        present = list_checkpoints(path)
        later = [i + 1 for i, own in enumerate(present) if resumed_from and own.samefile(resumed_from)]
        self.earlier = present[later[0] :] if later else present
        self.abandoned: list[Path] = []
        self.is_overwritten = not later and bool(present or (self.path / FINAL).exists())

    def describe(self) -> list[Notice]:
        """What will become of an earlier run."""
        if self.is_overwritten:
            text = f"the earlier run in {self.path} stays until this one has a result; until then the log is "
            return [Notice(text + str(self.place(LOG_NAME)))]
        text = "is later than the start of this run; its first checkpoint renames it to"
        return [Notice(f"{path.name} {text} {abandoned_name(path).name}") for path in self.earlier]

    def place(self, name: str) -> Path:
        """Path of a file about the run: beside that of an earlier run until this one has a result."""
        return self.path / (f"{name}.new" if self.is_overwritten else name)

    def last_checkpoint(self) -> str:
        """The newest checkpoint of this run, or of the one it continues, in words."""
        own = [path for path in list_checkpoints(self.path) if path not in self.earlier]
        return f"the last good checkpoint is {own[-1]}" if own else "there is no earlier checkpoint"

    def clear_unfinished(self) -> None:
        """Delete what a killed run or a full disk left half-written."""
        remove(self.staging)
        remove(partial_name(self.path / FINAL))

    def publish(self, name: str, *, limit: int | None = None, best: str | None = None) -> None:
        """Rename a finished checkpoint out of `staging`, then delete the oldest beyond `limit`.

        The newest and the folder `best` always stay.
        """
        self.set_earlier_aside()
        replace_folder(self.staging / name, self.path / name)
        remove(self.staging)
        self.replace_earlier()
        kept = Path(best).resolve() if best else None
        for path in list_checkpoints(self.path)[: -limit if limit else 0]:
            if path.resolve() != kept:
                remove(path)

    def set_earlier_aside(self) -> None:
        """Rename the earlier checkpoints, so that none is ever beside one of this run."""
        self.abandoned = [path.rename(abandoned_name(path)) for path in self.earlier]
        self.earlier = []

    def replace_earlier(self) -> None:
        """Now that this run has a result, delete what it overwrites and rename its log and record."""
        if self.is_overwritten:
            for path in self.abandoned:
                remove(path)
            for name in (LOG_NAME, RECORD_NAME):
                self.place(name).replace(self.path / name)
            self.is_overwritten = False


def abandoned_name(path: Path) -> Path:
    """checkpoint-6.abandoned, or with a number where that exists."""
    names = (path.with_name(f"{path.name}.abandoned{number or ''}") for number in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def check_unlocked(output_dir: str | Path) -> None:
    """Raise ValueError where another run holds `output_dir`; for any rank, writes nothing."""
    path = Path(output_dir) / LOCK_NAME
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            acquire(file, fcntl.LOCK_SH)


def lock_output_dir(output_dir: str | Path) -> tuple[IO | None, list[Notice]]:
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
            refusal = f"output_dir: cannot write in {str(output_dir)!r} ({error.strerror}); give another folder"
    if refusal := gather_objects(refusal)[0]:
        raise ValueError(refusal)
    return file, notices


def acquire(file: IO, kind: int) -> list[Notice]:
    """Lock `file`, or raise ValueError with process and host of the run that holds it; returns notices."""
    folder = str(Path(file.name).parent)
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        text = f"another run writes to {folder!r} ({file.read() or 'just started'})"
        raise ValueError(f"output_dir: {text}; wait for its end, or choose another folder") from None
    except OSError as error:
        return [Notice(f"output_dir: the file system of {folder!r} has no locks ({error}); start no second run there")]
    return []
