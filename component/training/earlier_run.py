"""What an earlier run left in output_dir: untouched until this run has a result to put there."""

import itertools
import os
from pathlib import Path

from longqlora.files import remove
from longqlora.run_record import RECORD_NAME
from longqlora.training.checkpoint import FINAL, list_checkpoints

LOG_NAME = "train.log"
OVERWRITTEN = ".overwritten"


class EarlierRun:
    """Checkpoints in output_dir that this run does not go on from, and how they give way to its first result.

    A run that overwrites its folder deletes them. A run that resumes keeps those later than its start under another
    name, so that they are neither resumed from nor counted.
    """

    def __init__(self, output_dir: str | Path, resumed_from: Path | None) -> None:
        self.folder = Path(output_dir)
        present = list_checkpoints(output_dir)
        places = [path.resolve() for path in present]
        goes_on = resumed_from is not None and resumed_from.resolve() in places
        self.checkpoints = present[places.index(resumed_from.resolve()) + 1 :] if goes_on else present
        self.is_overwritten = not goes_on and bool(present or (self.folder / FINAL).exists())

    def describe(self) -> list[str]:
        """What will become of it, for the log."""
        if self.is_overwritten:
            return [
                f"the earlier run in {self.folder} stays until this one has a result; until then the log is "
                f"{self.place(LOG_NAME)}"
            ]
        return [
            f"{path.name} lies behind the start of this run; its first checkpoint makes it {free_name(path).name}"
            for path in self.checkpoints
        ]

    def place(self, name: str) -> Path:
        """Where a file about the run goes: beside the earlier run's, as long as that stays."""
        return self.folder / (f"{name}.new" if self.is_overwritten else name)

    def last_checkpoint(self) -> str:
        """The newest checkpoint of this run, or of the one it goes on from, in words."""
        good = [path for path in list_checkpoints(self.folder) if path not in self.checkpoints]
        return f"the last good checkpoint is {good[-1]}" if good else "there is no earlier checkpoint"

    def step_aside(self) -> None:
        """Rename the checkpoints, so that none of them ever lies beside one of this run."""
        for path in self.checkpoints:
            target = self.folder / OVERWRITTEN / path.name if self.is_overwritten else free_name(path)
            target.parent.mkdir(exist_ok=True)
            remove(target)
            path.rename(target)
        self.checkpoints = []

    def give_way(self) -> None:
        """Called when this run has a result: delete what it overwrites, and put log and record in place."""
        remove(self.folder / OVERWRITTEN)
        if self.is_overwritten:
            for name in (LOG_NAME, RECORD_NAME):
                self.place(name).replace(self.folder / name)
            self.is_overwritten = False


def free_name(path: Path) -> Path:
    """checkpoint-6.abandoned, or with a number behind it where that exists."""
    names = (path.with_name(f"{path.name}.abandoned{number or ''}") for number in itertools.count())
    return next(name for name in names if not os.path.lexists(name))
