"""The DeepSpeed file of a run: read, checked, completed, and asked what it decides.

`config` is its content, or None without DeepSpeed.
"""

import copy
import importlib.util
import math

from longqlora.cli import require_file
from longqlora.device import GIB
from longqlora.files import read_json
from longqlora.settings.config import Notice, Settings


def complete_deepspeed(settings: Settings) -> tuple[Settings, list[Notice]]:
    """Settings with the content of the DeepSpeed file, completed by what upstream's leaves out.

    Raises ValueError for what DeepSpeed would refuse after the model is loaded.
    """
    value = settings.training.get("deepspeed")
    if value is None:
        return settings, []
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("deepspeed: the package is not installed; pip install deepspeed, or leave the key out")
    config = value if isinstance(value, dict) else read_json(require_file(value, "deepspeed"), "deepspeed")
    for key in ("zero_optimization", "fp16", "bf16", "optimizer", "scheduler"):
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"deepspeed: {key} is {config[key]!r} in {value!r}; give a JSON object")
    offload, stage = zero_section(config).get("offload_optimizer") or {}, zero_stage(config)
    if not isinstance(offload, dict):
        raise ValueError(f'deepspeed: offload_optimizer is {offload!r}; give an object as {{"device": "cpu"}}')
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"deepspeed: zero_optimization.stage is {stage!r}; give 0, 1, 2 or 3")
    if stage == 3 and settings.adapter.finetuning_type == "qlora":
        raise ValueError(
            "deepspeed: ZeRO-3 cannot shard 4-bit weights (bitsandbytes issue 1249, peft issue 2016); use ZeRO-2, as "
            "train_args/deepspeed/zero2_offload.json, or finetuning_type: lora"
        )
    config, notices = copy.deepcopy(config), []
    if "gradient_clipping" not in config:
        config["gradient_clipping"] = "auto"
        notices.append(Notice("deepspeed: added gradient_clipping, without which max_grad_norm is ignored"))
    held = gradient_buffers(config, element_bytes=2)
    if held > 0.5 * GIB:
        text = f"reduce_bucket_size holds {held / GIB:.1f} GiB of buffers in 16 bit; 2e7 is enough for adapters"
        notices.append(Notice(f"deepspeed: {text}"))
    if offloads(config, "optimizer") and "optimizer" not in config:
        # Its own CPU optimizer is compiled at the first start and takes the place of the one in the settings.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return settings.with_training(deepspeed=config), notices


def gradient_buffers(config: dict | None, *, element_bytes: int) -> float:
    """Bytes that ZeRO-1 and 2 allocate to collect gradients in (stage_1_and_2.py, setup_buckets)."""
    zero = zero_section(config)
    size = zero.get("reduce_bucket_size", 5e8)
    is_number = isinstance(size, (int, float)) and not isinstance(size, bool)
    if zero.get("stage") not in (1, 2) or not zero.get("contiguous_gradients", True) or not is_number:
        return 0
    return size * element_bytes * (2 if zero.get("overlap_comm") else 1)


def shards(config: dict | None, num_processes: int) -> tuple[float, float]:
    """Processes among which ZeRO splits the weights, and gradients and optimizer state; infinite: in host memory."""
    stage = zero_stage(config)
    weight_shards = math.inf if offloads(config, "param") else num_processes
    return weight_shards if stage == 3 else 1, num_processes if stage else 1


def offloads(config: dict | None, part: str) -> bool:
    """Whether DeepSpeed keeps the "optimizer" state, or each "param", in host memory."""
    return (zero_section(config).get(f"offload_{part}") or {}).get("device") not in (None, "none")


def zero_stage(config: dict | None) -> int:
    return zero_section(config).get("stage", 0)


def zero_section(config: dict | None) -> dict:
    return (config or {}).get("zero_optimization") or {}
