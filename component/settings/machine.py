"""Precision and optimizer: what the machine at hand cannot run is refused or replaced."""

import torch

from longqlora.device import cpu_has_bf16
from longqlora.settings.deepspeed import offloads_optimizer
from longqlora.settings.reader import Settings


def has_gpu(settings: Settings) -> bool:
    return torch.cuda.is_available() and not settings.training.get("use_cpu")


def check_precision(settings: Settings) -> list[str]:
    training = settings.training
    if training.get("fp16") and training.get("bf16"):
        raise ValueError("fp16 and bf16 are both true; keep one (fp16 on V100, bf16 on A100 or later)")
    if has_gpu(settings):
        if training.get("bf16") and torch.cuda.get_device_capability() < (8, 0):
            raise ValueError("bf16: True, but this GPU has no bf16 arithmetic; set fp16: true and bf16: false")
        return []
    # There is no device memory to copy into from pinned pages.
    training.setdefault("dataloader_pin_memory", False)
    # Without it accelerate takes each of several CPU processes for a world of one.
    training["use_cpu"] = True
    reasons = {"fp16": "it needs a GPU"}
    if not cpu_has_bf16():
        reasons["bf16"] = "this CPU has no bf16 instructions"
    notices = []
    for precision, reason in reasons.items():
        for key in (precision, f"{precision}_full_eval"):
            if training.get(key):
                training[key] = False
                notices.append(f"{key} becomes false: {reason}; the run computes in fp32")
    return notices


def check_optimizer(settings: Settings) -> list[str]:
    """Replace a bitsandbytes optimizer where its state cannot live on a GPU."""
    name, deepspeed = settings.training.get("optim", ""), settings.training.get("deepspeed")
    is_bitsandbytes = name.endswith("bit") and not name.startswith("adamw_torch") or "bnb" in name
    if not is_bitsandbytes or "optimizer" in (deepspeed or {}):
        return []
    if offloads_optimizer(deepspeed):
        reason = "DeepSpeed keeps the optimizer on the CPU"
    elif not has_gpu(settings):
        reason = "its state lives on a GPU and there is none"
    else:
        return []
    plain = "adamw_torch" if "adamw" in name else "rmsprop" if "rmsprop" in name else None
    if plain is None:
        raise ValueError(f"optim: {name!r} cannot be used, since {reason}; use adamw_torch")
    settings.training["optim"] = plain
    return [f"optim: {name} becomes {plain}, since {reason}"]
