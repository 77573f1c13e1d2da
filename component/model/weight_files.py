"""The weight files of a saved model: found, read, checked against config.json before anything is loaded, written.

Tensors of a file are mapped, not read, until they are used: memory does not grow with the model.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.modeling_utils import load_state_dict

from longqlora.distributed import is_main_process, print_notice
from longqlora.files import read_json, write_json
from longqlora.model.base import check_loaded, embedding_names, empty_model, model_source, text_names, without_reports
from longqlora.model.library_internals import names_in_files, saved_names

INDEX = "model.safetensors.index.json"
# In the order in which transformers looks for them.
WEIGHT_FILES = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_weights(file: Path, *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .bin file, mapped; with device "meta" their shapes and types alone."""
    try:
        weights = load_state_dict(file, map_location=device, weights_only=True)
    except Exception as error:
        # What torch adds from its second sentence on is advice to load the file without weights_only.
        cause = str(error).split(". ")[0] or "it is empty"
        raise ValueError(f"{str(file)!r} cannot be read as weights ({cause}); is the file complete?") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{str(file)!r} cannot be read as weights (it holds something else); give saved weights")
    return weights


class SavedWeights:
    """The weights in a model folder: one file or shards with an index, safetensors or .bin (read without pickle).

    file_of: name -> file, one file after another. headers: name -> tensor on the meta device. Of a model that wraps a
    text model, the text model's weights alone, under its own names.
    Raises ValueError for a folder without weights, and for files that are damaged or do not go with their index.
    """

    def __init__(self, folder: Path):
        self.file_of: dict[str, Path] = {}
        self.headers: dict[str, torch.Tensor] = {}
        self._names_in_files: dict[str, str] = {}
        self._open = lru_cache(maxsize=1)(read_weights)
        first = weight_file(folder)
        if first is None:
            looked_for = ", ".join(WEIGHT_FILES)
            raise ValueError(f"model_name_or_path: {str(folder)!r} has no weights (looked for {looked_for})")
        index = read_index(first) if first.suffix == ".json" else {}
        for file in [folder / shard for shard in sorted(set(index.values()))] or [first]:
            for name, tensor in sorted(read_weights(file, device="meta").items()):
                if name in self.headers:
                    raise ValueError(f"{str(file)!r} holds {name!r}, which is in {self.file_of[name].name} too")
                self.file_of[name], self.headers[name] = file, tensor
        for name, shard in index.items():
            if self.file_of.get(name) != folder / shard:
                raise ValueError(f"{str(folder / shard)!r} lacks {name!r}, which the index says is in it")
        if names := text_names(self.file_of):
            self._names_in_files = names
            self.file_of, self.headers = (
                {name: known[names[name]] for name in names} for known in (self.file_of, self.headers)
            )

    def read(self, name: str) -> torch.Tensor:
        return self._open(self.file_of[name])[self._names_in_files.get(name, name)]


def weight_file(folder: Path) -> Path | None:
    """The file that transformers would load from `folder`: all weights, or an index of shards; None without any."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index of shards, whose files lie in its folder."""
    index, flag = read_json(path, "model_name_or_path"), f"model_name_or_path: {str(path)!r}"
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{flag} lists no weights, or has no metadata; is it whole?")
    for file in files.values():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError(f"{flag} names {file!r}, which is no file of its folder; download the model again")
    return files


def save_in_shards(
    folder: Path, headers: dict[str, torch.Tensor], weight_of: Callable[[str], torch.Tensor], *, max_shard_size: int
) -> None:
    """Write weights as safetensors shards of at most `max_shard_size` bytes, with transformers' names and index.

    headers: name -> tensor on the meta device; weight_of: from name to the tensor, asked for shard by shard.
    """
    plan = split_torch_state_dict_into_shards(headers, max_shard_size=max_shard_size)
    with tqdm(desc="weights", total=len(headers), disable=not is_main_process(), unit="tensor") as bar:
        for file, names in plan.filename_to_tensors.items():
            save_file({name: weight_of(name).contiguous() for name in names}, folder / file, metadata={"format": "pt"})
            bar.update(len(names))
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def check_base(
    name_or_path: str, config: PretrainedConfig, *, trust_remote_code: bool = False, needs_weights: bool = True
) -> PreTrainedModel:
    """Check the weights in a model folder against `config`; returns the model without weights.

    Weights of a hub name may not be on this machine, and those of a base that is saved quantised have other names:
    neither is looked at. needs_weights: whether a folder without any is an error. Raises ValueError naming the first
    weight that is missing, damaged, of another shape or quantised.
    """
    model = empty_model(config, name=name_or_path, trust_remote_code=trust_remote_code)
    folder = Path(model_source(name_or_path))
    if folder.is_dir() and not getattr(config, "quantization_config", None) and (needs_weights or weight_file(folder)):
        check_weights(folder, model, config)
    if config.tie_word_embeddings != model.config.tie_word_embeddings:
        model = empty_model(config, name=name_or_path, trust_remote_code=trust_remote_code)
    return model


def check_weights(folder: Path, model: PreTrainedModel, config: PretrainedConfig) -> SavedWeights:
    """Check names, shapes and types of the weights in `folder` by loading them into `model` on the meta device, as
    transformers would; returns them. Where `config` ties embeddings that differ in the files, it is changed to say what
    transformers loads: both."""
    weights = SavedWeights(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"model_name_or_path: {str(folder)!r} is an adapter; give it as adapter_name_or_path")
    integers = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    of_integers = {*integers, *(saved_names(model, integers) if integers else ())}
    # Of 8 bits and fewer are quantised ones.
    usable = {
        name: header
        for name, header in weights.headers.items()
        if (header.is_floating_point() and header.element_size() > 1) or name in of_integers
    }
    is_quantised = any(name.endswith("weight") for name in weights.headers.keys() - usable.keys())
    hint = "; it is saved quantised (stored as integers): give the 16-bit model" if is_quantised else "; is it whole?"
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with without_reports():
            _, info = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=usable,
                dtype=model.dtype,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except RuntimeError as error:
        # Parts that transformers puts together (experts) do not fit: one is missing, or of another shape.
        lacking = [name for name in saved_names(model) if name not in usable]
        cause = f"lacks {lacking[0]!r}" if lacking else f"has weights that do not fit together ({error})"
        raise ValueError(f"model_name_or_path: {str(folder)!r} {cause}{hint}") from None
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()
    check_loaded(info, model, str(folder), hint=hint)
    embedding, head = embedding_names(model)
    if head is not None and config.tie_word_embeddings:
        renamed = names_in_files(model, set(weights.file_of))
        names = [renamed.get(name, name) for name in (embedding, head)]
        if weights.file_of.keys() >= set(names) and not torch.equal(*map(weights.read, names)):
            config.tie_word_embeddings = False
            print_notice(f"tie_word_embeddings in config.json has no effect: {names[1]!r} is saved apart, and differs")
    return weights
