"""What a saved adapter does to the weights of its base model, weight by weight."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key

from longqlora.distributed import local_device
from longqlora.model.adapter_folder import (
    PEFT_PREFIX,
    base_weight_name,
    read_adapter_config,
    read_adapter_weights,
    read_extra_weights,
)

LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight")
# A value other than the one here changes what the adapter computes in a way that this merge does not reproduce.
PLAIN_LORA = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False,
    "use_qalora": False, "alora_invocation_tokens": None, "trainable_token_indices": None, "layer_replication": None,
    "target_parameters": None, "use_bdlora": None, "arrow_config": None, "kasa_config": None, "velora_config": None,
    "monteclora_config": None,
}  # fmt: skip
# Initialisations that also change the base weights, so that the adapter does not fit the base as it is stored.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class AdapterUpdates:
    """What an adapter does to the weights of its base model, by weight name.

    matrices: name -> {"A": [r, in], "B": [out, r]}. replacements: name -> the whole weight. keeps_tie: the
    input embedding was trained together with the output embedding tied to it. former_names: new name -> the
    model's, after `rename`.
    """

    lora_config: dict
    matrices: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    replacements: dict[str, torch.Tensor] = field(default_factory=dict)
    keeps_tie: bool = False
    former_names: dict[str, str] = field(default_factory=dict)

    def scale(self, name: str) -> float:
        """Factor of B @ A for the weight `name`."""
        module = self.former_names.get(name, name).removesuffix(".weight")
        patterns = self.lora_config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(patterns.keys(), module), self.lora_config["lora_alpha"])
        rank = self.matrices[name]["A"].shape[0]
        return alpha / (rank**0.5 if self.lora_config.get("use_rslora") else rank)

    def fits(self, name: str, shape: list[int]) -> bool:
        """Whether all that is held for the weight `name` has the `shape` [out, in] of the weight."""
        held = [weight.shape for weight in (self.replacements.get(name),) if weight is not None]
        if name in self.matrices:
            a, b = self.matrices[name]["A"], self.matrices[name]["B"]
            held.append((b.shape[0], a.shape[1]) if a.shape[0] == b.shape[1] else ())
        return all(list(found) == shape for found in held)

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Give every weight the name that `new_name` maps its name to."""
        self.former_names = {new_name(name): name for name in self.matrices}
        self.matrices = {new_name(name): pair for name, pair in self.matrices.items()}
        self.replacements = {new_name(name): weight for name, weight in self.replacements.items()}

    @property
    def names(self) -> set[str]:
        return self.matrices.keys() | self.replacements.keys()


def check_plain_lora(config: dict) -> None:
    """Raise ValueError, naming the setting, for an adapter that is more than LoRA matrices and whole weights."""
    for name, plain in PLAIN_LORA.items():
        value = config.get(name, plain)
        if value != plain and value not in (None, False, [], {}):
            raise ValueError(f"adapter_name_or_path: cannot merge an adapter with {name} = {value!r}, only {plain!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise ValueError(
            f"adapter_name_or_path: cannot merge an adapter with init_lora_weights = {init!r}, which changes the base "
            "weights; convert it to plain LoRA first"
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError("adapter_name_or_path: adapter_config.json has no lora_alpha; is it a LoRA adapter?")


def read_updates(folder: str | Path) -> AdapterUpdates:
    """All that the adapter in `folder` changes. Raises ValueError for a kind of adapter this cannot merge."""
    config = read_adapter_config(folder)
    check_plain_lora(config)
    extra = read_extra_weights(folder)
    keeps_tie = bool(extra) or bool(config.get("ensure_weight_tying"))
    updates = AdapterUpdates(config, replacements=extra, keeps_tie=keeps_tie)
    for key, tensor in read_adapter_weights(folder).items():
        name = key.removeprefix(PEFT_PREFIX)
        lora = LORA_KEY.fullmatch(name)
        if lora:
            pair = updates.matrices.setdefault(f"{lora['module']}.weight", {})
            if lora["matrix"] in pair:
                raise ValueError(f"adapter_name_or_path: {key!r} is there twice; give a folder with one adapter")
            pair[lora["matrix"]] = tensor
        elif "lora_" in name:
            raise ValueError(f"adapter_name_or_path: cannot merge {key!r}; only LoRA on linear layers is supported")
        else:
            updates.replacements[base_weight_name(key)] = tensor
    for name, pair in updates.matrices.items():
        if len(pair) != 2:
            lacking = "B" if "A" in pair else "A"
            raise ValueError(f"adapter_name_or_path: no lora_{lacking} for {name!r}; is the adapter complete?")
    return updates


def updated(
    name: str, weight: torch.Tensor, updates: AdapterUpdates, *, dtype: torch.dtype, in_nf4: bool
) -> torch.Tensor:
    """The weight `name` after the merge, in `dtype`; `weight` [out, in] is the base's."""
    replacement = updates.replacements.get(name)
    if replacement is not None:
        weight = replacement
    if not weight.is_floating_point():
        return weight
    weight = through_nf4(weight.to(dtype)) if in_nf4 and replacement is None else weight
    if name in updates.matrices:
        lora_a, lora_b = updates.matrices[name]["A"], updates.matrices[name]["B"]
        weight = weight.float() + updates.scale(name) * (lora_b.float() @ lora_a.float())
    result = weight.to(dtype)
    if not result.isfinite().all():
        kind = "overflows" if weight.isfinite().all() else "holds values that are not finite"
        raise ValueError(f"{name!r} {kind} in {str(dtype).removeprefix('torch.')}; try --dtype bf16 or fp32")
    return result


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """`weight` quantised as a 4-bit base is when loaded, and dequantised to its dtype.

    bitsandbytes quantises the weight in the dtype the model is loaded in, blocks of 64, with double quantisation.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    data, state = quantize_4bit(
        weight.contiguous().to(local_device()),
        blocksize=64,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=torch.uint8,
    )
    return dequantize_4bit(data, state).cpu()
