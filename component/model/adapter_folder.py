"""Save an adapter folder, and read one strictly: every weight in it finds its place, or the load fails.

Ours is a PEFT folder that holds everything trained (LoRA matrices and, as `modules_to_save`, the
embedding and norm weights) with the extended config.json and the tokenizer beside it. Folders of
LongQLoRA and LongLoRA keep the embedding and norm weights in trainable_params.bin instead, under
the base model's names with or without PEFT's prefix.
"""

import re
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict
from transformers import PreTrainedModel

from longqlora.cli import require_folder
from longqlora.files import read_json
from longqlora.model.base import embedding_names
from longqlora.model.saved_folder import save_config
from longqlora.model.weight_files import read_weights

UPSTREAM_EXTRA_WEIGHTS = "trainable_params.bin"
FLAG = "adapter_name_or_path"
PEFT_PREFIX = "base_model.model."
# LongLoRA adds [PAD] and whichever of EOS, BOS and UNK a tokenizer lacks.
MOST_ADDED_TOKENS = 4


def save_adapter(model: PeftModel, folder: str | Path, *, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write everything trained and the extended config.json; `state_dict` as DeepSpeed gathers it."""
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    (Path(folder) / "README.md").unlink(missing_ok=True)
    save_config(model.get_base_model().config, folder)


def read_adapter_config(folder: str | Path) -> dict:
    """adapter_config.json of an adapter folder."""
    path = require_folder(folder, FLAG) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{FLAG}: {str(folder)!r} has no {CONFIG_NAME}; give the folder of a saved adapter")
    config = read_json(path, FLAG)
    if not isinstance(config, dict):
        raise ValueError(f"{FLAG}: {str(path)!r} holds no JSON object; give the folder of a saved adapter")
    return config


def base_model_of(folder: str | Path) -> str:
    """Base model that an adapter folder names; empty where it names none."""
    return read_adapter_config(folder).get("base_model_name_or_path") or ""


def read_adapter_weights(folder: str | Path, *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The PEFT weights of an adapter folder, by their names in the file; device "meta" spares the values."""
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    file = next((Path(folder) / name for name in names if (Path(folder) / name).is_file()), None)
    weights = read_weights(file, device=device) if file else {}
    if not weights:
        raise ValueError(f"{FLAG}: {str(folder)!r} holds no weights in {' or '.join(names)}; give a trained adapter")
    return weights


def read_extra_weights(folder: str | Path, *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Weights of trainable_params.bin under the base model's names; empty where there is no such file."""
    path = Path(folder) / UPSTREAM_EXTRA_WEIGHTS
    weights = read_weights(path, device=device) if path.is_file() else {}
    # LongLoRA's extraction keeps the LoRA matrices too; they are the adapter's, not the base model's.
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in weights.items() if "lora_" not in name}


def base_weight_name(key: str) -> str:
    """Name in the base model of the weight that an adapter holds whole as `key`."""
    return re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", key.removeprefix(PEFT_PREFIX))


def adapter_vocabulary(folder: str | Path, model: PreTrainedModel) -> int:
    """Embeddings that the adapter in `folder` was trained with, on a base like `model`, which needs no weights.

    LongLoRA adds [PAD], and whichever special tokens a tokenizer lacks, and grows the embeddings by them: the
    checkpoints it released have 32001. Raises ValueError where the adapter has fewer than the base, or many more.
    """
    own, path = model.config.vocab_size, Path(folder) / "config.json"
    weights = read_adapter_weights(folder, device="meta") | read_extra_weights(folder, device="meta")
    rows = {n: weight.shape[0] for n, weight in weights.items() if base_weight_name(n) in embedding_names(model)}
    if path.is_file():
        rows["config.json"] = read_json(path, FLAG).get("vocab_size", own)
    for name, num_rows in rows.items():
        if not own <= num_rows <= own + MOST_ADDED_TOKENS:
            raise ValueError(
                f"{FLAG}: {name!r} in {str(folder)!r} is for a vocabulary of {num_rows}, the base model's vocab_size "
                f"is {own}; give the base model of the adapter"
            )
    return max([own, *rows.values()])


def grown(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The embedding `weight` [V, H] with rows up to `num_rows` that are the mean of the others, as LongLoRA adds them
    (dvlab-research/LongLoRA, fine-tune.py, smart_tokenizer_and_embedding_resize)."""
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(num_rows - len(weight), -1)])


def add_embeddings(model: PreTrainedModel, num_embeddings: int) -> None:
    """Give `model` rows for `num_embeddings` tokens in its input and output embeddings, as `grown` makes them."""
    num_own = model.config.vocab_size
    if num_embeddings == num_own:
        return
    model.resize_token_embeddings(num_embeddings, mean_resizing=False)
    for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        module.weight.data.copy_(grown(module.weight.data[:num_own], num_embeddings))


def load_extra_weights(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Copy `weights` over the base model's of the same names and shapes; others are an error."""
    try:
        strange = model.load_state_dict(weights, strict=False).unexpected_keys
        fault = f"{strange[0]!r} is no weight of {model.config.model_type}" if strange else None
    except RuntimeError as error:
        fault = str(error)
    if fault:
        raise ValueError(f"{UPSTREAM_EXTRA_WEIGHTS}: {fault}; wrong base model?")


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Put the adapter of `folder` on `model`, in the model's dtype.

    Raises ValueError naming the first weight that is missing from the folder or has no place in the model.
    """
    saved = read_adapter_weights(folder, device="meta").keys()
    load_extra_weights(model, read_extra_weights(folder))
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{FLAG}: the adapter does not fit the base model ({error})") from None
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False).keys()
    # PEFT also writes the untrained embeddings of a model whose output layer has LoRA matrices.
    faults = [(name, "has no place in the base model") for name in saved - expected - peft_model.state_dict().keys()]
    faults = sorted(faults) or sorted((name, "is missing from it") for name in expected - saved)
    if faults:
        name, fault = faults[0]
        raise ValueError(f"{FLAG}: {name!r} in {str(folder)!r} {fault}; wrong base model or damaged adapter?")
    return peft_model
