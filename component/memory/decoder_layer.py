"""The parts of a decoder layer, as functions of a tile of its tokens; what tells model types apart is a row of KINDS.

    q, k, v = rope(qk_norm(qkv_proj(norm(x))))                                        `project`, `rotate`
    h = x + m * norm(o_proj(attention(q, k, v)))                                      `branch`
    y = h + m * norm(down_proj(act(gate_proj(n)) * up_proj(n))), n = norm(h)          `mlp`

Which norms there are and where, the multiplier m, biases, RoPE and fused or missing linear layers differ. Norms and
activations are the layer's own modules; linear layers, quantised or not, with LoRA or without, are read into
`AdaptedLinear`. Nothing here looks beyond the tile.

Dimensions: B batch, T tokens of a tile, C hidden size, F intermediate size, H query and K key/value heads, D head dim.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from longqlora.attention.binding import has_sliding_window
from longqlora.attention.rotation import LLAMA_LAYOUT, RotaryLayout
from longqlora.memory.adapted_linear import AdaptedLinear

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = (*PROJECTIONS, "o_proj", *MLP)
FUSED_MLP = ("gate_up_proj", "down_proj")
# linear(names, x [B, T, C], **options of adapted_outputs) -> a [B, T, N] for each name, under the tile's dropout mask.
Linear = Callable[..., Sequence[torch.Tensor]]
# cos and sin [B or 1, T, R], R the dimensions of a head that RoPE turns: the first ones
CosSin = Sequence[torch.Tensor]


@dataclass(frozen=True)
class LayerKind:
    """How the layers of a model type differ from Llama's.

    norms: attributes of the layer, before and behind attention, before and behind the MLP; None where there is none.
    projections, mlp: the linear layers but o_proj. Without a gate the MLP is down_proj(act(up_proj(n))).
    norms_all_heads: q_norm and k_norm are of all heads at once. layout: of RoPE's pairs; turns_in_fp32: in any dtype.
    """

    norms: tuple[str | None, ...] = ("input_layernorm", None, "post_attention_layernorm", None)
    projections: tuple[str, ...] = PROJECTIONS
    mlp: tuple[str, ...] = MLP
    norms_all_heads: bool = False
    layout: RotaryLayout = LLAMA_LAYOUT
    turns_in_fp32: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        return *self.projections, "o_proj", *self.mlp

    @property
    def num_norms_behind(self) -> int:
        return sum(norm is not None for norm in self.norms[1::2])

    @property
    def projects_all_heads(self) -> bool:
        """Some heads cannot be projected without the others."""
        return self.norms_all_heads or self.projections != PROJECTIONS


INTERLEAVED = RotaryLayout(is_interleaved=True)
BEHIND = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
SANDWICH = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
KINDS = {
    # Biases, multipliers, head dims and layers without RoPE are read from the layers themselves.
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "seed_oss"), LayerKind()),
    "arcee": LayerKind(mlp=("up_proj", "down_proj")),
    "ernie4_5": LayerKind(layout=INTERLEAVED, turns_in_fp32=True),
    "glm": LayerKind(mlp=FUSED_MLP, layout=INTERLEAVED),
    "glm4": LayerKind(norms=SANDWICH, mlp=FUSED_MLP, layout=INTERLEAVED),
    "exaone4": LayerKind(norms=BEHIND),
    "olmo2": LayerKind(norms=BEHIND, norms_all_heads=True),
    "phi3": LayerKind(projections=("qkv_proj",), mlp=FUSED_MLP),
}
MODEL_TYPES = tuple(KINDS)
# Their windows reach attention as a mask, through autograd.
WINDOWED_TYPES = ("mistral", "qwen2", "qwen3")
DROPOUTS = {
    "attention_dropout": "attention weights",
    "residual_dropout": "what attention and MLP add",
    "resid_pdrop": "what attention and MLP add",
}


class DecoderLayer:
    """A view of one decoder layer; it holds modules, no weights of its own."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.kind = kind = KINDS[attention.config.model_type]
        self.linears = {name: getattr(mlp if name in kind.mlp else attention, name) for name in kind.linears}
        self.act = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn
        self.head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        norms = [getattr(layer, name) if name else None for name in kind.norms]
        self.norms = dict(zip((kind.projections[0], "o_proj", kind.mlp[0], "down_proj"), norms, strict=True))
        self.multiplier = getattr(layer, "residual_multiplier", 1.0)
        self.is_turned = bool(getattr(attention, "use_rope", True))
        self.attention, self.head_dim, self.scaling = attention, attention.head_dim, attention.scaling
        config = attention.config
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads

    def trained(self, *names: str) -> list[nn.Parameter]:
        """Trained parameters of these linear layers and of the norms before and behind them."""
        modules = [self.linears[name] for name in names] + [self.norms.get(name) for name in names]
        modules += self.head_norms if self.kind.projections[0] in names else []
        return [p for module in modules if module for p in module.parameters() if p.requires_grad]

    def project(self, x: torch.Tensor, linear: Linear, *, are_values_needed=True) -> list[torch.Tensor]:
        """Queries, keys and values of x [B, T, C] before RoPE: [B, T, H, D], [B, T, K, D] twice.

        are_values_needed: if not, what comes back is meaningless, but gradients flow through it.
        """
        names, norms = self.kind.projections, (*self.head_norms, None)
        is_needed = [are_values_needed or norm is not None for norm in norms]
        is_fused = len(names) == 1
        outputs = linear(names, self.normed(names[0], x), is_needed=[any(is_needed)] if is_fused else is_needed)
        if is_fused:
            widths = [num * self.head_dim for num in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
            outputs = outputs[0].split(widths, dim=-1)
        states = []
        for output, norm in zip(outputs, norms, strict=True):
            if norm is not None and self.kind.norms_all_heads:
                output, norm = norm(output).to(output.dtype), None
            heads = output.unflatten(-1, (-1, self.head_dim))
            states.append(heads if norm is None else norm(heads).to(heads.dtype))
        return states

    def mlp(
        self, hidden: torch.Tensor, linear: Linear, *, products=None, is_output_needed=True
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """What the MLP adds to `hidden` [B, T, C], and its inner products [B, T, F or 2F], as given or computed."""
        names = self.kind.mlp[:-1]
        products = linear(names, self.normed(names[0], hidden), known=products)
        parts = products[0].chunk(2, dim=-1) if self.kind.mlp == FUSED_MLP else products
        inner = self.act(parts[0])
        inner = inner * parts[1] if len(parts) == 2 else inner
        return self.branch("down_proj", inner, linear, is_needed=is_output_needed), products

    def branch(self, name: str, x: torch.Tensor, linear: Linear, *, is_needed=True) -> torch.Tensor:
        """What o_proj or down_proj adds to the stream [B, T, C]; is_needed: as in `project`."""
        is_needed = is_needed or self.norms[name] is not None
        (added,) = linear((name,), x, is_needed=(is_needed,))
        added = self.normed(name, added)
        return added if self.multiplier == 1 else added * self.multiplier

    def normed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        norm = self.norms[name]
        return x if norm is None else norm(x).to(x.dtype)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """Write RoPE on x [B, T, H, D] into `out`, in the dtype of cos and sin; x itself in a layer without RoPE."""
        if not self.is_turned:
            return out.copy_(x)
        if cos.dtype != out.dtype:
            exact = x.to(cos.dtype)
            return out.copy_(rotate(exact, cos, sin, out=torch.empty_like(exact), layout=self.kind.layout))
        return rotate(x, cos, sin, out=out, layout=self.kind.layout)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, out: torch.Tensor, layout: RotaryLayout = LLAMA_LAYOUT
) -> torch.Tensor:
    """Write RoPE on the first R dimensions of x [B, T, H, D] into `out`, with cos and sin [B or 1, T, R].

    Both halves of cos and of sin are alike, so that -sin rotates back: the gradient of x, given that of the result.
    """
    num_freqs = cos.shape[-1] // 2
    cos, sin = (angles[:, :, None, :num_freqs] for angles in (cos, sin))
    (first, second), (out_first, out_second) = (layout.pairs(states, num_freqs) for states in (x, out))
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    out[..., 2 * num_freqs :] = x[..., 2 * num_freqs :]
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
    if dropped := [name for name in DROPOUTS if getattr(config, name, 0)]:
        return f"the model drops {DROPOUTS[dropped[0]]} ({dropped[0]})"
    if has_sliding_window(config) and config.model_type not in WINDOWED_TYPES:
        return "the model has sliding-window layers"
    linears = [x for x in modules if hasattr(x, "lora_A") and isinstance(base_layer(x), nn.Linear)]
    is_plain = all(len(x.active_adapters) == 1 and not getattr(x, "lora_variant", None) for x in linears)
    return None if is_plain else "its adapter is more than one plain LoRA"
