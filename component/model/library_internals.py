"""What this room takes from transformers, PEFT and bitsandbytes that they do not document, in one place.

Seen to work with transformers 5.20.2 and 5.23.0, PEFT 0.21.2, bitsandbytes 0.50.2; tests/model/test_library_internals
names what another version changed. loss_binding.py holds the one method of transformers that is replaced.

- `_attn_implementation`, `_experts_implementation` of a config: from_pretrained(attn_implementation=...) sets them, but
  nothing public reads them, or drops them from a config that a file filled in.
- `_weight_conversions` of a model: what from_pretrained renamed, which save_pretrained names back.
- `revert_weight_conversion`: transformers renames and fuses weights when it loads them, and offers the way back in
  save_pretrained only, which needs the weights.
"""

from collections import Counter

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def drop_kernels(config: PretrainedConfig) -> list[str]:
    """Let `config` name no implementation of attention and experts; returns the hub kernels that it named."""
    parts = [config, *(getattr(config, key, None) for key in config.sub_configs)]
    named = sorted({str(getattr(part, "_attn_implementation", None)) for part in parts})
    config._attn_implementation = config._experts_implementation = None
    return [name for name in named if "/" in name]


def saved_names(model: PreTrainedModel, weights: dict[str, torch.Tensor] | None = None) -> list[str]:
    """The names under which transformers saves `weights` of `model`, by default all; they may be on the meta device."""
    return sorted(revert_weight_conversion(model, model.state_dict() if weights is None else weights))


def save_under_own_names(model: PreTrainedModel, key_mapping: dict[str, str]) -> None:
    """Let save_pretrained not undo the `key_mapping` that `model` was loaded with."""
    conversions = model._weight_conversions
    model._weight_conversions = [x for x in conversions if not {*x.source_patterns} & {*key_mapping}]


def names_in_files(model: PreTrainedModel, saved: set[str]) -> dict[str, str]:
    """The weight names of `model` that differ in its files, which hold the names `saved`: name -> name in the files;
    without those that are fused there."""
    names = {}
    for name, weight in model.state_dict().items():
        # Saved from the decoder alone, which transformers loads too.
        bare = name.removeprefix(f"{model.base_model_prefix}.")
        if name not in saved and bare in saved:
            names[name] = bare
        elif name not in saved:
            others = [other for other in revert_weight_conversion(model, {name: weight}) if other in saved]
            names |= {name: others[0]} if len(others) == 1 else {}
    num_in = Counter(names.values())
    return {name: other for name, other in names.items() if num_in[other] == 1}


def fused_expert_names(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Those of `names` that PEFT takes for the experts' fused weights of this model type, as transformers 4 named them,
    or would not load again: linear layers beside the experts (shared experts, dense layers) may have the same names."""
    layers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in names]
    lost = lost_on_loading(model, [f"base_model.model.{layer}.lora_A.weight" for layer in layers])
    fused = {key.split(".")[-3] for key in lost}
    for name in names:
        lora = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(lora, model, None)
        except ValueError:
            # One of two that are fused together.
            lora.target_modules = []
        if name not in lora.target_modules:
            fused.add(name)
    return [name for name in names if name in fused]


def lost_on_loading(model: PreTrainedModel, keys: list[str]) -> list[str]:
    """Those of an adapter's weights `keys` that PEFT loads under other names, as transformers renames checkpoints of
    this type, and so does not load: a pattern may fit the model's own names too (Laguna's shared experts)."""
    tensors = {key: torch.empty(1, 1, device="meta") for key in keys}
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), tensors)
    return [key for key in keys if key not in loaded]


def lora_scale(config: dict, module: str, rank: int) -> float:
    """Factor of B @ A for the layer `module` of a base model, from the values of adapter_config.json."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def keep_4bit_weights_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes repacking 4-bit weights in place on CPUs with avx512_bf16, as it does at the first evaluation
    without gradient: gradients through repacked weights are silently lost (nn/modules.py, Linear4bit.forward)."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
