"""Save an adapter folder, and read one strictly, to load or to merge it: every weight finds its place, or it fails.

Ours is a PEFT folder that holds everything trained (LoRA matrices and, as `modules_to_save`, the embedding and norm
weights) with the extended config.json and the tokenizer beside it. Folders of LongQLoRA and LongLoRA keep embedding
and norm weights in trainable_params.bin instead, under the base model's names with or without PEFT's prefix.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict
from transformers import PreTrainedModel

from longqlora.cli import require_folder
from longqlora.files import read_json
from longqlora.model.base import embedding_names
from longqlora.model.library_internals import lora_scale, lost_on_loading
from longqlora.model.saved_folder import save_config
from longqlora.model.weight_files import read_weights
from longqlora.reading import COUNT, COUNTS, NONE, NUMBER, NUMBERS, SWITCH, TEXT, TEXTS, check_kinds, reading
from longqlora.settings.config import MAX_RANK

UPSTREAM_EXTRA_WEIGHTS = "trainable_params.bin"
FLAG = "adapter_name_or_path"
PEFT_PREFIX = "base_model.model."
# A value other than the one here changes what the adapter computes in a way that merge.py does not reproduce.
PLAIN_LORA = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False,
    "use_qalora": False, "alora_invocation_tokens": None, "trainable_token_indices": None, "layer_replication": None,
    "target_parameters": None, "use_bdlora": None, "arrow_config": None, "kasa_config": None, "velora_config": None,
    "monteclora_config": None,
}  # fmt: skip
RANK = f"a whole number up to {MAX_RANK:,}", lambda value: type(value) is int and 0 < value <= MAX_RANK
RANKS = "a mapping to such ranks", lambda value: isinstance(value, dict) and all(map(RANK[1], value.values()))
# What we read of adapter_config.json, and what PEFT takes as it stands.
CONFIG_KINDS = {
    "base_model_name_or_path": (TEXT, NONE), "r": (RANK,), "lora_alpha": (NUMBER, NONE), "use_rslora": (SWITCH,),
    "alpha_pattern": (NUMBERS, NONE), "rank_pattern": (RANKS, NONE), "target_modules": (TEXTS, TEXT, NONE),
    "modules_to_save": (TEXTS, NONE), "ensure_weight_tying": (SWITCH,), "lora_dropout": (NUMBER, NONE),
    "alora_invocation_tokens": (COUNTS, NONE),
}  # fmt: skip
# Initialisations that also change the base weights, so that the adapter does not fit the base as it is stored.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# LongLoRA adds [PAD] and whichever of EOS, BOS and UNK a tokenizer lacks; its released checkpoints have 32001.
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
    values = read_json(path, FLAG)
    check_kinds(values, CONFIG_KINDS, f"{FLAG}: {str(path)!r}")
    return values


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
    LongLoRA grows them by tokens it adds. Raises ValueError where the adapter has fewer than the base, or many more."""
    own, path = model.config.vocab_size, Path(folder) / "config.json"
    weights = read_adapter_weights(folder, device="meta") | read_extra_weights(folder, device="meta")
    ends = [(base_weight_name(name), name) for name, weight in weights.items() if weight.ndim]
    # Moshi's input embedding has a row more than its vocabulary.
    names, whole = embedding_names(model), model.state_dict()
    rows = {name: own + len(weights[name]) - len(whole[base]) for base, name in ends if base in names}
    if path.is_file():
        values = read_json(path, FLAG)
        check_kinds(values, {"vocab_size": (COUNT,)}, f"{FLAG}: {str(path)!r}")
        rows["config.json"] = values.get("vocab_size", own)
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


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Put the adapter of `folder` on `model`, in the model's dtype. Raises ValueError naming the first weight that is
    missing from the folder or has no place in the model."""
    saved = read_adapter_weights(folder, device="meta").keys()
    own, extra = model.state_dict(), read_extra_weights(folder)
    for name, weight in extra.items():
        if name not in own or own[name].shape != weight.shape:
            raise ValueError(f"{UPSTREAM_EXTRA_WEIGHTS}: {name!r} has no place in the base model; wrong base model?")
    model.load_state_dict(extra, strict=False)
    read_adapter_config(folder)
    with reading(FLAG, folder, "give an adapter of this base model that is whole"):
        peft_model = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False).keys()
    # PEFT also writes the untrained embeddings of a model whose output layer has LoRA matrices.
    faults = [(name, "has no place in the base model") for name in saved - expected - peft_model.state_dict().keys()]
    faults = sorted(faults) or sorted((name, "is missing from it") for name in expected - saved)
    faults = faults or [(name, "is lost by PEFT on loading") for name in lost_on_loading(model, sorted(saved))]
    if faults:
        name, fault = faults[0]
        raise ValueError(f"{FLAG}: {name!r} in {str(folder)!r} {fault}; wrong base model or damaged adapter?")
    return peft_model


@dataclass
class LoraUpdate:
    """scale * B @ A, to be added to a weight [out, in]; a [r, in], b [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def shape(self) -> list[int]:
        """Of the weight that it fits; empty where the two matrices do not fit each other."""
        fits = self.a.ndim == self.b.ndim == 2 and self.a.shape[0] == self.b.shape[1]
        return [self.b.shape[0], self.a.shape[1]] if fits else []


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
        for name, update in sorted([*self.lora.items(), *self.replacements.items()], key=lambda item: item[0]):
            shape = list(base[name].shape) if name in base else None
            if list(update.shape) != shape:
                text = f"its weights for {name!r} do not fit the base model's ({shape or 'none of that name'})"
                raise ValueError(f"{FLAG}: {text}; give the base model of the adapter")


def read_updates(folder: str | Path, names: dict[str, str]) -> AdapterUpdates:
    """All that the adapter in `folder` changes, under the name that `names` maps a weight's to, or its own; ValueError
    for a kind of adapter that merge.py cannot merge."""
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
            with reading(FLAG, folder, "is it whole?"):
                scale = lora_scale(config, module, rank=len(a))
            lora[f"{module}.weight"] = LoraUpdate(a, b, scale)
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
    if config.get("lora_alpha") is None:
        raise ValueError(f"{FLAG}: adapter_config.json has no lora_alpha; is it a LoRA adapter?")
