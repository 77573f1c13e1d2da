"""Start and end of a training run: processes, seed, log, checkpoint to resume from, run record."""

import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed

from component.arguments import Settings
from component.checkpoint import FINAL, remove_checkpoints
from component.checkpoint_contents import load_without_code
from component.distributed import barrier, is_main_process, set_single_process_environment, world_size
from component.files import write_json
from component.resuming import data_hashes, resume_point
from component.run_record import make_run_record, save_run_record
from component.trainer import LongContextTrainer

logger = logging.getLogger("longqlora")


@dataclass
class Run:
    """A run that has begun."""

    arguments: TrainingArguments
    checkpoint: str | None
    record: dict
    started: float

    def log(self, text: str) -> None:
        """Log on rank 0, each line of `text` on its own."""
        for line in text.splitlines():
            logger.info(line)

    def finish(self, trainer: LongContextTrainer, *, predicted_gib: float) -> None:
        """Save what was trained as final/, and log and save what the run took: wall time, start-up (to the first
        step), the part of the training time that went into waiting for data, steps, last loss, peak memory beside the
        predicted one. A run that was complete before it was resumed changes none of it.
        """
        final, state = Path(self.arguments.output_dir) / FINAL, trainer.state
        if self.checkpoint and trainer.start_up.seconds is None and final.is_dir():
            self.log(
                f"nothing left to train: {self.checkpoint} is at step {state.global_step} of {state.max_steps}; "
                f"{final} stays as it is"
            )
            return
        self.log(f"saved {trainer.save_final()}")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runtime = next((x["train_runtime"] for x in trainer.state.log_history[::-1] if "train_runtime" in x), None)
        result = {
            "global_step": trainer.state.global_step,
            "last_loss": losses[-1] if losses else None,
            "minutes": round((time.time() - self.started) / 60, 2),
            "start_up_seconds": trainer.start_up.seconds and round(trainer.start_up.seconds, 2),
            "data_share": round(trainer.data_seconds / runtime, 4) if runtime else None,
            "peak_gpu_memory_gib": peak_memory_gib(),
            "predicted_memory_gib": round(predicted_gib, 2),
            "log_history": trainer.state.log_history,
        }
        if is_main_process():
            write_json(Path(self.arguments.output_dir) / "train_results.json", result)
        shown = {key: value for key, value in result.items() if key != "log_history" and value is not None}
        self.log("finished: " + ", ".join(f"{key} {value}" for key, value in shown.items()))


def start_run(settings: Settings, notices: list[str], **facts) -> Run:
    """Join the other processes, decide where to resume, open the log and write the run record with `facts`."""
    started = time.time()
    uses_deepspeed = settings.training.get("deepspeed") is not None
    hashes = data_hashes(settings.data)
    checkpoint, decision, changes = resume_point(settings, hashes)
    # Its exchange of heads and tokens is used without its engine too.
    shares_rows = settings.parallel.sequence_parallel_size > 1
    prepare_environment(uses_deepspeed=uses_deepspeed or shares_rows, output_dir=settings.training["output_dir"])
    load_without_code(uses_deepspeed=uses_deepspeed)
    arguments = settings.training_arguments()
    set_seed(arguments.seed)
    facts |= {"world_size": world_size(), "device": device_name(), "data_sha256": hashes}
    record = make_run_record(settings.as_dict(), **facts)
    if is_main_process():
        if not checkpoint:
            remove_checkpoints(arguments.output_dir)
        save_run_record(arguments.output_dir, record)
    barrier()
    open_log(Path(arguments.output_dir) / "train.log")
    run = Run(arguments, str(checkpoint) if checkpoint else None, record, started)
    run.log("versions: " + json.dumps(record["versions"]))
    for notice in notices:
        logger.warning(notice) if "no effect" in notice or "becomes" in notice else logger.info(notice)
    run.log(decision)
    if is_main_process():
        for change in changes:
            logger.warning(change)
    return run


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
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {os.cpu_count()}"


def peak_memory_gib() -> float | None:
    """Highest GPU memory reserved by this process in GiB; None without a GPU."""
    return round(torch.cuda.max_memory_reserved() / 2**30, 2) if torch.cuda.is_available() else None
