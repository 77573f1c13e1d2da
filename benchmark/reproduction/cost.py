"""What a training costs: the FLOPs of its steps, as the memory plan counts them, and the parameters that it trains."""

import math
from functools import cache
from pathlib import Path

from safetensors import safe_open

from longqlora.memory.estimate import step_work
from longqlora.memory.plan import plan_memory
from longqlora.model.base import load_config
from longqlora.settings.reader import resolve_settings


def training_flops(train_args_file: Path, words: list[str]) -> float:
    """FLOPs of the run that `train.py --train_args_file F WORDS` is; a dense finish in proportion to its steps."""
    return _training_flops(train_args_file, tuple(words))


@cache
def _training_flops(train_args_file: Path, words: tuple[str, ...]) -> float:
    settings, _ = resolve_settings(train_args_file, list(words))
    config = load_config(settings.model.model_name_or_path, trust_remote_code=settings.model.trust_remote_code)
    plan, settings, _ = plan_memory(settings, config)
    num_tokens = plan.run.num_tokens * plan.run.num_rows * settings.training.get("gradient_accumulation_steps", 1)
    return step_work(plan.model, plan.run, plan.policy) * num_tokens * settings.training["max_steps"]


def num_saved_parameters(folder: Path) -> int:
    """Numbers in the safetensors files of a folder: of an adapter, those that were trained."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total
