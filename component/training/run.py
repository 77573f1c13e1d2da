"""Start and end of a training run: processes, seed, log, checkpoint to resume from, run record."""

import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from transformers import TrainingArguments, set_seed

from longqlora.distributed import barrier, is_main_process, set_single_process_environment, world_size
from longqlora.files import partial_name, remove, write_json
from longqlora.plot import plot_loss_curve
from longqlora.run_record import RECORD_NAME, make_run_record, read_run_record
from longqlora.settings.config import Notice, Settings
from longqlora.training.arguments import RunArguments
from longqlora.training.checkpoint import FINAL, clear_staging
from longqlora.training.checkpoint_contents import load_without_code
from longqlora.training.earlier_run import LOG_NAME, EarlierRun
from longqlora.training.resuming import choose_start, data_hashes, resume_point
from longqlora.training.run_lock import check_unlocked, lock_output_dir
from longqlora.training.termination import end_on_sigterm
from longqlora.training.trainer import LongContextTrainer

logger = logging.getLogger("longqlora")


@dataclass
class Run:
    """A run that has begun. `lock` keeps others out of its output_dir for as long as it is open."""

    arguments: TrainingArguments
    checkpoint: str | None
    record: dict
    earlier: EarlierRun
    lock: IO | None
    started: float

    def log(self, text: str) -> None:
        """Log on rank 0, each line of `text` on its own."""
        for line in text.splitlines():
            logger.info(line)

    def finish(self, trainer: LongContextTrainer, *, predicted_gib: float) -> None:
        """Save what was trained as final/, and log and save what the run took: wall time, start-up (to the first
        step), the part of the training time that went into waiting for data, steps, last loss, peak memory beside the
        predicted one; draw the losses. A run that was complete before it was resumed changes none of it.
        """
        final, state = Path(self.arguments.output_dir) / FINAL, trainer.state
        if self.checkpoint and trainer.start_up.seconds is None:
            trained_by = read_run_record(self.checkpoint)
            # Not so where a run overwrote another and was killed between its last checkpoint and its end.
            if final.is_dir() and read_run_record(final) == trained_by:
                self.log(
                    f"nothing left to train: {self.checkpoint} is at step {state.global_step} of {state.max_steps}; "
                    f"{final} stays as it is"
                )
                return
            trainer.run_record = trained_by or trainer.run_record
        self.log(f"saved {trainer.save_final()}")
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        runtime = next((x["train_runtime"] for x in trainer.state.log_history[::-1] if "train_runtime" in x), None)
        result = {
            "global_step": trainer.state.global_step,
            "last_loss": list(losses.values())[-1] if losses else None,
            "minutes": round((time.time() - self.started) / 60, 2),
            "start_up_seconds": trainer.start_up.seconds and round(trainer.start_up.seconds, 2),
            "data_share": round(trainer.data_seconds / runtime, 4) if runtime else None,
            "peak_gpu_memory_gib": peak_memory_gib(),
            "predicted_memory_gib": round(predicted_gib, 2),
            "log_history": trainer.state.log_history,
        }
        if is_main_process():
            folder = Path(self.arguments.output_dir)
            write_json(folder / "train_results.json", result)
            if losses:
                plot_loss_curve(list(losses), list(losses.values()), folder / "loss.png")
        shown = {key: value for key, value in result.items() if key != "log_history" and value is not None}
        self.log("finished: " + ", ".join(f"{key} {value}" for key, value in shown.items()))


def start_run(settings: Settings, arguments: RunArguments, notices: list[Notice], **facts) -> Run:
    """Join the other processes, decide where to resume, open the log and write the run record with `facts`."""
    started = time.time()
    output_dir, uses_deepspeed = settings.training["output_dir"], settings.training.get("deepspeed") is not None
    check_unlocked(output_dir)
    hashes = data_hashes(settings.data)
    checkpoint, decision, changes = resume_point(settings, hashes)
    # Its exchange of heads and tokens is used without its engine too.
    shares_rows = settings.parallel.sequence_parallel_size > 1
    prepare_environment(uses_deepspeed=uses_deepspeed or shares_rows, output_dir=output_dir)
    load_without_code(uses_deepspeed=uses_deepspeed)
    arguments.join()
    lock, lock_notices = lock_output_dir(output_dir)
    if choose_start(settings) != (checkpoint, decision):
        raise ValueError(f"output_dir: another run just wrote to {output_dir!r}; start again to go on from there")
    earlier = EarlierRun(output_dir, checkpoint)
    notices += map(Notice, [*lock_notices, *earlier.describe()])
    set_seed(arguments.seed)
    facts |= {"world_size": world_size(), "device": device_name(), "data_sha256": hashes}
    record = make_run_record(settings.as_dict(), **facts)
    barrier()
    if is_main_process():
        clear_unfinished(output_dir)
        write_json(earlier.place(RECORD_NAME), record)
    open_log(earlier.place(LOG_NAME))
    end_on_sigterm(lambda: clear_unfinished(output_dir) or earlier.last_checkpoint())
    run = Run(arguments, str(checkpoint) if checkpoint else None, record, earlier, lock, started)
    run.log("versions: " + json.dumps(record["versions"]))
    for notice in notices:
        logger.log(notice.level, notice.text)
    run.log(decision)
    if is_main_process():
        for change in changes:
            logger.warning(change)
    return run


def clear_unfinished(output_dir: str) -> None:
    """Delete what a stopped run left half-written."""
    clear_staging(output_dir)
    remove(partial_name(Path(output_dir) / FINAL))


def prepare_environment(*, uses_deepspeed: bool, output_dir: str) -> None:
    """What DeepSpeed and tensorboard read from the environment, set where the user did not."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(output_dir) / "tensorboard"))
    if not uses_deepspeed:
        return
    set_single_process_environment()
    if not torch.cuda.is_available():
        import deepspeed

        # Its first use compiles for a minute and leaks 69 MB of shared memory per run; gloo does as well here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def open_log(path: Path) -> None:
    """Log to stdout and `path` on rank 0; other ranks only warn."""
    logger.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    logger.propagate = False
    logger.handlers.clear()
    handlers = [logging.StreamHandler(sys.stdout)]
    if is_main_process():
        handlers.append(LogFile(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


class LogFile(logging.FileHandler):
    """A log that a full disk cuts short, where logging would print a traceback for each line. Stdout has them all."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {os.cpu_count()}"


def peak_memory_gib() -> float | None:
    """Highest GPU memory reserved by this process in GiB; None without a GPU."""
    return round(torch.cuda.max_memory_reserved() / 2**30, 2) if torch.cuda.is_available() else None
