"""Settings that contradict each other, the model or the machine: refused, mended or named as without effect."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from component.arguments import Settings
from component.cli import require_file
from component.distributed import is_main_process
from component.files import read_json
from component.jsonl import check_data_file

PLAIN_OPTIMIZER = "adamw_torch"


def check_settings(settings: Settings) -> list[str]:
    """Check and mend `settings` in place, before anything is loaded; returns the warnings to log."""
    return [
        *check_lengths(settings),
        *check_training_values(settings),
        *check_deepspeed(settings),
        *check_precision(settings),
        *check_optimizer(settings),
        *settings_without_effect(settings),
    ]


def check_lengths(settings: Settings) -> list[str]:
    data, context = settings.data, settings.context
    if data.max_seq_length < 2:
        raise ValueError(f"max_seq_length: must be at least 2, got {data.max_seq_length}")
    if context.model_max_length is not None and data.max_seq_length > context.model_max_length:
        raise ValueError(
            f"max_seq_length: {data.max_seq_length} is beyond model_max_length {context.model_max_length}; the model would "
            "be trained on positions that its RoPE does not cover; lower one or raise the other"
        )
    if settings.attention.attention == "s2":
        settings.attention.group_size(data.max_seq_length)
    return []


def check_training_values(settings: Settings) -> list[str]:
    training = settings.training
    least = {
        "learning_rate": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "warmup_steps": 0,
        "weight_decay": 0, "per_device_eval_batch_size": 1, "dataloader_num_workers": 0, "num_train_epochs": 0,
        "max_grad_norm": 0, "save_total_limit": 1, "logging_steps": 0, "save_steps": 0,
    }  # fmt: skip
    for key, low in least.items():
        if training.get(key) is not None and training[key] < low:
            raise ValueError(f"{key}: must be at least {low}, got {training[key]}")
    if training.get("max_steps", -1) == 0 or training.get("max_steps", -1) < -1:
        raise ValueError(f"max_steps: must be positive, or -1 for whole epochs, got {training['max_steps']}")
    if training.get("eval_strategy", "no") != "no" and not settings.data.eval_file:
        raise ValueError("eval_strategy: there is nothing to evaluate on; add eval_file, or set eval_strategy: 'no'")
    output_dir = Path(training["output_dir"])
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir: {str(output_dir)!r} is a file; give a folder")
    resume = training.get("resume_from_checkpoint")
    if isinstance(resume, str) and resume.lower() not in ("true", "false") and not Path(resume).is_dir():
        raise ValueError(f"resume_from_checkpoint: no folder at {resume!r}; give a checkpoint folder, or true for the last")
    return []


def check_deepspeed(settings: Settings) -> list[str]:
    """Read the DeepSpeed file and complete what upstream's leaves out."""
    value, notices = settings.training.get("deepspeed"), []
    if value is None:
        return []
    config: dict[str, Any] = copy.deepcopy(value) if isinstance(value, dict) else read_json(require_file(value, "deepspeed"), "deepspeed")
    if not isinstance(config, dict):
        raise ValueError(f"deepspeed: {value!r} must hold a JSON object")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and settings.adapter.finetuning_type == "qlora":
        raise ValueError(
            "deepspeed: ZeRO-3 cannot shard 4-bit weights (bitsandbytes issue 1249, peft issue 2016); use a ZeRO-2 file, "
            "or finetuning_type: lora"
        )
    if "gradient_clipping" not in config:
        config["gradient_clipping"] = "auto"
        notices.append("deepspeed: added gradient_clipping, without which max_grad_norm is ignored")
    if offloads_optimizer(config) and "optimizer" not in config:
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    settings.training["deepspeed"] = config
    return notices


def offloads_optimizer(deepspeed: dict | None) -> bool:
    offload = ((deepspeed or {}).get("zero_optimization") or {}).get("offload_optimizer") or {}
    return offload.get("device") not in (None, "none")


def check_precision(settings: Settings) -> list[str]:
    training = settings.training
    if training.get("fp16") and training.get("bf16"):
        raise ValueError("fp16 and bf16 are both true; keep one (fp16 on V100, bf16 on A100 or later)")
    if training.get("fp16") and not torch.cuda.is_available():
        training["fp16"] = False
        return ["fp16 needs a GPU; training in fp32 on this CPU"]
    if training.get("bf16") and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        raise ValueError("bf16: this GPU has no bf16 arithmetic; set fp16: true and bf16: false")
    return []


def check_optimizer(settings: Settings) -> list[str]:
    optimizer = settings.training.get("optim", "")
    is_bitsandbytes = "paged" in optimizer or "bit" in optimizer or "bnb" in optimizer
    if not is_bitsandbytes:
        return []
    if not torch.cuda.is_available():
        reason = "it pages GPU memory and there is no GPU"
    elif "paged" in optimizer and offloads_optimizer(settings.training.get("deepspeed")):
        reason = "DeepSpeed already keeps the optimizer on the CPU"
    else:
        return []
    settings.training["optim"] = PLAIN_OPTIMIZER
    return [f"optim: {optimizer} becomes {PLAIN_OPTIMIZER}, since {reason}"]


def settings_without_effect(settings: Settings) -> list[str]:
    """A warning for each setting that was given but that nothing will read."""
    groups = {
        "attention: full": (settings.attention.attention == "full", ["group_size_ratio"]),
        "finetuning_type: full": (
            settings.adapter.finetuning_type == "full",
            ["lora_rank", "lora_alpha", "lora_dropout", "target_modules", "train_embedding", "train_norm"],
        ),
        "sft: false": (not settings.data.sft, ["prompt_template"]),
        "no model_max_length": (settings.context.model_max_length is None, ["rope_type"]),
        "no evaluation (eval_strategy)": (settings.training.get("eval_strategy", "no") == "no", ["eval_file", "eval_steps"]),
    }
    return [
        f"{key} has no effect with {cause}"
        for cause, (holds, keys) in groups.items()
        for key in keys
        if holds and key in settings.given
    ]


def check_data(settings: Settings) -> None:
    """Check every row of the data files on the first process, before minutes go into loading a model."""
    if is_main_process():
        for key in ("train_file", "eval_file"):
            path = getattr(settings.data, key)
            if path:
                check_data_file(path, sft=settings.data.sft, flag=key)


def check_against_model(settings: Settings, config: PretrainedConfig) -> None:
    """Refuse rows longer than the extended context. `config` is the one RoPE was set in."""
    if settings.data.max_seq_length > config.max_position_embeddings:
        raise ValueError(
            f"max_seq_length: {settings.data.max_seq_length} is beyond the model's context of "
            f"{config.max_position_embeddings}; set model_max_length: {settings.data.max_seq_length}"
        )
