"""Load a base or merged model, with or without an adapter, for generation, evaluation and merging."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from component.adapter_folder import adapter_vocabulary, add_embeddings, base_model_of, load_adapter
from component.attention import bind_inference_attention
from component.context import ContextRequest, apply_context, context_length, copy_context
from component.distributed import local_device, print_notice
from component.dual_chunk_binding import dual_chunk_sizes
from component.model import default_dtype, is_slow_on_cpu, load_config, load_model, load_tokenizer
from component.run_record import software_versions
from component.weight_checks import check_base, check_vocabulary

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


def resolve_config(
    model_name_or_path: str | None,
    adapter_name_or_path: str | None = None,
    context: ContextRequest | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[str, PretrainedConfig]:
    """Base model and its config with the context of the adapter, changed as `context` asks."""
    named_base = base_model_of(adapter_name_or_path) if adapter_name_or_path else None
    base = model_name_or_path or named_base
    if not base:
        raise ValueError("model_name_or_path: name the base model; the adapter folder does not")
    config = load_config(base, trust_remote_code=trust_remote_code)
    if adapter_name_or_path and (Path(adapter_name_or_path) / "config.json").is_file():
        saved = load_config(adapter_name_or_path, trust_remote_code=trust_remote_code)
        for name in ("model_type", "hidden_size", "num_hidden_layers"):
            if getattr(saved, name, None) != getattr(config, name, None):
                raise ValueError(
                    f"model_name_or_path: {base!r} has {name} {getattr(config, name, None)}, but the adapter was "
                    f"trained on {getattr(saved, name, None)}; give the base model of the adapter"
                )
        # Folders written by other tools may carry it; it describes their loading, not the base checkpoint.
        if hasattr(saved, "quantization_config"):
            del saved.quantization_config
        # The base is loaded with its own vocabulary; `adapter_vocabulary` says what becomes of it.
        saved.vocab_size = config.vocab_size
        config = saved
    apply_context(config, context or ContextRequest())
    return base, config


def tokenizer_source(base: str, adapter_name_or_path: str | None) -> str:
    """Where the tokenizer is read from: the adapter folder where it has one, else the base."""
    has_own = adapter_name_or_path and (Path(adapter_name_or_path) / "tokenizer_config.json").is_file()
    return adapter_name_or_path if has_own else base


def load_for_inference(
    model_name_or_path: str | None,
    *,
    adapter_name_or_path: str | None = None,
    context: ContextRequest | None = None,
    load_in_4bit: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a base or merged model, with or without an adapter, for generation or evaluation.

    What the folders know need not be said: the base model from the adapter, RoPE, length and attention
    from its config.json. `context` changes them.
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
    dtype, device = dtype or default_dtype(), device or local_device()
    if device.type == "cpu" and is_slow_on_cpu(dtype):
        name = str(dtype).removeprefix("torch.")
        print_notice(f"this CPU has no {name} arithmetic; fp32 is many times faster")
    model = load_model(
        base,
        config,
        dtype=dtype,
        load_in_4bit=load_in_4bit,
        device=device,
        trust_remote_code=trust_remote_code,
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
    _, config = resolve_config(loaded.base_model_name_or_path, loaded.adapter_name_or_path, context)
    model = loaded.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model
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
    return {
        **facts,
        "versions": {name: facts["versions"].get(name) for name in PACKAGES_THAT_DECIDE},
        "models": [folder_state(loaded.base_model_name_or_path), folder_state(loaded.adapter_name_or_path)],
    }


def folder_state(name_or_path: str | None) -> list:
    """What tells one state of a model folder from another: names, sizes and times of the files that decide."""
    if name_or_path is None or not Path(name_or_path).is_dir():
        return [name_or_path]
    paths = sorted({path for pattern in FILES_THAT_DECIDE for path in Path(name_or_path).glob(pattern)})
    stats = [(path.name, path.stat()) for path in paths]
    return [str(Path(name_or_path).resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]
