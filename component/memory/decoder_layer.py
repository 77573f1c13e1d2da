"""The parts of a Llama-like decoder layer, as functions of a tile of its tokens.

Llama, Mistral, Qwen2 and Qwen3 layers differ only in biases and in norms on queries and keys:

    q, k, v = rope(qk_norm(qkv_proj(norm1(x))))                        `project`, `rotate`
    h = x + o_proj(attention(q, k, v))
    y = h + down_proj(act(gate_proj(n)) * up_proj(n)), n = norm2(h)    `mlp`

Norms and activations are the layer's own modules; linear layers, quantised or not, with LoRA or without, are
read into `AdaptedLinear`. Nothing here looks beyond the tile.

Dimensions: B batch, T tokens of a tile, C hidden size, F intermediate size, H query and K key/value heads, D head dim.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from longqlora.memory.adapted_linear import AdaptedLinear

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = (*PROJECTIONS, "o_proj", *MLP)
# linear(names, x [B, T, C], **options of adapted_outputs) -> a [B, T, N] for each name, under the tile's dropout mask.
Linear = Callable[..., Sequence[torch.Tensor]]
# cos and sin [B or 1, T, D]
CosSin = Sequence[torch.Tensor]


class DecoderLayer:
    """A view of one decoder layer; it holds modules, no weights of its own."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.linears = {name: getattr(mlp if name in MLP else attention, name) for name in LINEARS}
        self.norm1, self.norm2, self.act = layer.input_layernorm, layer.post_attention_layernorm, mlp.act_fn
        self.head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.attention, self.head_dim, self.scaling = attention, attention.head_dim, attention.scaling
        widths = (base_layer(self.linears[name]).out_features for name in ("q_proj", "k_proj"))
        self.num_heads, self.num_kv_heads = (width // self.head_dim for width in widths)

    def trained(self, *names: str) -> list[nn.Parameter]:
        """Trained parameters of the parts that `project` (names PROJECTIONS), o_proj or the MLP use."""
        modules = [self.linears[name] for name in names]
        modules += [self.norm1, *(x for x in self.head_norms if x)] if "q_proj" in names else []
        modules += [self.norm2] if "up_proj" in names else []
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def project(self, x: torch.Tensor, linear: Linear, *, are_values_needed=True) -> list[torch.Tensor]:
        """Queries, keys and values of x [B, T, C] before RoPE: [B, T, H, D], [B, T, K, D] twice.

        are_values_needed: if not, what comes back is meaningless, but gradients flow through it.
        """
        norms = (*self.head_norms, None)
        is_needed = [are_values_needed or norm is not None for norm in norms]
        outputs = linear(PROJECTIONS, self.norm1(x).to(x.dtype), is_needed=is_needed)
        states = [output.unflatten(-1, (-1, self.head_dim)) for output in outputs]
        return [x if norm is None else norm(x).to(x.dtype) for x, norm in zip(states, norms, strict=True)]

    def mlp(
        self, hidden: torch.Tensor, linear: Linear, *, gate=None, up=None, is_output_needed=True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the MLP adds to `hidden` [B, T, C], and its two inner products [B, T, F], as given or computed."""
        gate, up = linear(("gate_proj", "up_proj"), self.norm2(hidden).to(hidden.dtype), known=(gate, up))
        (added,) = linear(("down_proj",), self.act(gate) * up, is_needed=(is_output_needed,))
        return added, gate, up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Write RoPE on x [B, T, H, D] into `out`, with cos and sin [B or 1, T, D], halves rotated as in Llama.

    Both halves of cos and of sin are alike, so that -sin rotates back: the gradient of x, given that of the result.
    """
    half = x.shape[-1] // 2
    sin = sin[:, :, None, :half]
    torch.mul(x, cos[:, :, None], out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)
    return out


def base_layer(module: nn.Module) -> nn.Module:
    """The linear layer itself, below an adapter."""
    return module.get_base_layer() if hasattr(module, "lora_A") else module


def adapted_linear(module: nn.Module, dtype: torch.dtype) -> AdaptedLinear:
    """A linear layer with the active LoRA adapter of PEFT or none: frozen weights in `dtype`, unpacked from NF4."""
    base = base_layer(module)
    weight, bias = base.weight, base.bias
    if getattr(weight, "quant_state", None) is not None:
        import bitsandbytes.functional as quantization

        weight = quantization.dequantize_4bit(weight.data, weight.quant_state)
    if not weight.requires_grad:
        weight, bias = (x if x is None else x.to(dtype) for x in (weight, bias))
    if base is module or module.disable_adapters or module.merged:
        return AdaptedLinear(weight, bias)
    (name,) = module.active_adapters
    lora = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    return AdaptedLinear(weight, bias, *lora, getattr(module.lora_dropout[name], "p", 0.0) if module.training else 0.0)


def reason_unsupported(config, modules: Iterable[nn.Module] = ()) -> str | None:
    """Why layers of a transformers config, with the adapter among a model's `modules`, cannot be computed like this."""
    if config.model_type not in MODEL_TYPES:
        return f"{config.model_type} layers are not among {', '.join(MODEL_TYPES)}"
    if getattr(config, "attention_dropout", 0):
        return "the model drops attention weights (attention_dropout)"
    linears = [x for x in modules if hasattr(x, "lora_A") and isinstance(base_layer(x), nn.Linear)]
    is_plain = all(len(x.active_adapters) == 1 and not getattr(x, "lora_variant", None) for x in linears)
    return None if is_plain else "its adapter is more than one plain LoRA"
