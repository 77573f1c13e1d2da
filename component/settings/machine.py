"""What this machine changes in the settings: a precision or an optimizer that it cannot run is refused or replaced."""

import torch

from longqlora.device import cpu_has_bf16
from longqlora.settings.config import Notice, Settings, warning
from longqlora.settings.deepspeed import offloads_optimizer


def fit_precision(settings: Settings) -> tuple[Settings, list[Notice]]:
    """Settings in a precision that this GPU, or this CPU, computes in."""
    training = settings.training
    if training.get("fp16") and training.get("bf16"):
        raise ValueError("fp16 and bf16 are both true; keep one (fp16 on V100, bf16 on A100 or later)")
    if settings.uses_gpu:
        if training.get("bf16") and torch.cuda.get_device_capability() < (8, 0):
            raise ValueError("bf16: True, but this GPU has no bf16 arithmetic; set fp16: true and bf16: false")
        return settings, []
    reasons = {"fp16": "it needs a GPU"} | ({} if cpu_has_bf16() else {"bf16": "this CPU has no bf16 instructions"})
    keys = {key: reason for name, reason in reasons.items() for key in (name, f"{name}_full_eval")}
    lost = {key: reason for key, reason in keys.items() if training.get(key)}
    # There is no device memory to copy into from pinned pages. Without use_cpu accelerate takes each of several CPU
    # processes for a world of one.
    forced = {"dataloader_pin_memory": training.get("dataloader_pin_memory", False), "use_cpu": True}
    notices = [warning(f"{key} becomes false: {reason}; the run computes in fp32") for key, reason in lost.items()]
    return settings.with_training(**forced, **dict.fromkeys(lost, False)), notices


def fit_optimizer(settings: Settings) -> tuple[Settings, list[Notice]]:
    """Settings without a bitsandbytes optimizer where its state cannot live on a GPU."""
    name, deepspeed = settings.training.get("optim", ""), settings.training.get("deepspeed")
    is_bitsandbytes = name.endswith("bit") and not name.startswith("adamw_torch") or "bnb" in name
    is_offloaded = offloads_optimizer(deepspeed)
    if not is_bitsandbytes or "optimizer" in (deepspeed or {}) or (settings.uses_gpu and not is_offloaded):
        return settings, []
    where = "DeepSpeed keeps the optimizer on the CPU" if is_offloaded else "there is no GPU for its state"
    plain = "adamw_torch" if "adamw" in name else "rmsprop" if "rmsprop" in name else None
    if plain is None:
        raise ValueError(f"optim: {name!r} cannot be used, since {where}; use adamw_torch")
    return settings.with_training(optim=plain), [warning(f"optim: {name} becomes {plain}, since {where}")]
