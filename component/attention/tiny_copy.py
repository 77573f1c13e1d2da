"""A small random copy of a model, to try on it what would be done to the model itself.

The class and every layer's kind are the model's own, so that whatever depends on the model type is there: RoPE
layout, layers without RoPE, norms on queries and keys, sinks, soft caps, multipliers, experts, caches. Widths are not.
"""

import copy

import torch
from transformers import PretrainedConfig, PreTrainedModel

from longqlora.device import is_out_of_memory

# Of each attribute that a config has, the largest value; head dims and all that RoPE reads stay.
LARGEST = {
    "vocab_size": 64, "vocab_size_per_layer_input": 64, "intermediate_size": 32, "ffn_hidden_size": 32,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "intermediate_size_mlp": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
    # As many experts as a token takes, so that rounding cannot change which.
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2, "num_experts_per_tok": 2,
    "moe_k": 2, "n_group": 1, "topk_group": 1,
    # The vocabulary is smaller than their ids.
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NUM_HEADS = 4
DROPOUTS = ("dropout", "pdrop", "jitter_noise", "jitter_eps")


def tiny_copy(model: PreTrainedModel, *, num_layers: int | None = None, drops: bool = False) -> PreTrainedModel:
    """A float32 model on the CPU in eval mode, of the class of `model`: all its layers, 4 heads, narrow MLPs.

    `model` may be on the meta device, quantised or split by ZeRO-3: its config is all that is read. num_layers: the
    first ones only; drops: keep the dropout rates, which are 0 otherwise. No random state changes.
    Raises ValueError where the model's class makes nothing of such a config.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    shrink(config)
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    for name in [] if drops else [name for name in config.to_dict() if name.endswith(DROPOUTS)]:
        setattr(config, name, 0.0)
    config._attn_implementation = "eager" if model._supports_attention_backend else None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            small = type(model)(config).float().eval()
            randomise(small)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"model_name_or_path: {config.model_type} cannot be tried on a small copy ({type(error).__name__}: {error})"
        ) from None
    return small


def shrink(config: PretrainedConfig) -> None:
    """Make `config` that of a narrow model; the number of layers, head dim and RoPE stay."""
    num_heads = config.num_attention_heads
    config.num_attention_heads = min(NUM_HEADS, num_heads)
    config.hidden_size = config.hidden_size // num_heads * config.num_attention_heads
    for name in ("num_key_value_heads", "num_kv_heads"):
        num_kv_heads = getattr(config, name, None)
        if num_kv_heads:
            # Keys are shared by two heads, by all or by none, as in the model.
            setattr(config, name, config.num_attention_heads if num_kv_heads == num_heads else min(num_kv_heads, 2))
    if getattr(config, "mamba_d_head", None) and not getattr(config, "mamba_d_ssm", None):
        # Mamba's heads make up a multiple of the width.
        config.mamba_n_heads = config.mamba_expand * config.hidden_size // config.mamba_d_head
    for name, largest in LARGEST.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and value > largest:
            setattr(config, name, largest)
        elif isinstance(value, list) and name.endswith("_token_id"):
            setattr(config, name, largest)


def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Give every parameter random values of a size at which attention is neither flat nor sharp, biases included."""
    parameters = list(model.parameters())
    # Pieces of one stretch: a model of 80 layers has as many numbers as take seconds to draw.
    stretch = max(p.numel() for p in parameters) + 2**16
    noise = torch.randn(stretch, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for position, p in enumerate(parameters):
            piece = noise[position * 997 % 2**16 :][: p.numel()].view_as(p)
            # Vectors stay around what the class starts from: norm weights are 1, or 0 where they are added to 1.
            p.add_(piece, alpha=0.2) if p.ndim < 2 else p.copy_(piece).mul_(1.5 * p.shape[-1] ** -0.5)
