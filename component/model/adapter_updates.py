"""What a saved adapter does to the weights of its base model, weight by weight."""

from dataclasses import dataclass
from pathlib import Path

import torch

from longqlora.distributed import local_device
from longqlora.model.adapter_folder import (
    FLAG,
    PEFT_PREFIX,
    base_weight_name,
    read_adapter_config,
    read_adapter_weights,
    read_extra_weights,
)
from longqlora.model.library_internals import lora_scale

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
class LoraUpdate:
    """scale * B @ A, to be added to a weight [out, in]; a [r, in], b [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def shape(self) -> list[int]:
        """Of the weight that it fits; empty where the two matrices do not fit each other."""
        return [self.b.shape[0], self.a.shape[1]] if self.a.shape[0] == self.b.shape[1] else []


@dataclass
class AdapterUpdates:
    """What an adapter does to the weights of its base model: LoRA and whole weights, by weight name.

    keeps_tie: the input embedding was trained together with the output embedding tied to it.
    """

    lora: dict[str, LoraUpdate]
    replacements: dict[str, torch.Tensor]
    keeps_tie: bool

    def check(self, base: dict[str, torch.Tensor]) -> None:
        """Raise ValueError for an update of a weight that is not in `base`, by name, or has another shape there."""
        faults = []
        for name, update in sorted([*self.lora.items(), *self.replacements.items()], key=lambda item: item[0]):
            if name not in base:
                faults.append(f"changes {name!r}, which the base model does not have")
            elif list(update.shape) != list(base[name].shape):
                faults.append(f"has weights for {name!r} that do not fit the base model's {list(base[name].shape)}")
        if faults:
            raise ValueError(
                f"{FLAG}: the adapter {faults[0]} ({len(faults)} such weights); give the base model of the adapter"
            )


def read_updates(folder: str | Path, names: dict[str, str]) -> AdapterUpdates:
    """All that the adapter in `folder` changes, under the name that `names` maps a weight's to, or its own.

    Raises ValueError for a kind of adapter this cannot merge.
    """
    config = read_adapter_config(folder)
    check_plain_lora(config)
    extra = read_extra_weights(folder)
    lora, whole = {}, dict(extra)
    # PEFT's files do not name the adapter; a state dict that was saved as it is calls it "default".
    saved = read_adapter_weights(folder).items()
    weights = {key.removeprefix(PEFT_PREFIX).replace(".default.", "."): tensor for key, tensor in saved}
    for key, tensor in weights.items():
        module, _, matrix = key.rpartition(".lora_")
        if matrix in ("A.weight", "B.weight"):
            a, b = (weights.get(f"{module}.lora_{letter}.weight") for letter in "AB")
            if a is None or b is None:
                lacking = "A" if a is None else "B"
                raise ValueError(f"{FLAG}: no lora_{lacking} for '{module}.weight'; is the adapter complete?")
            lora[f"{module}.weight"] = LoraUpdate(a, b, lora_scale(config, module, rank=a.shape[0]))
        elif "lora_" in key:
            raise ValueError(f"{FLAG}: cannot merge {key!r}; only LoRA on linear layers is supported")
        else:
            whole[base_weight_name(key)] = tensor
    lora, whole = ({names.get(name, name): found[name] for name in found} for found in (lora, whole))
    return AdapterUpdates(lora, whole, keeps_tie=bool(extra) or bool(config.get("ensure_weight_tying")))


def check_plain_lora(config: dict) -> None:
    """Raise ValueError, naming the setting, for an adapter that is more than LoRA matrices and whole weights."""
    more = [name for name, plain in PLAIN_LORA.items() if config.get(name) not in (plain, None, False, [], {})]
    if str(config.get("init_lora_weights")).lower().startswith(BASE_CHANGING_INITS):
        more.append("init_lora_weights")
    if more:
        value = config[more[0]]
        raise ValueError(f"{FLAG}: cannot merge an adapter with {more[0]} = {value!r}; convert it to plain LoRA first")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError(f"{FLAG}: adapter_config.json has no lora_alpha; is it a LoRA adapter?")


def merged_weight(
    name: str, weight: torch.Tensor, updates: AdapterUpdates, *, dtype: torch.dtype, in_nf4: bool = False
) -> torch.Tensor:
    """The weight `name` after the merge, in `dtype`; `weight` [out, in] is the base's."""
    lora, is_replaced = updates.lora.get(name), name in updates.replacements
    if is_replaced:
        weight = updates.replacements[name]
    if not weight.is_floating_point():
        return weight
    if in_nf4 and not is_replaced:
        weight = through_nf4(weight.to(dtype))
    if lora is not None:
        weight = weight.float() + lora.scale * (lora.b.float() @ lora.a.float())
    result = weight.to(dtype)
    if not result.isfinite().all():
        kind = "overflows" if weight.isfinite().all() else "holds values that are not finite"
        raise ValueError(f"{name!r} {kind} in {str(dtype).removeprefix('torch.')}; try --dtype bf16 or fp32")
    return result


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """`weight` quantised as a 4-bit base is when loaded (blocks of 64, double quantisation), and dequantised to its
    dtype, which is the one that the model is loaded in."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    data, state = quantize_4bit(
        weight.contiguous().to(local_device()),
        blocksize=64,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=torch.uint8,
    )
    return dequantize_4bit(data, state).cpu()
