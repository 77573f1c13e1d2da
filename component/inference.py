"""Load a base or merged model, with or without an adapter, for generation, evaluation and merging."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from component.adapter_folder import base_model_of, load_adapter
from component.distributed import local_device
from component.model import default_dtype, extend_context, load_config, load_model, load_tokenizer


@dataclass
class LoadedModel:
    """A model ready for inference, with what its folders say about it."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    base_model_name_or_path: str
    context_size: int


def resolve_config(
    model_name_or_path: str | None,
    adapter_name_or_path: str | None = None,
    context_size: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[str, PretrainedConfig]:
    """Base model and its config with the context of the adapter, or of `context_size` where that is given."""
    named_base = base_model_of(adapter_name_or_path) if adapter_name_or_path else None
    base = model_name_or_path or named_base
    if not base:
        raise ValueError("model_name_or_path: name the base model; the adapter folder does not")
    config = load_config(base, trust_remote_code=trust_remote_code)
    if adapter_name_or_path and (Path(adapter_name_or_path) / "config.json").is_file():
        saved = load_config(adapter_name_or_path, trust_remote_code=trust_remote_code)
        for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            if getattr(saved, name, None) != getattr(config, name, None):
                raise ValueError(
                    f"model_name_or_path: {base!r} has {name} {getattr(config, name, None)}, but the adapter was "
                    f"trained on {getattr(saved, name, None)}; give the base model of the adapter"
                )
        # Folders written by other tools may carry it; it describes their loading, not the base checkpoint.
        if hasattr(saved, "quantization_config"):
            del saved.quantization_config
        config = saved
    extend_context(config, context_size)
    return base, config


def load_for_inference(
    model_name_or_path: str | None,
    *,
    adapter_name_or_path: str | None = None,
    context_size: int | None = None,
    load_in_4bit: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a base or merged model, with or without an adapter, for generation or evaluation.

    What the folders know need not be said: the base model from the adapter, RoPE and length from its
    config.json. `context_size` (tokens) extends the context by position interpolation.
    """
    base, config = resolve_config(
        model_name_or_path, adapter_name_or_path, context_size, trust_remote_code=trust_remote_code
    )
    model = load_model(
        base,
        config,
        dtype=dtype or default_dtype(),
        load_in_4bit=load_in_4bit,
        device=device or local_device(),
        trust_remote_code=trust_remote_code,
    )
    tokenizer_source = base
    if adapter_name_or_path:
        model = load_adapter(model, adapter_name_or_path)
        if (Path(adapter_name_or_path) / "tokenizer_config.json").is_file():
            tokenizer_source = adapter_name_or_path
    length = config.max_position_embeddings
    tokenizer = load_tokenizer(tokenizer_source, model_max_length=length, trust_remote_code=trust_remote_code)
    return LoadedModel(model.eval(), tokenizer, config, base, length)
