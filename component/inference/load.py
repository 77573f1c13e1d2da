"""Load a base or merged model, with or without an adapter, for generation, evaluation and merging."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from longqlora.attention.binding import bind_inference_attention
from longqlora.attention.dual_chunk_binding import dual_chunk_sizes
from longqlora.distributed import local_device, print_notice
from longqlora.model.adapter_folder import adapter_vocabulary, add_embeddings, load_adapter
from longqlora.model.base import check_vocabulary, default_dtype, is_slow_on_cpu, load_model, load_tokenizer
from longqlora.model.context import ContextRequest, context_length, copy_context, resolve_config, tokenizer_source
from longqlora.model.weight_files import check_base
from longqlora.run_record import software_versions

FILES_THAT_DECIDE = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
PACKAGES_THAT_DECIDE = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass
class LoadedModel:
    """A model ready for inference, with what its folders and the user say about it.

    context_size: in tokens. attention: description of the attention that is bound.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    base_model_name_or_path: str
    adapter_name_or_path: str | None
    context_size: int
    attention: str
    dtype: torch.dtype
    load_in_4bit: bool

    @property
    def longest_input(self) -> float:
        """Tokens that the model is meant to read: its context, or any number with dual chunk attention."""
        return self.context_size if dual_chunk_sizes(self.config) is None else math.inf


def load_for_inference(
    model_name_or_path: str | None,
    *,
    adapter_name_or_path: str | None = None,
    context: ContextRequest | None = None,
    load_in_4bit: bool = False,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a base or merged model, with or without an adapter.

    The adapter names its base model, and config.json RoPE, length and attention; `context` changes the latter.
    """
    base, config = resolve_config(
        model_name_or_path, adapter_name_or_path, context, trust_remote_code=trust_remote_code
    )
    empty = check_base(base, config, trust_remote_code=trust_remote_code)
    num_embeddings = adapter_vocabulary(adapter_name_or_path, empty) if adapter_name_or_path else config.vocab_size
    length = context_length(config)
    source = tokenizer_source(base, adapter_name_or_path)
    tokenizer = load_tokenizer(source, model_max_length=length, trust_remote_code=trust_remote_code)
    check_vocabulary(tokenizer, num_embeddings, source)
    dtype, device = dtype or default_dtype(), local_device()
    if device.type == "cpu" and is_slow_on_cpu(dtype):
        name = str(dtype).removeprefix("torch.")
        print_notice(f"this CPU has no {name} arithmetic; fp32 is many times faster")
    model = load_model(
        base, config, dtype=dtype, load_in_4bit=load_in_4bit, device=device, trust_remote_code=trust_remote_code
    )
    attention = bind_inference_attention(model)
    if adapter_name_or_path:
        config.vocab_size = num_embeddings
        add_embeddings(model, num_embeddings)
        model = load_adapter(model, adapter_name_or_path)
    return LoadedModel(
        model.eval(), tokenizer, config, base, adapter_name_or_path, length, attention, dtype, load_in_4bit
    )


def set_context(loaded: LoadedModel, context: ContextRequest, *, is_chunked: bool = False) -> None:
    """Give a loaded model another context, RoPE or attention, as if it had been loaded with `context`.

    is_chunked: as for `bind_inference_attention`.
    """
    model = loaded.model
    _, config = resolve_config(loaded.base_model_name_or_path, loaded.adapter_name_or_path, context)
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
