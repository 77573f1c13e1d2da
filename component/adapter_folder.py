"""Save an adapter folder, and read one strictly: every weight in it finds its place, or the load fails.

Ours is a PEFT folder that holds everything trained (LoRA matrices and, as `modules_to_save`, the
embedding and norm weights) with the extended config.json and the tokenizer beside it. Folders of
LongQLoRA and LongLoRA keep the embedding and norm weights in trainable_params.bin instead, under
the base model's names with or without PEFT's prefix.
"""

import copy
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from component.cli import require_folder
from component.files import read_json
from component.saved_folder import save_config

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
UPSTREAM_EXTRA_WEIGHTS = "trainable_params.bin"
FLAG = "adapter_name_or_path"


def save_adapter(model: PeftModel, folder: str | Path, *, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write everything trained and the extended config.json; `state_dict` as DeepSpeed gathers it.

    The config describes the base model in 16 bit: a quantization_config in it would make transformers
    take the base checkpoint for one that is stored in 4 bit.
    """
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    (Path(folder) / "README.md").unlink(missing_ok=True)
    config = copy.deepcopy(model.get_base_model().config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    save_config(config, folder)


def read_adapter_config(folder: str | Path) -> dict:
    """adapter_config.json of an adapter folder."""
    path = require_folder(folder, FLAG) / ADAPTER_CONFIG
    if not path.is_file():
        raise ValueError(f"{FLAG}: {str(folder)!r} has no {ADAPTER_CONFIG}; give the folder of a saved adapter")
    config = read_json(path, FLAG)
    if not isinstance(config, dict):
        raise ValueError(f"{FLAG}: {str(path)!r} holds no JSON object; give the folder of a saved adapter")
    return config


def base_model_of(folder: str | Path) -> str:
    """Base model that an adapter folder names; empty where it names none."""
    return read_adapter_config(folder).get("base_model_name_or_path") or ""


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file, or of a .bin file without running any code in it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{str(path)!r} cannot be read as weights ({error}); is the file complete?") from None


def read_adapter_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The PEFT weights of an adapter folder, under the names they have in the file."""
    for name in ADAPTER_WEIGHTS:
        if (Path(folder) / name).is_file():
            return read_weights(Path(folder) / name)
    raise ValueError(f"{FLAG}: {str(folder)!r} has none of {', '.join(ADAPTER_WEIGHTS)}")


def read_extra_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Weights of trainable_params.bin under the base model's names; empty where there is no such file."""
    path = Path(folder) / UPSTREAM_EXTRA_WEIGHTS
    if not path.is_file():
        return {}
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in read_weights(path).items()}
    # LongLoRA's extraction keeps the LoRA matrices too; they are the adapter's, not the base model's.
    return {name: tensor for name, tensor in weights.items() if "lora_" not in name}


def load_extra_weights(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Copy `weights` over the base model's parameters of the same names and shapes; others are an error."""
    parameters = dict(model.named_parameters())
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name, tensor in weights.items():
        if name not in parameters:
            if name in tied:
                continue
            raise ValueError(
                f"{UPSTREAM_EXTRA_WEIGHTS}: {name!r} is no weight of {model.config.model_type}; wrong base model?"
            )
        if parameters[name].shape != tensor.shape:
            shapes = f"{list(tensor.shape)}, the base model's is {list(parameters[name].shape)}"
            raise ValueError(f"{UPSTREAM_EXTRA_WEIGHTS}: {name!r} has shape {shapes}; wrong base model?")
        parameters[name].data.copy_(tensor)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Put the adapter of `folder` on `model`, in the model's dtype.

    Raises ValueError naming the first weight that is missing from the folder or has no place in the model.
    """
    read_adapter_config(folder)
    saved = read_adapter_weights(folder)
    load_extra_weights(model, read_extra_weights(folder))
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{FLAG}: the adapter does not fit the base model ({error})") from None
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    # PEFT also writes the untrained embeddings of a model whose output layer has LoRA matrices.
    unplaced = sorted(saved.keys() - expected.keys() - peft_model.state_dict().keys())
    missing = sorted(expected.keys() - saved.keys())
    if unplaced or missing:
        name, fault = (
            (unplaced[0], "has no place in the base model") if unplaced else (missing[0], "is missing from it")
        )
        raise ValueError(f"{FLAG}: {name!r} in {str(folder)!r} {fault}; wrong base model or damaged adapter?")
    return peft_model
