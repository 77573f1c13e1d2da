"""transformers' Trainer with atomic checkpoints, a stop where training diverges, and rows shared by processes.

Only public methods of transformers are overridden. It writes a checkpoint into its own output_dir, here the staging
folder; `on_save`, which it calls on every rank afterwards, renames the finished checkpoint into the run's folder. The
trainer is its own callback.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from safetensors import SafetensorError
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from longqlora.cli import one_line
from longqlora.data.collator import PartCollator
from longqlora.device import GIB
from longqlora.distributed import barrier, gather_objects, is_main_process, world_size
from longqlora.files import atomic_folder, remove, write_json
from longqlora.model.adapter_folder import save_adapter
from longqlora.model.saved_folder import save_config, save_tokenizer
from longqlora.run_record import RECORD_NAME
from longqlora.training.model_card import make_model_card
from longqlora.training.resume import FINAL, TRAINER_STATE
from longqlora.training.run_folder import RESULTS_NAME, RunFolder

logger = logging.getLogger("longqlora")

# DeepSpeed's largest initial scale, 2**32, is down to 1 after 33 skipped steps, torch's 2**16 after 16.
MAX_SKIPPED_STEPS = 40


class LongContextTrainer(Trainer, TrainerCallback):
    """Checkpoints hold everything trained, the extended config and the tokenizer. Divergence raises ValueError."""

    def __init__(
        self, *args, folder: RunFolder, run_record: dict[str, Any], sequence_parallel_size: int = 1, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self.args.output_dir = str(folder.staging)
        # It replaces a loss that is not finite by the mean of earlier ones.
        self.args.logging_nan_inf_filter = False
        self.folder, self.run_record, self.sequence_parallel_size = folder, run_record, sequence_parallel_size
        self.watch = DivergenceWatch()
        # What is being written, for the error of a full disk.
        self.unwritten: str | None = None
        self.data_seconds = 0.0
        # From the start of the process to its first training step; None before that.
        self.start_up_seconds: float | None = None
        # Since the last line of the log: tokens of this process, padding included, and seconds of its steps.
        self.num_tokens, self.step_seconds, self.step_start = 0, 0.0, 0.0
        # `log` says what these would print once more.
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressBar)
        self.add_callback(self)

    def get_train_dataloader(self) -> DataLoader:
        size, args = self.sequence_parallel_size, self.args
        if size == 1:
            return super().get_train_dataloader()
        # In training the processes of a group take the same rows, and a part of each; in evaluation rows of their own.
        by_length = partial(LengthGroupedSampler, args.train_batch_size * args.gradient_accumulation_steps)
        samplers = {"random": RandomSampler, "sequential": SequentialSampler, "group_by_length": by_length}
        strategy = args.train_sampling_strategy
        if strategy not in samplers:
            raise ValueError(
                f"train_sampling_strategy: {strategy!r} does not go with sequence_parallel_size; choose from "
                f"{', '.join(samplers)}"
            )
        options = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "drop_last")
        loader = DataLoader(
            self.train_dataset,
            args.train_batch_size,
            sampler=samplers[strategy](self.train_dataset),
            collate_fn=PartCollator(self.data_collator, size),
            **{name: getattr(args, f"dataloader_{name}") for name in options},
        )
        places = {"num_processes": args.world_size // size, "process_index": args.process_index // size}
        return prepare_data_loader(loader, **places, use_seedable_sampler=True, data_seed=args.data_seed)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return super().get_total_train_batch_size(args) // self.sequence_parallel_size

    def get_batch_samples(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # transformers compares them after a step only: a run that was killed when its last checkpoint was
            # written would train one step too many.
            self.control.should_training_stop = True
            return [], None
        self.step_start = time.perf_counter()
        samples = super().get_batch_samples(*args, **kwargs)
        self.data_seconds += time.perf_counter() - self.step_start
        return samples

    def training_step(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args, **kwargs) -> torch.Tensor:
        if self.start_up_seconds is None:
            self.start_up_seconds = time.time() - psutil.Process().create_time()
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except Exception as error:
            # DeepSpeed's way to say that fp16 cannot go on.
            if "loss scale already at minimum" not in str(error):
                raise
            self.stop("the loss scale of fp16 is at its minimum", step=self.state.global_step + 1)
        loss = self.watch.add(loss)
        self.num_tokens += inputs["input_ids"].numel()
        # After the last micro-batch of a step, when the gradients are complete.
        if self.accelerator.sync_gradients:
            if sign := self.watch.end_step(self.gradient_norm(), is_fp16=self.args.fp16):
                self.stop(sign, step=self.state.global_step + 1)
        return loss

    def gradient_norm(self) -> torch.Tensor | float | None:
        """Norm of the gradients over all ranks; infinite where DeepSpeed skipped the step, None where unknown."""
        if self.is_deepspeed_enabled:
            return self.model_wrapped.get_global_grad_norm()
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            self.stop(f"eval_loss {metrics['eval_loss']}", step=self.state.global_step)
        return metrics

    def prediction_step(self, *args, **kwargs):
        # Else a row's loss is scaled by the tokens that other processes have in the same step, and the mean, from
        # which repeated rows of the last step are left out, depends on the number of processes.
        accepts, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, False
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.model_accepts_loss_kwargs = accepts

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs.update(self.speed_and_memory())
        super().log(logs, *args, **kwargs)
        values = (f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in logs.items())
        logger.info("step %d: %s", self.state.global_step, ", ".join(values))

    def speed_and_memory(self) -> dict[str, float]:
        """Tokens per second over all processes since the last call, evaluations and checkpoints left out, and the
        memory of this process in GiB: the most of its GPU so far, or what it holds of the host's."""
        if torch.cuda.is_available():
            memory = {"peak_gpu_memory_gib": round(torch.cuda.max_memory_reserved() / GIB, 2)}
        else:
            memory = {"host_memory_gib": round(psutil.Process().memory_info().rss / GIB, 2)}
        num_tokens, seconds = sum(gather_objects(self.num_tokens)), self.step_seconds
        self.num_tokens, self.step_seconds = 0, 0.0
        return {**({"tokens_per_second": round(num_tokens / seconds, 1)} if seconds else {}), **memory}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.step_seconds += time.perf_counter() - self.step_start

    def stop(self, sign: str, *, step: int) -> NoReturn:
        """End a run that has diverged; every rank comes here."""
        text = f"training diverged at step {step} ({sign}), of which nothing is saved; {self.folder.last_checkpoint()}"
        raise ValueError(f"{text}; lower learning_rate, or give it more warmup_steps") from None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what was trained as safetensors, config, tokenizer and run record; no pickled training arguments.

        To be called on every rank. Raises ValueError where a weight is not finite.
        """
        folder = Path(output_dir or self.args.output_dir)
        self.unwritten = self.unwritten or folder.name
        if not all_finite(self.model.parameters()):
            self.stop("its weights are not finite", step=self.state.global_step)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state_dict = zero3_state_dict(model) if is_deepspeed_zero3_enabled() else None
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, PeftModel):
            save_adapter(model, folder, state_dict=state_dict)
        else:
            model.save_pretrained(folder, state_dict=state_dict)
            save_config(model.config, folder)
        save_tokenizer(self.processing_class, folder)
        write_json(folder / RECORD_NAME, self.run_record)

    def on_save(self, args, state, control, **kwargs) -> None:
        """Rename the checkpoint that every rank has finished, on rank 0; the others wait."""
        barrier()
        best, folder = state.best_global_step, self.folder
        path = folder.path / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        # transformers looks for the best in the staging folder; one of another folder stays where it is.
        if best == state.global_step or (path.is_dir() and path not in folder.earlier):
            state.best_model_checkpoint = str(path)
        if is_main_process():
            name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            state.save_to_json(str(folder.staging / name / TRAINER_STATE))
            folder.publish(name, limit=self.args.save_total_limit, best=state.best_model_checkpoint)
        barrier()
        folder.earlier, self.unwritten = [], None

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self.start_up_seconds is None:
            # Resumed with no step left to train: what the end of this epoch asks for was done before.
            control.should_evaluate = control.should_save = False

    def save_final(self) -> Path:
        """Write what was trained to output_dir/final. Raises ValueError where it has diverged."""
        target, self.unwritten = self.folder.path / FINAL, FINAL
        with self.failed_writes_explained():
            if is_main_process():
                with atomic_folder(target) as unfinished:
                    self.save_model(str(unfinished))
                    self.write_model_card(unfinished)
                    self.folder.set_earlier_aside()
                    # Those of an earlier run, which must not pass for those of this one after a kill.
                    remove(self.folder.path / RESULTS_NAME)
                self.folder.replace_earlier()
            else:
                self.save_model()
            barrier()
        return target

    def write_model_card(self, folder: Path) -> None:
        """README.md of `folder`, which holds what was trained."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        options = {"name": self.folder.path.resolve().name, "is_adapter": isinstance(model, PeftModel)}
        make_model_card(self.run_record, self.state.log_history, model.config, **options).save(folder / "README.md")

    @contextmanager
    def failed_writes_explained(self) -> Iterator[None]:
        """Leave nothing half-written; a failed write becomes an OSError that says what is still good."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if self.unwritten is None:
                raise
            remove(self.folder.staging)
            reason = one_line(error.__cause__ or error.__context__ or error)
            text = f"output_dir: could not write {self.unwritten} to {str(self.folder.path)!r} ({reason})"
            failure = OSError(f"{text}; {self.folder.last_checkpoint()}")
            failure.from_one_rank = True
            raise failure from error


class ProgressBar(ProgressCallback):
    """The bar alone: each loss is logged once."""

    def on_log(self, *args, **kwargs) -> None:
        pass


class DivergenceWatch:
    """Follows the loss of every micro-batch on its device; one synchronisation per optimizer step.

    A step that fp16 skips, since its loss scale was too high, is part of training. Skipping without end is not.
    """

    def __init__(self) -> None:
        self.loss: torch.Tensor | None = None
        self.num_skipped = 0

    def add(self, loss: torch.Tensor) -> torch.Tensor:
        """Add a micro-batch's loss, a scalar; returns it, or zero where it is not finite.

        One NaN of a step that fp16 skips would turn every later mean in the log into NaN.
        """
        self.loss = loss.detach().float() + (0 if self.loss is None else self.loss)
        return loss.nan_to_num(0.0, 0.0, 0.0)

    def end_step(self, grad_norm: torch.Tensor | float | None, *, is_fp16: bool) -> str | None:
        """What shows that training has diverged, the same on every rank; None while it goes well."""
        loss, self.loss = self.loss / world_size(), None
        if world_size() > 1:
            dist.all_reduce(loss)
        if torch.isfinite(loss if grad_norm is None else loss + grad_norm):
            self.num_skipped = 0
            return None
        norm = math.nan if grad_norm is None else float(grad_norm)
        if is_fp16 and not math.isfinite(norm):
            self.num_skipped += 1
            if self.num_skipped < MAX_SKIPPED_STEPS:
                return None
            return f"fp16 skipped {self.num_skipped} steps in a row"
        return f"loss {loss.item():.4g}, gradient norm {norm:.4g}"


def all_finite(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether every trained weight is finite, on all ranks."""
    # Under ZeRO-3 a rank holds its share of a weight as `ds_tensor`. A norm needs no memory of the weight's size.
    held = [getattr(weight, "ds_tensor", weight).detach() for weight in parameters if weight.requires_grad]
    norm = torch.nn.utils.get_total_norm([weight for weight in held if weight.numel()], math.inf)
    return all(gather_objects(bool(norm.isfinite())))


def zero3_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What was trained of a model under ZeRO-3, and its buffers, gathered on the CPU of rank 0."""
    import deepspeed

    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state_dict = {name: value for name, value in model.state_dict().items() if name not in names}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            with deepspeed.zero.GatheredParameters(weight, modifier_rank=0):
                if is_main_process():
                    state_dict[name] = weight.detach().cpu().clone()
    return state_dict
