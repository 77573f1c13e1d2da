"""Read and write the weights of a saved model tensor by tensor, so that memory does not grow with the model."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from component.files import read_json, write_json

# In the order in which transformers looks for them: (index of the shards, single file).
WEIGHT_LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


class SavedWeights:
    """The weights in a model folder: one file or shards with an index, safetensors or .bin (read without pickle)."""

    def __init__(self, folder: Path):
        self.file_of = find_weight_files(Path(folder))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every weight, one file after another."""
        for file in sorted(set(self.file_of.values())):
            with open_weights(file) as (names, get):
                for name in sorted(names):
                    if self.file_of.get(name) == file:
                        yield name, get(name)

    def read(self, name: str) -> torch.Tensor:
        with open_weights(self.file_of[name]) as (_, get):
            return get(name)


def find_weight_files(folder: Path) -> dict[str, Path]:
    """File of each weight. Raises ValueError for a folder without weights or with a shard missing."""
    for index_name, single_name in WEIGHT_LAYOUTS:
        if (folder / single_name).is_file():
            with open_weights(folder / single_name) as (names, _):
                return dict.fromkeys(names, folder / single_name)
        if (folder / index_name).is_file():
            index = read_json(folder / index_name, "model_name_or_path")
            weight_map = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"model_name_or_path: {str(folder / index_name)!r} lists no weights; is it whole?")
            missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
            if missing:
                raise ValueError(f"model_name_or_path: {str(folder)!r} lacks {missing[0]}; download the model again")
            return {name: folder / file for name, file in weight_map.items()}
    names = ", ".join(name for layout in WEIGHT_LAYOUTS for name in layout)
    raise ValueError(f"model_name_or_path: {str(folder)!r} has no weights (looked for {names})")


@contextmanager
def open_weights(file: Path):
    """Yield (names, function from name to tensor) of one weight file; tensors are read when asked for."""
    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
        else:
            opened = nullcontext(torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file)))
    except (SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as weights ({error}); is the file complete?") from None
    with opened as weights:
        yield list(weights.keys()), weights.__getitem__ if isinstance(weights, dict) else weights.get_tensor


class CheckpointNames:
    """What a saved checkpoint calls the weights of a model, where transformers renames them on loading.

    model: the model without weights; saved: the names in the checkpoint.
    """

    def __init__(self, model: PreTrainedModel, saved: set[str]):
        self.model, self.saved, self.weights = model, saved, model.state_dict()

    def of(self, name: str) -> str:
        """The checkpoint's name of the weight `name`; `name` itself where it has none of its own."""
        if name in self.saved:
            return name
        if name not in self.weights:
            return name
        renamed = revert_weight_conversion(self.model, {name: self.weights[name]})
        others = [other for other in renamed if other in self.saved]
        return others[0] if len(others) == 1 else name


class ShardWriter:
    """Write tensors as safetensors shards of at most `max_shard_size` bytes, with transformers' names and index."""

    def __init__(self, folder: Path, max_shard_size: int):
        self.folder, self.max_shard_size = folder, max_shard_size
        self.pending: dict[str, torch.Tensor] = {}
        self.shards: list[list[str]] = []
        self.num_pending_bytes = self.num_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.num_pending_bytes + size > self.max_shard_size:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.num_pending_bytes += size
        self.num_bytes += size

    def finish(self) -> None:
        """Write what is pending, give the shards their final names and, for more than one, write the index."""
        self._flush()
        count = len(self.shards)
        weight_map = {}
        for number, names in enumerate(self.shards, start=1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._shard_path(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            write_json(self.folder / WEIGHT_LAYOUTS[0][0], index)

    def _flush(self) -> None:
        self.shards.append(list(self.pending))
        save_file(self.pending, self._shard_path(len(self.shards)), metadata={"format": "pt"})
        self.pending, self.num_pending_bytes = {}, 0

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"
