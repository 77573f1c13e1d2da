"""Start and end of a training run: processes, seed, log, checkpoint to resume from, run record, results."""

import json
import logging
import os
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel, set_seed

from longqlora.device import GIB
from longqlora.distributed import barrier, is_main_process, set_single_process_environment, world_size
from longqlora.files import write_json
from longqlora.plot import plot_loss_curve
from longqlora.run_record import RECORD_NAME, make_run_record, read_run_record
from longqlora.settings.config import Notice, Settings
from longqlora.training.arguments import RunArguments
from longqlora.training.hub import create_repository, upload
from longqlora.training.resume import FINAL, choose_start, data_hashes, load_without_code, resume_point
from longqlora.training.run_folder import LOG_NAME, RESULTS_NAME, RunFolder, check_unlocked, lock_output_dir
from longqlora.training.termination import end_on_sigterm
from longqlora.training.trainer import LongContextTrainer

logger = logging.getLogger("longqlora")


@dataclass
class Run:
    """A run that has begun. `lock` keeps other runs out of its folder for as long as it is open; repository: the one on
    the hub for final/."""

    checkpoint: str | None
    record: dict
    folder: RunFolder
    lock: IO | None
    started: float
    settings: Settings
    repository: str | None

    def log(self, text: str) -> None:
        """Log on rank 0, each line of `text` on its own."""
        for line in text.splitlines():
            logger.info(line)

    def log_above_bars(self) -> AbstractContextManager:
        """While entered, lines on the terminal go above progress bars."""
        return logging_redirect_tqdm([logger])

    def note(self, **facts) -> None:
        """Add facts to the run record."""
        self.record.update(facts)
        if is_main_process():
            write_json(self.folder.place(RECORD_NAME), self.record)

    def finish(self, trainer: LongContextTrainer, *, predicted_gib: float) -> None:
        """Save what was trained as final/, and the results: losses, wall time, start-up (to the first step), the
        share of the training time spent waiting for data, peak memory beside the predicted one.

        A run that was complete before it was resumed stays as it is.
        """
        final, results, state = self.folder.path / FINAL, self.folder.path / RESULTS_NAME, trainer.state
        if self.checkpoint and trainer.start_up_seconds is None:
            trained_by = read_run_record(self.checkpoint)
            # They differ where a run overwrote another and was killed between its last checkpoint and its end.
            if final.is_dir() and read_run_record(final) == trained_by and results.is_file():
                steps = f"step {state.global_step} of {state.max_steps}"
                self.log(f"nothing left to train: {self.checkpoint} is at {steps}; {final} stays as it is")
                return self.publish(final)
            trainer.run_record = trained_by or trainer.run_record
        self.log(f"saved {trainer.save_final()}")
        losses = {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}
        runtime = next((entry["train_runtime"] for entry in state.log_history[::-1] if "train_runtime" in entry), None)
        peak = torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else None
        result = {
            "global_step": state.global_step,
            "first_dense_step": self.record["first_dense_step"],
            "last_loss": list(losses.values())[-1] if losses else None,
            "minutes": round((time.time() - self.started) / 60, 2),
            "start_up_seconds": trainer.start_up_seconds and round(trainer.start_up_seconds, 2),
            "data_share": round(trainer.data_seconds / runtime, 4) if runtime else None,
            "peak_gpu_memory_gib": peak and round(peak, 2),
            "predicted_memory_gib": round(predicted_gib, 2),
        }
        if is_main_process():
            write_json(results, {**result, "log_history": state.log_history})
            if losses:
                plot_loss_curve(list(losses), list(losses.values()), self.folder.path / "loss.png")
        self.log("finished: " + ", ".join(f"{key} {value}" for key, value in result.items() if value is not None))
        self.publish(final)

    def publish(self, final: Path) -> None:
        """Upload final/ where the settings say push_to_hub."""
        if self.repository and is_main_process():
            self.log(f"uploaded {upload(final, self.repository, self.settings.training)}")


def start_run(
    settings: Settings, arguments: RunArguments, model: PreTrainedModel, notices: list[Notice], **facts
) -> Run:
    """Join the other processes, decide where to resume, open the log and write the run record with `facts`; `model` on
    the meta device, as `check_model` gives it."""
    started = time.time()
    output_dir, uses_deepspeed = settings.training["output_dir"], settings.training.get("deepspeed") is not None
    check_unlocked(output_dir)
    checkpoint, on_start = resume_point(settings, model)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(output_dir) / "tensorboard"))
    os.environ.setdefault("WANDB_DIR", output_dir)
    os.environ.setdefault("WANDB_NAME", Path(output_dir).name)
    # Processes that share rows use its exchange of heads and tokens, without its engine too.
    if uses_deepspeed or settings.parallel.sequence_parallel_size > 1:
        prepare_deepspeed()
    load_without_code(uses_deepspeed=uses_deepspeed)
    arguments.join()
    lock, on_lock = lock_output_dir(output_dir)
    if choose_start(settings) != checkpoint:
        raise ValueError(f"output_dir: another run just wrote to {output_dir!r}; start again to go on from there")
    repository = create_repository(settings.training) if is_main_process() else None
    folder = RunFolder(output_dir, checkpoint)
    set_seed(arguments.seed)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {os.cpu_count()}"
    facts |= {"world_size": world_size(), "device": device, "data_sha256": data_hashes(settings.data)}
    record = make_run_record(settings.as_dict(), **facts)
    barrier()
    if is_main_process():
        folder.clear_unfinished()
        write_json(folder.place(RECORD_NAME), record)
    open_log(folder.place(LOG_NAME))
    end_on_sigterm(lambda: folder.clear_unfinished() or folder.last_checkpoint())
    run = Run(str(checkpoint) if checkpoint else None, record, folder, lock, started, settings, repository)
    run.log("versions: " + json.dumps(record["versions"]))
    for notice in [*notices, *on_lock, *folder.describe(), *on_start]:
        logger.log(notice.level, notice.text)
    return run


def prepare_deepspeed() -> None:
    """What DeepSpeed reads from the environment in a process that no launcher started; no extension for the CPU."""
    set_single_process_environment()
    if not torch.cuda.is_available():
        import deepspeed

        # Its first use compiles for a minute and leaks 69 MB of shared memory per run; gloo does as well here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def open_log(path: Path) -> None:
    """Log to stdout and `path` on rank 0; the others are silent."""
    logger.disabled = not is_main_process()
    if logger.disabled:
        return
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    # On a full disk, where it would print a traceback for each line, the log is cut short. Stdout has it all.
    logging.raiseExceptions = False
    for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(path, encoding="utf-8")):
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
