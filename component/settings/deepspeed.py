"""The DeepSpeed file of a run: read, completed, and held against the settings before anything is loaded."""

import copy
import importlib.util
import math
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from longqlora.cli import require_file
from longqlora.device import GIB
from longqlora.files import read_json
from longqlora.settings.reader import Settings

LARGE_BUFFERS = 0.5 * GIB
OBJECTS_OF_DEEPSPEED = ("zero_optimization", "fp16", "bf16", "optimizer", "scheduler")


def complete_deepspeed(settings: Settings) -> list[str]:
    """Put the DeepSpeed file into the settings, completed by what upstream's leaves out."""
    value, notices = settings.training.get("deepspeed"), []
    if value is None:
        return []
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("deepspeed: the package is not installed; pip install deepspeed, or leave the key out")
    if isinstance(value, dict):
        config: Any = copy.deepcopy(value)
    else:
        config = read_json(require_file(value, "deepspeed"), "deepspeed")
    if not isinstance(config, dict):
        raise ValueError(f"deepspeed: {value!r} must hold a JSON object")
    for key in OBJECTS_OF_DEEPSPEED:
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"deepspeed: {key} is {config[key]!r} in {value!r}; give a JSON object")
    offload = zero_section(config).get("offload_optimizer") or {}
    if not isinstance(offload, dict):
        raise ValueError(f'deepspeed: offload_optimizer is {offload!r}; give an object as {{"device": "cpu"}}')
    stage = zero_stage(config)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"deepspeed: zero_optimization.stage is {stage!r}; give 0, 1, 2 or 3")
    if stage == 3 and settings.adapter.finetuning_type == "qlora":
        raise ValueError(
            "deepspeed: ZeRO-3 cannot shard 4-bit weights (bitsandbytes issue 1249, peft issue 2016); use ZeRO-2, as "
            "train_args/deepspeed/zero2_offload.json, or finetuning_type: lora"
        )
    if "gradient_clipping" not in config:
        config["gradient_clipping"] = "auto"
        notices.append("deepspeed: added gradient_clipping, without which max_grad_norm is ignored")
    held = gradient_buffers(config, element_bytes=2)
    if held > LARGE_BUFFERS:
        notices.append(
            f"deepspeed: reduce_bucket_size holds {held / GIB:.1f} GiB of buffers in 16 bit; 2e7 is enough for adapters"
        )
    if offloads_optimizer(config) and "optimizer" not in config:
        # Its own CPU optimizer is compiled at the first start and takes the place of the one in the settings.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    settings.training["deepspeed"] = config
    return notices


def gradient_buffers(deepspeed: dict | None, *, element_bytes: int) -> float:
    """Bytes that ZeRO-1 and 2 allocate to collect gradients in (stage_1_and_2.py, setup_buckets)."""
    zero = zero_section(deepspeed)
    size = zero.get("reduce_bucket_size", 5e8)
    if zero.get("stage") not in (1, 2) or not zero.get("contiguous_gradients", True) or not is_number(size):
        return 0
    return size * element_bytes * (2 if zero.get("overlap_comm") else 1)


def shards(deepspeed: dict | None, num_processes: int) -> tuple[float, float]:
    """Processes among which ZeRO splits the weights, and gradients and optimizer state; infinite: in host memory."""
    stage = zero_stage(deepspeed)
    weight_shards = math.inf if is_offloaded(deepspeed, "offload_param") else num_processes
    return weight_shards if stage == 3 else 1, num_processes if stage else 1


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def offloads_optimizer(deepspeed: dict | None) -> bool:
    return is_offloaded(deepspeed, "offload_optimizer")


def is_offloaded(deepspeed: dict | None, name: str) -> bool:
    """Whether the part that `offload_optimizer` or `offload_param` names is kept in host memory."""
    return (zero_section(deepspeed).get(name) or {}).get("device") not in (None, "none")


def zero_stage(deepspeed: dict | None) -> int:
    return zero_section(deepspeed).get("stage", 0)


def zero_section(deepspeed: dict | None) -> dict:
    return (deepspeed or {}).get("zero_optimization") or {}


def check_deepspeed_agrees(settings: Settings, arguments: TrainingArguments) -> None:
    """Refuse values of the DeepSpeed file that differ from the settings; transformers does so after loading."""
    config = settings.training.get("deepspeed")
    if config is None:
        return
    matched = HfTrainerDeepSpeedConfig(copy.deepcopy(config))
    matched.trainer_config_process(arguments)
    if matched.mismatches:
        pairs = "; ".join(text.removeprefix("- ds ").replace(" vs hf ", " but ") for text in matched.mismatches)
        raise ValueError(f'deepspeed: the file disagrees with the settings: {pairs}; write "auto" in the file')
