"""A causal language model of any shape with random NF4 weights, without a checkpoint.

Memory and time of a training step depend on shapes, not on values. The model is laid out without
storage, then filled module by module; a 16-bit weight lives only until it is quantised, so building
a 7B model never takes more than its 4-bit size and one 16-bit matrix.
"""

from pathlib import Path

import bitsandbytes as bnb
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from longqlora.model.base import quantization_config
from longqlora.model.library_internals import keep_4bit_weights_trainable

LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
SHAPES = {
    "llama2-7b": {**LLAMA2, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                  "num_attention_heads": 32},
    "llama2-13b": {**LLAMA2, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                   "num_attention_heads": 40},
    "llama2-70b": {**LLAMA2, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                   "num_attention_heads": 64, "num_key_value_heads": 8},
    # Small enough for a CPU, with a vocabulary that counts.
    "llama-4l": {**LLAMA2, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4,
                 "num_attention_heads": 8},
    "tiny": {"vocab_size": 320, "max_position_embeddings": 64, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip


def shape_config(shape: str) -> PretrainedConfig:
    """Config of a named shape, or of a config.json given by its path or its folder's."""
    if shape in SHAPES:
        return LlamaConfig(**SHAPES[shape])
    if not Path(shape).exists():
        raise ValueError(f"--shape: {shape!r} is neither a file nor one of {', '.join(SHAPES)}")
    return AutoConfig.from_pretrained(shape)


def random_nf4_model(config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Model on `device`: linear layers but the output layer in NF4 (double quantisation), the rest in `dtype`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    head_names = [name for name, module in model.named_modules() if module is head]
    model = replace_with_bnb_linear(model, head_names, quantization_config(dtype))
    # A tied output embedding is restored below; filled on its own it would be a second matrix.
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            fill_linear(module, config.initializer_range, dtype, device)
        elif not (module is head and config.tie_word_embeddings):
            fill_plain(model, module, device)
    model.tie_weights()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"never filled: {left[:3]}"
    keep_4bit_weights_trainable(model)
    model.is_loaded_in_4bit = True
    return model


def fill_linear(module: bnb.nn.Linear4bit, std: float, dtype: torch.dtype, device: torch.device) -> None:
    """Quantise a random weight into `module`, with the settings it was made with."""
    empty = module.weight
    values = torch.empty(module.out_features, module.in_features, dtype=dtype, device=device).normal_(std=std)
    options = {name: getattr(empty, name) for name in ("compress_statistics", "quant_type", "quant_storage")}
    module.weight = bnb.nn.Params4bit(values, requires_grad=False, module=module, **options).to(device)
    if module.bias is not None:
        module.bias = torch.nn.Parameter(torch.zeros(module.out_features, dtype=dtype, device=device))


@torch.no_grad()
def fill_plain(model: PreTrainedModel, module: torch.nn.Module, device: torch.device) -> None:
    """Give the parameters and buffers that `module` owns itself storage and their usual first values."""
    if not module._parameters and not module._buffers:
        return
    module.to_empty(device=device, recurse=False)
    model._init_weights(module)
