"""transformers' Trainer with atomic checkpoints, pickle-free adapters and a run record."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from component.adapter_folder import save_adapter
from component.checkpoint import FINAL, STAGING, clear_staging, list_checkpoints, publish, rotate
from component.cli import one_line
from component.distributed import barrier, is_main_process
from component.files import atomic_folder
from component.plot import plot_loss_curve
from component.run_record import save_run_record
from component.saved_folder import save_config, save_tokenizer
from component.sequence_parallel import PartCollator, share_rows

logger = logging.getLogger("longqlora")


class LongContextTrainer(Trainer):
    """Trains with next-token loss; everything trained, the extended config and the tokenizer go into
    each checkpoint folder, which appears under its name only when it is complete."""

    def __init__(self, *args, run_record: dict[str, Any], sequence_parallel_size: int = 1, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.run_record = run_record
        self.sequence_parallel_size = sequence_parallel_size
        self.is_saving = False
        self.data_seconds = 0.0
        self.start_up = StartUp()
        self.add_callback(LossCurve())
        self.add_callback(self.start_up)

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        samples = super().get_batch_samples(*args, **kwargs)
        self.data_seconds += time.perf_counter() - start
        return samples

    def get_train_dataloader(self) -> DataLoader:
        size, whole = self.sequence_parallel_size, self.data_collator
        if size == 1:
            return super().get_train_dataloader()
        # For training only: in evaluation every process has rows of its own.
        self.data_collator = PartCollator(whole, size)
        try:
            return share_rows(super().get_train_dataloader(), size)
        finally:
            self.data_collator = whole

    def prediction_step(self, *args, **kwargs):
        # Else a row's loss is scaled by the tokens that other processes have in the same step, and the mean, from
        # which repeated rows of the last step are left out, depends on the number of processes.
        accepts, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, False
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.model_accepts_loss_kwargs = accepts

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return super().get_total_train_batch_size(args) // self.sequence_parallel_size

    def _run_epoch(self, *args, **kwargs) -> None:
        # transformers looks at max_steps after a step only: a run that was killed when its last checkpoint
        # was written would train one step too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        run_dir = super()._get_output_dir(trial)
        return str(Path(run_dir) / STAGING) if self.is_saving else run_dir

    def _save_checkpoint(self, model, trial) -> None:
        output_dir, name = self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = self.state.best_global_step
        if best:
            self.state.best_model_checkpoint = str(Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{best}")
        self._write(lambda: clear_staging(output_dir), everywhere=False)
        self.is_saving = True
        try:
            self._write(lambda: super(LongContextTrainer, self)._save_checkpoint(model, trial), everywhere=True)
        finally:
            self.is_saving = False
        self._write(lambda: publish(output_dir, name), everywhere=False)
        if is_main_process():
            rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write(self, write: Callable[[], Any], *, everywhere: bool) -> None:
        """Run `write` on rank 0 or on every rank, then wait for all; a failure names what is still good."""
        try:
            if everywhere or is_main_process():
                write()
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = one_line(error.__cause__ or error.__context__ or error)
            good = list_checkpoints(self.args.output_dir)
            clear = f"the last good checkpoint is {good[-1]}" if good else "there is no earlier checkpoint"
            failure = OSError(
                f"output_dir: could not write a checkpoint to {self.args.output_dir!r} ({reason}); {clear}"
            )
            failure.from_one_rank = True
            raise failure from error
        barrier()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights as safetensors, config, tokenizer and run record; no pickled training arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if hasattr(model, "peft_config"):
            save_adapter(model, folder, state_dict=state_dict)
        else:
            model.save_pretrained(folder, state_dict=state_dict)
            save_config(model.config, folder)
        save_tokenizer(self.processing_class, folder)
        save_run_record(folder, self.run_record)

    def save_final(self) -> Path:
        """Write what was trained to output_dir/final. Raises ValueError where nothing was."""
        if self.state.global_step == 0:
            raise ValueError(
                f"training ended without a single step, so nothing is saved as {FINAL}; give more rows in train_file, "
                "or lower per_device_train_batch_size"
            )
        target = Path(self.args.output_dir) / FINAL
        if is_main_process():
            with atomic_folder(target) as folder:
                self.save_model(str(folder), _internal_call=True)
        else:
            self.save_model(None, _internal_call=True)
        return target


class LossCurve(TrainerCallback):
    """Writes every logged line to the log and, at the end, the loss curve as PNG."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            logger.info(
                "step %d: %s",
                state.global_step,
                ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in logs.items()),
            )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        points = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
        if state.is_world_process_zero and points:
            plot_loss_curve(*zip(*points, strict=True), Path(args.output_dir) / "loss.png")


class StartUp(TrainerCallback):
    """Seconds from the start of the process to its first training step."""

    seconds: float | None = None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.seconds is None:
            self.seconds = time.time() - psutil.Process().create_time()
