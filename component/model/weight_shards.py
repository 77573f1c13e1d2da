"""Read and write the weights of a saved model tensor by tensor, so that memory does not grow with the model."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from longqlora.files import read_json, write_json

# In the order in which transformers looks for them: (index of the shards, single file).
WEIGHT_LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
# What safetensors calls the types that weights are computed with; all others are integers or of 8 bits and fewer.
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SavedWeights:
    """The weights in a model folder: one file or shards with an index, safetensors or .bin (read without pickle).

    file_of: name -> file. headers: name -> tensor on the meta device, int8 for what is stored in fewer than 16 bits.
    Raises ValueError for a folder without weights, and for files that are damaged or do not go with their index.
    """

    def __init__(self, folder: Path):
        self.file_of: dict[str, Path] = {}
        self.headers: dict[str, torch.Tensor] = {}
        files, index = find_weight_files(Path(folder))
        for file in files:
            for name, tensor in read_headers(file).items():
                if name in self.headers:
                    raise ValueError(f"{str(file)!r} holds {name!r}, which is in {self.file_of[name].name} too")
                self.file_of[name], self.headers[name] = file, tensor
        for name, file in index.items():
            if self.file_of.get(name) != Path(folder) / file:
                raise ValueError(f"{str(Path(folder) / file)!r} lacks {name!r}, which the index says is in it")

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


def find_weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of `folder`, and for shards the index: name of the weight -> name of the file."""
    for index_name, single_name in WEIGHT_LAYOUTS:
        if (folder / single_name).is_file():
            return [folder / single_name], {}
        if (folder / index_name).is_file():
            index = read_json(folder / index_name, "model_name_or_path")
            weight_map = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"model_name_or_path: {str(folder / index_name)!r} lists no weights; is it whole?")
            if not isinstance(index.get("metadata"), dict):
                raise ValueError(f"model_name_or_path: {str(folder / index_name)!r} has no metadata; is it whole?")
            for file in weight_map.values():
                if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
                    raise ValueError(
                        f"model_name_or_path: {str(folder / index_name)!r} names {file!r}, which is no file of its "
                        "folder; download the model again"
                    )
            files = sorted(set(weight_map.values()))
            missing = [file for file in files if not (folder / file).is_file()]
            if missing:
                raise ValueError(f"model_name_or_path: {str(folder)!r} lacks {missing[0]}; download the model again")
            return [folder / file for file in files], weight_map
    names = ", ".join(name for layout in WEIGHT_LAYOUTS for name in layout)
    raise ValueError(f"model_name_or_path: {str(folder)!r} has no weights (looked for {names})")


@contextmanager
def open_weights(file: Path, *, headers_only: bool = False):
    """Yield (names, function from name to tensor) of one weight file; tensors are read when asked for.

    headers_only: from name to safetensors' slice instead, which knows shape and type without reading.
    """
    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
        else:
            opened = nullcontext(torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file)))
    except Exception as error:
        # What torch adds from its second sentence on is advice to load the file without weights_only.
        cause = str(error).split(". ")[0] or "it is empty"
        raise ValueError(f"{str(file)!r} cannot be read as weights ({cause}); is the file complete?") from None
    with opened as weights:
        if isinstance(weights, dict) and all(isinstance(value, torch.Tensor) for value in weights.values()):
            yield list(weights), weights.__getitem__
        elif file.suffix == ".safetensors":
            yield list(weights.keys()), weights.get_slice if headers_only else weights.get_tensor
        else:
            raise ValueError(f"{str(file)!r} cannot be read as weights (it holds something else); give saved weights")


def read_headers(file: Path) -> dict[str, torch.Tensor]:
    """Shapes and types of the tensors in one weight file, as tensors on the meta device (see SavedWeights)."""
    headers = {}
    with open_weights(file, headers_only=True) as (names, get):
        for name in names:
            header = get(name)
            if isinstance(header, torch.Tensor):
                shape, dtype = header.shape, header.dtype
            else:
                shape, dtype = header.get_shape(), FLOAT_TYPES.get(header.get_dtype())
            dtype = dtype if dtype in FLOAT_TYPES.values() else torch.int8
            headers[name] = torch.empty(tuple(shape), dtype=dtype, device="meta")
    return headers


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of one weight file."""
    with open_weights(file) as (names, get):
        return {name: get(name) for name in names}


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
        # Saved from the decoder alone, which transformers loads too.
        bare = name.removeprefix(f"{self.model.base_model_prefix}.")
        if bare in self.saved:
            return bare
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
