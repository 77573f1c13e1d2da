"""transformers' Trainer with atomic checkpoints, pickle-free adapters and a run record."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from longqlora.cli import one_line
from longqlora.data.collator import PartCollator
from longqlora.distributed import barrier, is_main_process
from longqlora.files import atomic_folder
from longqlora.model.adapter_folder import save_adapter
from longqlora.model.saved_folder import save_config, save_tokenizer
from longqlora.run_record import save_run_record
from longqlora.training.checkpoint import FINAL, MARK_OF_COMPLETENESS, STAGING, clear_staging, publish, rotate
from longqlora.training.divergence import DivergenceWatch, all_finite
from longqlora.training.earlier_run import EarlierRun

logger = logging.getLogger("longqlora")


class LongContextTrainer(Trainer):
    """Trains with next-token loss, and stops with ValueError where that diverges; everything trained, the extended
    config and the tokenizer go into each checkpoint folder, which appears under its name only when it is complete."""

    def __init__(
        self, *args, run_record: dict[str, Any], earlier: EarlierRun, sequence_parallel_size: int = 1, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        # It puts the mean of earlier losses in the place of one that is not finite.
        self.args.logging_nan_inf_filter = False
        # At the end of training it deletes all but the best, the newest and abandoned ones among them.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.run_record = run_record
        self.earlier = earlier
        self.watch = DivergenceWatch()
        self.sequence_parallel_size = sequence_parallel_size
        self.is_saving = False
        self.data_seconds = 0.0
        self.start_up = StartUp()
        self.add_callback(StepLog())
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

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
        except Exception as error:
            # DeepSpeed's way to say that fp16 cannot go on.
            if "loss scale already at minimum" not in str(error):
                raise
            self._stop("the loss scale of fp16 is at its minimum", step=self.state.global_step + 1)
        return self.watch.add(loss)

    def _get_grad_norm(self, *args, **kwargs) -> torch.Tensor | float | None:
        # Called once in each optimizer step, after the last backward pass.
        grad_norm = super()._get_grad_norm(*args, **kwargs)
        sign = self.watch.end_step(grad_norm, is_fp16=self.args.fp16)
        if sign:
            self._stop(sign, step=self.state.global_step + 1)
        return grad_norm

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            self._stop(f"eval_loss {metrics['eval_loss']}", step=self.state.global_step)
        return metrics

    def _check_weights(self) -> None:
        if not all_finite(self.model.parameters()):
            self._stop("its weights are not finite", step=self.state.global_step)

    def _stop(self, sign: str, *, step: int) -> NoReturn:
        """End a run that has diverged; every rank comes here."""
        raise ValueError(
            f"training diverged at step {step} ({sign}), of which nothing is saved; {self.earlier.last_checkpoint()}; "
            "lower learning_rate, or give it more warmup_steps"
        ) from None

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
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._check_weights()
        self.is_saving = True
        try:
            self._write(lambda: super(LongContextTrainer, self)._save_checkpoint(model, trial), name)
        finally:
            self.is_saving = False
        self._place_best()
        self._write(lambda: self._publish(name), name, only_main=True)
        # Rank 0 did away with them.
        self.earlier.checkpoints = []

    def _place_best(self) -> None:
        """Say where the best checkpoint will lie: transformers has found this one in the staging folder.

        One of the folder that the run was resumed from stays where it is.
        """
        best, output_dir = self.state.best_global_step, Path(self.args.output_dir)
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        if best == self.state.global_step or (folder.is_dir() and folder not in self.earlier.checkpoints):
            self.state.best_model_checkpoint = str(folder)

    def _publish(self, name: str) -> None:
        output_dir = self.args.output_dir
        self.state.save_to_json(str(Path(output_dir) / STAGING / name / MARK_OF_COMPLETENESS))
        self.earlier.step_aside()
        publish(output_dir, name)
        self.earlier.give_way()
        rotate(output_dir, self.save_total_limit, self.state.best_model_checkpoint)

    def _write(self, write: Callable[[], Any], name: str, *, only_main: bool = False) -> None:
        """Run `write` on every rank or on rank 0, then wait for all. A failure leaves nothing half-written and says
        what is still good."""
        try:
            if is_main_process() or not only_main:
                write()
        except (OSError, SafetensorError, RuntimeError) as error:
            clear_staging(self.args.output_dir)
            reason = one_line(error.__cause__ or error.__context__ or error)
            problem = f"output_dir: could not write {name} to {self.args.output_dir!r} ({reason})"
            failure = OSError(f"{problem}; {self.earlier.last_checkpoint()}")
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
        """Write what was trained to output_dir/final. Raises ValueError where nothing was, or where it has diverged."""
        if self.state.global_step == 0:
            raise ValueError(
                f"training ended without a single step, so nothing is saved as {FINAL}; give more rows in train_file, "
                "or lower per_device_train_batch_size"
            )
        self._check_weights()
        target = Path(self.args.output_dir) / FINAL
        self._write(lambda: self._write_final(target), FINAL)
        return target

    def _write_final(self, target: Path) -> None:
        if not is_main_process():
            return self.save_model(None, _internal_call=True)
        with atomic_folder(target) as folder:
            self.save_model(str(folder), _internal_call=True)
            self.earlier.step_aside()
        self.earlier.give_way()


class StepLog(TrainerCallback):
    """Writes every logged line to the log."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            logger.info(
                "step %d: %s",
                state.global_step,
                ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in logs.items()),
            )


class StartUp(TrainerCallback):
    """Seconds from the start of the process to its first training step."""

    seconds: float | None = None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.seconds is None:
            self.seconds = time.time() - psutil.Process().create_time()


def share_rows(loader: DataLoader, size: int) -> DataLoader:
    """Give the processes that share a row the same rows; `loader` is accelerate's, split among all processes."""
    sampler = loader.batch_sampler
    sampler.num_processes, sampler.process_index = sampler.num_processes // size, sampler.process_index // size
    return loader
