"""Load a base or merged model, with or without an adapter, for generation, evaluation and merging."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from longqlora.attention.binding import bind_inference_attention
from longqlora.distributed import local_device, print_notice, world_size
from longqlora.inference.source import ModelSource, read_source
from longqlora.model.adapter_folder import adapter_vocabulary, add_embeddings, load_adapter
from longqlora.model.base import check_vocabulary, default_dtype, is_slow_on_cpu, load_model
from longqlora.model.context import context_length, copy_context, resolve_config, tokenizer_source
from longqlora.model.context_request import ContextRequest
from longqlora.model.weight_files import check_base
from longqlora.reading import COUNT, COUNTS, NONE, check_kinds
from longqlora.run_record import software_versions

FILES_THAT_DECIDE = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
PACKAGES_THAT_DECIDE = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(kw_only=True)
class LoadedModel(ModelSource):
    """A model ready for inference. attention: description of the attention that is bound."""

    model: PreTrainedModel | PeftModel
    attention: str
    dtype: torch.dtype
    load_in_4bit: bool


def load_for_inference(
    model_name_or_path: str | None, *, load_in_4bit: bool = False, dtype: torch.dtype | None = None, **source: object
) -> LoadedModel:
    """`load_weights` of what `read_source` reads, whose other arguments are `source`."""
    return load_weights(read_source(model_name_or_path, **source), load_in_4bit=load_in_4bit, dtype=dtype)


def load_weights(
    source: ModelSource,
    *,
    load_in_4bit: bool = False,
    dtype: torch.dtype | None = None,
    device_map: Literal["auto"] | None = None,
) -> LoadedModel:
    """The model of `source`, in the dtype that suits the device where none is given; device_map: auto spreads it over
    all GPUs of this machine, layer by layer."""
    if device_map and world_size() > 1:
        raise ValueError("--device_map auto: spreads one model over all GPUs; start one process, without a launcher")
    base, adapter, config = source.base_model_name_or_path, source.adapter_name_or_path, source.config
    trust = {"trust_remote_code": source.trust_remote_code}
    empty = check_base(base, config, **trust)
    num_embeddings = adapter_vocabulary(adapter, empty) if adapter else config.vocab_size
    check_vocabulary(source.tokenizer, num_embeddings, tokenizer_source(base, adapter))
    source.tokenizer.model_max_length = source.context_size
    dtype, device = dtype or default_dtype(), local_device()
    if device.type == "cpu" and is_slow_on_cpu(dtype):
        print_notice(f"this CPU has no {str(dtype).removeprefix('torch.')} arithmetic; fp32 is many times faster")
    model = load_model(base, config, dtype=dtype, load_in_4bit=load_in_4bit, device=device_map or device, **trust)
    # Flags and options say how to generate; of the model's own settings only the ids that end an answer count.
    ends = {"eos_token_id": model.generation_config.eos_token_id}
    place = f"model_name_or_path: generation_config.json of {base!r}"
    check_kinds(ends, {"eos_token_id": (COUNT, COUNTS, NONE)}, place)
    model.generation_config = GenerationConfig(**ends)
    attention = bind_inference_attention(model)
    if adapter:
        config.vocab_size = num_embeddings
        add_embeddings(model, num_embeddings)
        model = load_adapter(model, adapter)
    return LoadedModel(**vars(source), model=model.eval(), attention=attention, dtype=dtype, load_in_4bit=load_in_4bit)


def set_context(loaded: LoadedModel, context: ContextRequest, *, is_chunked: bool = False) -> None:
    """Give a loaded model another context, RoPE or attention, as if it had been loaded with `context`; is_chunked: as
    for `bind_inference_attention`."""
    model = loaded.model
    names = loaded.base_model_name_or_path, loaded.adapter_name_or_path
    _, config = resolve_config(*names, context, trust_remote_code=loaded.trust_remote_code)
    for live in (model.config, loaded.config):
        copy_context(config, live)
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config).to(model.device)
    loaded.attention = bind_inference_attention(model, is_chunked=is_chunked)
    loaded.context_size = loaded.tokenizer.model_max_length = context_length(model.config)


def model_facts(loaded: LoadedModel) -> dict:
    """What a result file says about the model behind its numbers; ready for JSON."""
    attention = loaded.attention
    if getattr(loaded.config, "sliding_window", None):
        attention += f", with the model's own sliding window of {loaded.config.sliding_window}"
    return {
        "base_model": loaded.base_model_name_or_path,
        "peft_model": loaded.adapter_name_or_path,
        "context_size": loaded.context_size,
        "rope_parameters": getattr(loaded.config, "rope_parameters", None),
        "attention": attention,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "load_in_4bit": loaded.load_in_4bit,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": software_versions(),
    }


def model_fingerprint(loaded: LoadedModel) -> dict:
    """What decides a number, to tell whether partial results of an earlier run still hold."""
    facts = model_facts(loaded)
    versions = {name: facts["versions"].get(name) for name in PACKAGES_THAT_DECIDE}
    folders = (loaded.base_model_name_or_path, loaded.adapter_name_or_path)
    return {**facts, "versions": versions, "models": [folder_state(folder) for folder in folders]}


def folder_state(name_or_path: str | None) -> list:
    """What tells one state of a model folder from another: names, sizes and times of the files that decide."""
    if name_or_path is None or not Path(name_or_path).is_dir():
        return [name_or_path]
    paths = sorted({path for pattern in FILES_THAT_DECIDE for path in Path(name_or_path).glob(pattern)})
    stats = [(path.name, path.stat()) for path in paths]
    return [str(Path(name_or_path).resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]
