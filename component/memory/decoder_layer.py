"""The parts of a Llama-like decoder layer, as functions of a tile of its tokens.

Llama, Mistral, Qwen2 and Qwen3 layers differ in biases and in norms on queries and keys only:

    q, k, v = rope(qk_norm(qkv_proj(norm1(x))))        `project`
    h = x + o_proj(attention(q, k, v))                 `attention_output`
    y = h + down_proj(act(gate_proj(n)) * up_proj(n)), n = norm2(h)    `mlp`

Norms and activations are the layer's own modules; linear layers, quantised or not, with LoRA or without, are
read into `AdaptedLinear`. Nothing here depends on tokens other than the tile's.

Dimensions: B batch, T tokens of a tile, C hidden size, F intermediate size, H query heads, K key/value heads,
D head dim.
"""

from collections.abc import Callable

import torch
from torch import nn

from longqlora.memory.adapted_linear import AdaptedLinear

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = (*PROJECTIONS, "o_proj", *MLP)


class DecoderLayer:
    """A view of one decoder layer; it holds modules, no weights of its own."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.linears = {name: getattr(mlp if name in MLP else attention, name) for name in LINEARS}
        self.norm1, self.norm2, self.act = layer.input_layernorm, layer.post_attention_layernorm, mlp.act_fn
        self.head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.attention, self.head_dim, self.scaling = attention, attention.head_dim, attention.scaling
        self.num_heads = out_features(self.linears["q_proj"]) // self.head_dim
        self.num_kv_heads = out_features(self.linears["k_proj"]) // self.head_dim

    def trained(self, *names: str) -> list[nn.Parameter]:
        """Trained parameters of the parts that `project` (names PROJECTIONS), o_proj or the MLP use."""
        modules = [self.linears[name] for name in names]
        modules += [self.norm1, *(x for x in self.head_norms if x)] if "q_proj" in names else []
        modules += [self.norm2] if "up_proj" in names else []
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def weights(self, *names: str, dtype: torch.dtype) -> dict[str, AdaptedLinear]:
        """Linear layers as dense matrices in `dtype`: quantised ones are unpacked here, once for all tiles."""
        return {name: adapted_linear(self.linears[name], dtype) for name in names}

    def project(
        self, x: torch.Tensor, linears: dict[str, AdaptedLinear], seed: Callable[[str], int], *, are_values_needed: bool
    ) -> list[torch.Tensor]:
        """Queries, keys and values of x [B, T, C] before RoPE: [B, T, H, D], [B, T, K, D] twice."""
        normed, heads = self.norm1(x).to(x.dtype), []
        for name, norm in zip(PROJECTIONS, (*self.head_norms, None), strict=True):
            flat = linears[name](normed, seed(name), is_output_needed=are_values_needed or norm is not None)
            states = flat.unflatten(-1, (-1, self.head_dim))
            heads.append(states if norm is None else norm(states).to(x.dtype))
        return heads

    def mlp(
        self,
        hidden: torch.Tensor,
        linears: dict[str, AdaptedLinear],
        seed: Callable[[str], int],
        *,
        products: tuple[torch.Tensor, torch.Tensor] | None = None,
        is_output_needed: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the MLP adds to `hidden` [B, T, C], and its two inner products [B, T, F], as given or computed."""
        normed = self.norm2(hidden).to(hidden.dtype)
        gate, up = (
            linears[name](normed, seed(name), output=products and products[position])
            for position, name in enumerate(("gate_proj", "up_proj"))
        )
        added = linears["down_proj"](self.act(gate) * up, seed("down_proj"), is_output_needed=is_output_needed)
        return added, gate, up


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on x [B, T, H, D] with cos and sin [B or 1, T, D], halves rotated as in Llama."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotated_back(gradient: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Gradient of `rotated` with respect to x."""
    first, second = (gradient * sin[:, :, None]).chunk(2, dim=-1)
    return gradient * cos[:, :, None] + torch.cat((second, -first), dim=-1)


def out_features(module: nn.Module) -> int:
    return base_layer(module).out_features


def base_layer(module: nn.Module) -> nn.Module:
    """The linear layer itself, below an adapter."""
    return module.get_base_layer() if hasattr(module, "lora_A") else module


def adapted_linear(module: nn.Module, dtype: torch.dtype) -> AdaptedLinear:
    """A linear layer, quantised or not, with the active LoRA adapter of PEFT or none."""
    base = base_layer(module)
    bias = None if base.bias is None else base.bias
    weight = dense_weight(base, dtype)
    if not weight.requires_grad:
        bias = bias if bias is None else bias.to(dtype)
    if base is module or module.disable_adapters or module.merged:
        return AdaptedLinear(weight, bias)
    (name,) = module.active_adapters
    dropout = getattr(module.lora_dropout[name], "p", 0.0) if module.training else 0.0
    return AdaptedLinear(
        weight, bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], dropout
    )


def dense_weight(module: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, C]: a trained one as it is, a frozen one in `dtype`, unpacked where it is quantised."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return module.weight if module.weight.requires_grad else module.weight.to(dtype)
    import bitsandbytes.functional as quantization

    return quantization.dequantize_4bit(module.weight.data, state).to(dtype)


def reason_unsupported(model: nn.Module) -> str | None:
    """Why the layers of `model`, adapter attached, cannot be taken apart like this; None where they can."""
    reason = reason_unsupported_config(model.config)
    if reason:
        return reason
    for module in model.modules():
        if hasattr(module, "lora_A") and isinstance(base_layer(module), nn.Linear):
            if len(module.active_adapters) != 1 or getattr(module, "lora_variant", None):
                return "its adapter is more than one plain LoRA"
    return None


def reason_unsupported_config(config) -> str | None:
    """The same as far as a transformers config tells it."""
    if config.model_type not in MODEL_TYPES:
        return f"{config.model_type} layers are not among {', '.join(MODEL_TYPES)}"
    if getattr(config, "attention_dropout", 0):
        return "the model drops attention weights (attention_dropout)"
    return None
