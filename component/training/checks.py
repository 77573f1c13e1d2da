"""Settings that contradict each other, the model or the machine: refused, mended or named as without effect.

Everything here runs before weights are loaded and before anything is written.
"""

import copy
import os
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_available_reporting_integrations

from longqlora.attention.binding import check_model_supports, check_model_supports_shift_short, flash_kernel
from longqlora.data.jsonl import check_data_file
from longqlora.data.prompt import eos_id, prompt_template_for
from longqlora.distributed import is_main_process, world_size
from longqlora.memory.shapes import ModelShape
from longqlora.model.adapter import frozen_experts_notice, target_module_names
from longqlora.model.base import check_vocabulary, empty_model, routers
from longqlora.model.context import context_length
from longqlora.model.weight_files import check_base, has_weights
from longqlora.settings.deepspeed import check_deepspeed_agrees, complete_deepspeed
from longqlora.settings.machine import check_optimizer, check_precision
from longqlora.settings.reader import Settings
from longqlora.training.checkpoint import FINAL, list_checkpoints

LEAST = {
    "learning_rate": 0, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1, "warmup_steps": 0, "weight_decay": 0, "dataloader_num_workers": 0,
    "max_grad_norm": 0, "save_total_limit": 1, "logging_steps": 0, "save_steps": 0, "eval_steps": 0,
    "adam_beta1": 0, "adam_beta2": 0, "adam_epsilon": 0, "seed": 0, "data_seed": 0,
}  # fmt: skip
UNSUPPORTED = {
    "fsdp": "use deepspeed to shard",
    "fsdp_config": "use deepspeed to shard",
    "parallelism_config": "set sequence_parallel_size",
    "use_liger_kernel": "the loss is computed in chunks without it",
}


class DetachedArguments(TrainingArguments):
    """TrainingArguments that apply their own checks without joining a process group."""

    device = torch.device("cpu")

    @property
    def world_size(self) -> int:
        return world_size()


def check_settings(settings: Settings) -> list[str]:
    """Check and mend `settings` in place; returns the notices to log."""
    check_lengths(settings)
    check_values(settings)
    check_paths(settings)
    notices = [*check_precision(settings), *complete_deepspeed(settings), *check_optimizer(settings)]
    arguments = detached_arguments(settings)
    check_buildable(arguments)
    check_deepspeed_agrees(settings, arguments)
    return [*notices, *settings_without_effect(settings)]


def check_lengths(settings: Settings) -> None:
    data, context = settings.data, settings.context
    if context.model_max_length is not None and data.max_seq_length > context.model_max_length:
        raise ValueError(
            f"max_seq_length: {data.max_seq_length} is beyond model_max_length {context.model_max_length}; the model "
            "would be trained on positions that its RoPE does not cover; lower one or raise the other"
        )
    if settings.attention.attention == "s2":
        settings.attention.group_size(data.max_seq_length)


def check_values(settings: Settings) -> None:
    training = settings.training
    for key, fix in UNSUPPORTED.items():
        if training.get(key):
            raise ValueError(f"{key}: {training[key]!r} is not supported by this trainer; leave it out ({fix})")
    for key, low in LEAST.items():
        if training.get(key) is not None and training[key] < low:
            raise ValueError(f"{key}: must be at least {low}, got {training[key]}")
    for key in ("adam_beta1", "adam_beta2"):
        if training.get(key, 0) >= 1:
            raise ValueError(f"{key}: must lie in [0, 1), got {training[key]}")
    for key in ("seed", "data_seed"):
        if (training.get(key) or 0) >= 2**32:
            raise ValueError(f"{key}: must be below 2**32, got {training[key]}")
    for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs"):
        if isinstance(training.get(key), str):
            raise ValueError(f"{key}: {training[key]!r} is not a mapping")
    if training.get("max_steps", -1) == 0 or training.get("max_steps", -1) < -1:
        raise ValueError(f"max_steps: must be positive, or -1 for whole epochs, got {training['max_steps']}")
    if training.get("max_steps", -1) == -1 and training.get("num_train_epochs", 1) <= 0:
        raise ValueError(f"num_train_epochs: must be positive, got {training['num_train_epochs']}; or set max_steps")
    if evaluates(settings) and not settings.data.eval_file:
        raise ValueError(
            f"eval_strategy: {training.get('eval_strategy', 'no')!r} has nothing to evaluate on; add eval_file, or "
            "leave it out"
        )
    if training.get("metric_for_best_model") not in (None, "loss", "eval_loss"):
        raise ValueError(f"metric_for_best_model: {training['metric_for_best_model']!r} is not measured; use eval_loss")
    if training.get("save_strategy") == "best" and not evaluates(settings):
        raise ValueError("save_strategy: 'best' needs an evaluation; set eval_strategy and eval_file")
    reporters = training.get("report_to") or []
    for name in [reporters] if isinstance(reporters, str) else reporters:
        available = [*get_available_reporting_integrations(), "all", "none"]
        if name not in available:
            raise ValueError(f"report_to: {name!r} is unknown or not installed; choose from {', '.join(available)}")
    if settings.attention.use_flash_attn:
        flash_kernel()


def evaluates(settings: Settings) -> bool:
    training = settings.training
    return training.get("eval_strategy", "no") != "no" or bool(training.get("eval_on_start"))


def check_paths(settings: Settings) -> None:
    training = settings.training
    folders = {
        "output_dir": training["output_dir"],
        "logging_dir": settings.log.logging_dir,
        "data_cache_dir": settings.data.data_cache_dir,
    }
    for key, value in folders.items():
        path = Path(os.path.expanduser(value or "."))
        file = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
        if file:
            raise ValueError(f"{key}: {value!r} cannot be a folder, since {str(file)!r} is a file; give another")
    replaced = [Path(training["output_dir"], FINAL), *list_checkpoints(training["output_dir"])]
    read = {"model_name_or_path": settings.model.model_name_or_path, "train_file": settings.data.train_file,
            "eval_file": settings.data.eval_file}  # fmt: skip
    for key, value in read.items():
        for place in replaced:
            if value and Path(os.path.realpath(value)).is_relative_to(os.path.realpath(place)):
                raise ValueError(
                    f"{key}: {value!r} lies in {str(place)!r}, which this run replaces; choose another output_dir"
                )
    resume = training.get("resume_from_checkpoint")
    if resume and resume.lower() not in ("true", "false") and not Path(resume).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: no folder at {resume!r}; give a checkpoint folder, or true for the last"
        )


def detached_arguments(settings: Settings) -> DetachedArguments:
    """The settings as TrainingArguments; what they object to becomes a ValueError."""
    detached = copy.copy(settings)
    detached.training = {**settings.training, "deepspeed": None}
    detached.log = type(settings.log)()
    try:
        return detached.training_arguments(DetachedArguments)
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError, OSError) as error:
        raise ValueError(f"training settings: {error}") from None


def check_buildable(arguments: TrainingArguments) -> None:
    """Refuse optimizers and schedules that transformers would fail to build after the model is loaded."""
    needs_model = arguments.optim.split("_")[0] in ("galore", "apollo", "lomo", "adalomo")
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, RuntimeError, ImportError) as error:
        if isinstance(error, ImportError) or not needs_model:
            extra = f" with optim_args {arguments.optim_args!r}" if arguments.optim_args else ""
            name = f"{arguments.optim.value!r}{extra}"
            raise ValueError(f"optim: {name} cannot be used ({error}); use adamw_torch") from None
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, extra = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    try:
        get_scheduler(schedule, optimizer, 1, 10, scheduler_specific_kwargs=extra)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"lr_scheduler_type: {schedule.value!r} does not go with lr_scheduler_kwargs {extra!r} ({error})"
        ) from None


def settings_without_effect(settings: Settings) -> list[str]:
    """A notice for each setting that was given but that nothing will read."""
    training, adapter = settings.training, settings.adapter
    schedule = training.get("lr_scheduler_type", "linear")
    own_optimizer = (training.get("deepspeed") or {}).get("optimizer")
    lora = ["lora_rank", "lora_alpha", "lora_dropout", "target_modules", "train_embedding", "train_norm"]
    groups = {
        f"attention: {settings.attention.attention}": (settings.attention.attention != "s2", ["group_size_ratio"]),
        "attention: dca": (settings.attention.attention == "dca", ["use_flash_attn"]),
        "finetuning_type: full": (adapter.finetuning_type == "full", lora),
        "sft: false": (not settings.data.sft, ["prompt_template"]),
        "no model_max_length": (settings.context.model_max_length is None, ["rope_type", "rope_theta"]),
        "no evaluation (eval_strategy)": (not evaluates(settings), ["eval_file", "eval_steps"]),
        f"lr_scheduler_type: {schedule}": (schedule == "constant", ["warmup_steps"]),
        "max_steps": (training.get("max_steps", -1) > 0, ["num_train_epochs"]),
        "save_strategy: no": (training.get("save_strategy") == "no", ["save_steps", "save_total_limit"]),
        "an optimizer in the DeepSpeed file": (bool(own_optimizer), ["optim"]),
        "training that stops at the first loss that is not finite": (True, ["logging_nan_inf_filter"]),
    }
    return [
        f"{key} has no effect with {cause}"
        for cause, (holds, keys) in groups.items()
        for key in keys
        if holds and settings.given.get(key) not in (None, False)
    ]


def check_data(settings: Settings) -> None:
    """Check every row of the data files, on the first process."""
    if is_main_process():
        for key in ("train_file", "eval_file"):
            path = getattr(settings.data, key)
            if path:
                check_data_file(path, sft=settings.data.sft, flag=key)


def check_num_rows(
    arguments: TrainingArguments, num_rows: int, num_eval_rows: int | None, *, processes_per_row: int
) -> None:
    """Refuse rows that do not make one batch of all processes, where dataloader_drop_last leaves out a part of one."""
    num_together = arguments.train_batch_size * arguments.world_size // processes_per_row
    if not arguments.dataloader_drop_last:
        return
    if num_rows < num_together:
        raise ValueError(
            f"dataloader_drop_last: train_file makes {num_rows} rows, a batch of all processes takes {num_together}, "
            "so not one step would be trained; leave it out, or lower per_device_train_batch_size"
        )
    num_together = arguments.eval_batch_size * arguments.world_size
    if num_eval_rows is not None and num_eval_rows < num_together:
        raise ValueError(
            f"dataloader_drop_last: eval_file makes {num_eval_rows} rows, a batch of all processes takes "
            f"{num_together}, so nothing would be evaluated; leave it out, or lower per_device_eval_batch_size"
        )


def check_against_model(settings: Settings, config: PretrainedConfig) -> list[str]:
    """Refuse what does not go with the model's shape; returns notices. `config` is the one RoPE was set in."""
    name, context = settings.model.model_name_or_path, context_length(config)
    if settings.data.max_seq_length > context:
        raise ValueError(
            f"max_seq_length: {settings.data.max_seq_length} is beyond the model's context of {context}; "
            f"set model_max_length: {settings.data.max_seq_length}"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise ValueError(f"model_name_or_path: {name!r} is a {config.model_type}, no causal language model")
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        raise ValueError(f"model_name_or_path: {name!r} is already quantised; give the model it was made from")
    model = empty_model(config, name=name, trust_remote_code=settings.model.trust_remote_code)
    if not model._supports_sdpa:
        raise ValueError(
            f"model_name_or_path: {name!r} is a {config.model_type}, whose attention torch's SDPA cannot compute; "
            "give a model of another type"
        )
    size, attention = settings.parallel.sequence_parallel_size, settings.attention.attention
    check_sequence_parallel(size, config, attention=attention, num_processes=world_size())
    if attention == "dca":
        check_model_supports(model, "dual chunk attention")
    if attention == "full" and size > 1:
        check_model_supports(model, "sequence parallelism", fix="leave out sequence_parallel_size")
    if attention == "s2":
        check_model_supports_shift_short(model, settings.attention.group_size(settings.data.max_seq_length))
    if settings.adapter.finetuning_type == "full":
        return []
    if settings.adapter.finetuning_type == "qlora" and routers(model):
        kind = type(next(iter(routers(model).values()))).__name__
        raise ValueError(
            f"finetuning_type: {config.model_type} has linear layers with more to them ({kind}), which a 4-bit base "
            "would replace; use lora"
        )
    if not target_module_names(model, settings.adapter.target_modules):
        raise ValueError(f"target_modules: {settings.adapter.target_modules!r} names no layer; leave it out for all")
    return frozen_experts_notice(model)


def check_tokenizer(settings: Settings, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without EOS, without the chat template asked for, or made for another model."""
    eos_id(tokenizer)
    if settings.data.sft:
        prompt_template_for(tokenizer, settings.data.prompt_template)
    check_vocabulary(tokenizer, config.vocab_size, settings.model.model_name_or_path)


def check_weights_at_hand(settings: Settings, config: PretrainedConfig, *, is_dry_run: bool) -> list[str]:
    """Check the base weights by the headers of their files; a dry run without any gives a notice."""
    name = settings.model.model_name_or_path
    trust = settings.model.trust_remote_code
    check_base(name, config, trust_remote_code=trust, needs_weights=not is_dry_run)
    lacks_weights = Path(name).is_dir() and not has_weights(Path(name))
    return [f"model_name_or_path: {name!r} has no weights: a run would end here"] if lacks_weights else []


def check_sequence_parallel(size: int, config: PretrainedConfig, *, attention: str, num_processes: int) -> None:
    """Raise ValueError where `size` processes cannot share the rows of a model of `config`."""
    if size == 1:
        return
    if attention == "dca":
        raise ValueError("sequence_parallel_size: dual chunk attention needs whole rows; use attention: s2 or full")
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic":
        raise ValueError(
            "sequence_parallel_size: dynamic RoPE follows the length of whole rows, which no process sees; use another "
            "rope_type"
        )
    if num_processes % size:
        raise ValueError(
            f"sequence_parallel_size: {size} does not divide the {num_processes} process(es) of this run; start it "
            f"with deepspeed --num_gpus {size} or torchrun --nproc_per_node {size}"
        )
    shape = ModelShape.of(config)
    num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError(
            f"sequence_parallel_size: {size} does not divide the model's {num_heads} heads "
            f"({num_kv_heads} key/value heads); choose a divisor of both"
        )
