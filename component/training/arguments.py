"""transformers' TrainingArguments of a run: built once, checked at once, and joined to the other processes later."""

import os
import reprlib
import warnings

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from longqlora.distributed import world_size
from longqlora.reading import cause_of
from longqlora.settings.config import Settings


class RunArguments(TrainingArguments):
    """TrainingArguments that join the process group at `join`, not when they are built.

    Until then the device is the CPU, and transformers knows of no ZeRO-3, under which no model can be built on meta.
    """

    has_joined = False

    def __post_init__(self) -> None:
        super().__post_init__()
        unset_hf_deepspeed_config()

    @property
    def device(self) -> torch.device:
        return super().device if self.has_joined else torch.device("cpu")

    @property
    def world_size(self) -> int:
        return world_size()

    def join(self) -> None:
        """Join the processes that the launcher started."""
        self.has_joined = True
        if self.deepspeed:
            set_hf_deepspeed_config(self.hf_deepspeed_config)
        _ = self.device


def build_arguments(settings: Settings) -> RunArguments:
    """The arguments of a run; what transformers objects to, now or when it has loaded the model, is a ValueError."""
    if settings.output.logging_dir:
        os.environ["TENSORBOARD_LOGGING_DIR"] = settings.output.logging_dir
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # What is pushed, and when, is hub.py's.
            arguments = RunArguments(**{**settings.training, "push_to_hub": False})
    except Exception as error:
        raise ValueError(f"training settings: {cause_of(error)}") from error
    check_buildable(arguments)
    if arguments.deepspeed and (mismatches := arguments.hf_deepspeed_config.mismatches):
        pairs = "; ".join(text.removeprefix("- ds ").replace(" vs hf ", " but ") for text in mismatches)
        raise ValueError(f'deepspeed: the file disagrees with the settings: {pairs}; write "auto" in the file')
    return arguments


def check_buildable(arguments: TrainingArguments) -> None:
    """Refuse an optimizer or a schedule that transformers would fail to build after the model is loaded."""
    needs_model = arguments.optim.split("_")[0] in ("galore", "apollo", "lomo", "adalomo")
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except Exception as error:
        if isinstance(error, ImportError) or not needs_model:
            extra = f" with optim_args {arguments.optim_args!r}" if arguments.optim_args else ""
            name = f"{arguments.optim.value!r}{extra}"
            raise ValueError(f"optim: {name} cannot be used ({cause_of(error)}); use adamw_torch") from error
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, extra = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    try:
        get_scheduler(schedule, optimizer, 1, 10, scheduler_specific_kwargs=extra)
    except Exception as error:
        name = f"{schedule.value!r} with lr_scheduler_kwargs {reprlib.repr(extra)}"
        raise ValueError(f"lr_scheduler_type: {name}: {cause_of(error)}") from error
