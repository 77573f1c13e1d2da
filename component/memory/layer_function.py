"""One decoder layer as one node of the graph, whose backward pass keeps and recomputes only what it must.

decoder_layer.py says what a layer computes, and which model types have such layers.

Forward and backward pass walk over tiles of the sequence; only attention sees it whole. What is kept between them
is chosen (KEPT); the rest is recomputed, each dropout mask from its seed. Products whose values no gradient needs
(the down projection; queries, keys and values, where they were kept) are not recomputed.

docs/memory.md counts what the backward pass of a layer holds.

Dimensions: B batch, S sequence, T tokens of a tile, C hidden size, H query heads, K key/value heads, D head dim.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch.autograd.function import once_differentiable

from longqlora.attention.inplace_attention import CausalPattern, attention_backward, attention_forward
from longqlora.attention.sdpa import sum_dtype
from longqlora.memory.adapted_linear import adapted_outputs
from longqlora.memory.decoder_layer import PROJECTIONS, CosSin, DecoderLayer, Linear, adapted_linear
from longqlora.memory.host_offload import HostOffload
from longqlora.memory.policy import ActivationPolicy
from longqlora.settings.config import KEPT


@dataclass
class LayerCall:
    """What does not change between the forward and the backward pass of one call of a layer.

    policy: what is kept, each of KEPT with those before it (the layer's input; attention's output and
    log-sum-exp; queries, keys and values; the products inside the MLP), tile size and chunks of heads.
    rope: of all S tokens. pattern: None where attention is `attend(q, k, v)` on [B, H, S, D], through autograd.
    seed: of all dropout masks. store: where tensors are kept; None for autograd's own place.
    """

    layer: DecoderLayer
    policy: ActivationPolicy
    dtype: torch.dtype
    rope: CosSin
    pattern: CausalPattern | None
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    seed: int
    store: HostOffload | None = None

    def tiles(self, *names: str, rows: dict[str, slice] | None = None) -> Iterator[tuple[slice, Linear]]:
        """Tiles of the sequence, each with the linear layers `names` under its dropout masks; rows: of their outputs.

        Quantised weights are unpacked here, once for all tiles.
        """
        linears = {name: adapted_linear(self.layer.linears[name], self.dtype) for name in names}
        linears |= {name: linears[name].rows(some) for name, some in (rows or {}).items()}
        length, size = self.rope[0].shape[1], self.policy.tile_size
        for start in range(0, length, size):

            def linear(names: Sequence[str], x: torch.Tensor, start: int = start, **options) -> Sequence[torch.Tensor]:
                seed = mask_seed(self.seed, names[0], start)
                return adapted_outputs([linears[name] for name in names], x, seed, **options)

            yield slice(start, min(start + size, length)), linear

    def head_chunks(self) -> list[tuple[slice, slice]]:
        """Query heads and the key/value heads that they share, chunk by chunk."""
        num_kv_heads, per_kv_head = self.layer.num_kv_heads, self.layer.num_heads // self.layer.num_kv_heads
        size = -(-num_kv_heads // (self.policy.num_head_chunks if self.pattern else 1))
        bounds = [(low, min(low + size, num_kv_heads)) for low in range(0, num_kv_heads, size)]
        return [(slice(low * per_kv_head, high * per_kv_head), slice(low, high)) for low, high in bounds]


def mask_seed(seed: int, name: str, start: int) -> int:
    """Seed of one dropout mask, from all its bits: torch's CPU generator uses the low 32 only (splitmix64)."""
    mixed = (seed + (sum(map(ord, name)) * 2**32 + start + 1) * 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> shift)) * factor % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63


class LayerFunction(torch.autograd.Function):
    """layer(hidden [B, S, C]) -> [B, S, C] in the dtype of the call; `trained` are the layer's trained parameters."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, call: LayerCall, *trained: torch.nn.Parameter) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.to(call.dtype)
            output, lse, *projected = attention_of(call, x)
            result, products = finish(call, x, output)
        # Where autograd runs through attention, it does so again in the backward pass, whatever was kept.
        attention = [[output, lse], projected] if call.pattern else []
        kept = [x, *products, *chain(*attention[: KEPT.index(call.policy.keep_activations)])]
        ctx.call, ctx.trained, ctx.dtype, ctx.num_products = call, trained, hidden.dtype, len(products)
        if call.store is None:
            ctx.save_for_backward(*kept)
        else:
            ctx.handle = call.store.put(kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        call, sums = ctx.call, {}
        x, *kept = ctx.saved_tensors if call.store is None else call.store.get(ctx.handle)
        products, kept = kept[: ctx.num_products], kept[ctx.num_products :]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            backward = backward_by_kernels if call.pattern else backward_through_autograd
            grad_hidden, *grads = backward(call, x, kept, gradient.to(call.dtype), products, sums)
            grad_hidden = grad_hidden if ctx.needs_input_grad[0] else None
            project_backward(call, x, grads, grad_hidden, sums)
        grads = [sums[parameter].to(parameter.dtype) if parameter in sums else None for parameter in ctx.trained]
        return None if grad_hidden is None else grad_hidden.to(ctx.dtype), None, *grads


def gradient_of(x, outputs, gradients, parameters, sums) -> torch.Tensor | None:
    """Gradient of x if it requires one; those of `parameters` are added to `sums`, in fp32 (fp64 for fp64)."""
    wanted = [x] if x.requires_grad else []
    grads = torch.autograd.grad(outputs, [*wanted, *parameters], gradients, allow_unused=True)
    for parameter, grad in zip(parameters, grads[len(wanted) :], strict=True):
        if grad is not None:
            exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
            sums[parameter] = sums[parameter].add_(exact) if parameter in sums else exact
    return grads[0] if wanted else None


def attention_of(call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Attention output [B, S, H, D], log-sum-exp [B, H, S], and the queries, keys and values of the last chunk."""
    layer, chunks = call.layer, call.head_chunks()
    if call.pattern is None:
        projected = project(call, x, *chunks[0])
        return call.attend(*(states.transpose(1, 2) for states in projected)), None, *projected
    output = x.new_empty(*x.shape[:2], layer.num_heads, layer.head_dim)
    lse = x.new_empty(x.shape[0], layer.num_heads, x.shape[1], dtype=sum_dtype(x))
    for heads, kv_heads in chunks:
        # Freed before the next chunk is projected.
        projected = None
        projected = project(call, x, heads, kv_heads)
        options = {"pattern": call.pattern, "first_head": heads.start, "scaling": layer.scaling}
        attention_forward(*projected, output[:, :, heads], lse[:, heads], **options)
    return output, lse, *projected


def project(call: LayerCall, x: torch.Tensor, heads: slice, kv_heads: slice) -> list[torch.Tensor]:
    """Queries, keys and values after RoPE, of some heads: [B, S, H, D], [B, S, K, D] twice."""
    layer, size, parts = call.layer, call.layer.head_dim, (heads, kv_heads, kv_heads)
    rows = {name: slice(p.start * size, p.stop * size) for name, p in zip(PROJECTIONS, parts, strict=True)}
    rows = {} if layer.kind.projects_all_heads else rows
    states = [x.new_empty(*x.shape[:2], part.stop - part.start, size) for part in parts]
    for tile, linear in call.tiles(*layer.kind.projections, rows=rows):
        projected = layer.project(x[:, tile], linear)
        if layer.kind.projects_all_heads:
            projected = [source[:, :, part] for source, part in zip(projected, parts, strict=True)]
        rope = [angles[:, tile] for angles in call.rope]
        for target, source in zip(states, projected[:2], strict=False):
            layer.rotate(source, *rope, out=target[:, tile])
        states[2][:, tile] = projected[2]
    return states


def finish(call: LayerCall, x, output) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The layer's result from its input and its attention output; the inner products if they are to be kept."""
    layer, result, kept = call.layer, torch.empty_like(x), []
    for tile, linear in call.tiles("o_proj", *layer.kind.mlp):
        hidden = layer.branch("o_proj", output[:, tile].flatten(2), linear).add_(x[:, tile])
        added, products = layer.mlp(hidden, linear)
        torch.add(hidden, added, out=result[:, tile])
        if call.policy.keep_activations == "all":
            kept += [hidden, *products]
    return result, kept


def finish_backward(call, x, output, gradient, products, sums) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x [B, S, C], as far as they do not pass attention, and of the attention output [B, S, H, D]."""
    layer, grad_x, grad_output = call.layer, torch.empty_like(x), torch.empty_like(output)
    trained, trained_mlp = layer.trained("o_proj"), layer.trained(*layer.kind.mlp)
    kept = iter(products)
    for tile, linear in call.tiles("o_proj", *layer.kind.mlp):
        hidden, *products = (next(kept, None) for _ in layer.kind.mlp)
        with torch.enable_grad():
            attended = output[:, tile].flatten(2).detach().requires_grad_()
            added = layer.branch("o_proj", attended, linear, is_needed=hidden is None)
            hidden = (x[:, tile] + added.detach() if hidden is None else hidden.detach()).requires_grad_()
            mlp_added, _ = layer.mlp(hidden, linear, products=products, is_output_needed=False)
        grad_hidden = gradient_of(hidden, mlp_added, gradient[:, tile], trained_mlp, sums)
        torch.add(grad_hidden, gradient[:, tile], out=grad_x[:, tile])
        grad_attended = gradient_of(attended, added, grad_x[:, tile], trained, sums)
        grad_output[:, tile] = grad_attended.view_as(output[:, tile])
    return grad_x, grad_output


def backward_by_kernels(call, x, kept, gradient, products, sums) -> tuple[torch.Tensor, ...]:
    """Gradients of x past attention, and of queries, keys and values after RoPE."""
    layer, chunks = call.layer, call.head_chunks()
    output, lse, *projected = kept or attention_of(call, x)
    # Of several chunks the last one's only, which is recomputed like the others.
    projected = projected if len(chunks) == 1 else []
    grad_x, grad_output = finish_backward(call, x, output, gradient, products, sums)
    options = {"pattern": call.pattern, "scaling": layer.scaling}
    if len(chunks) == 1:
        projected = projected or project(call, x, *chunks[0])
        return grad_x, *attention_backward(grad_output, *projected, output, lse, first_head=0, **options)
    # What a chunk has used up takes its gradients: queries' in the output, keys' in the gradient of the output.
    grad_value = x.new_empty(*x.shape[:2], layer.num_kv_heads, layer.head_dim)
    grad_key = grad_output if layer.num_kv_heads == layer.num_heads else torch.empty_like(grad_value)
    for heads, kv_heads in chunks:
        states = project(call, x, heads, kv_heads)
        arguments = grad_output[:, :, heads], *states, output[:, :, heads], lse[:, heads]
        grads = attention_backward(*arguments, first_head=heads.start, **options)
        output[:, :, heads], grad_key[:, :, kv_heads], grad_value[:, :, kv_heads] = grads
        # Freed before the next chunk is projected.
        del states, arguments, grads
    return grad_x, output, grad_key, grad_value


def backward_through_autograd(call, x, _kept, gradient, products, sums) -> tuple[torch.Tensor, ...]:
    """The same for attention of any kind, which is run again."""
    projected = [states.requires_grad_() for states in project(call, x, *call.head_chunks()[0])]
    with torch.enable_grad():
        output = call.attend(*(states.transpose(1, 2) for states in projected))
    grad_x, grad_output = finish_backward(call, x, output.detach(), gradient, products, sums)
    return grad_x, *torch.autograd.grad(output, projected, grad_output)


def project_backward(call, x, grads, grad_x: torch.Tensor | None, sums) -> None:
    """Add the gradient that reaches x through queries, keys and values to grad_x [B, S, C], where that is wanted."""
    names = call.layer.kind.projections
    trained = call.layer.trained(*names)
    for tile, linear in call.tiles(*names):
        with torch.enable_grad():
            part = x[:, tile].detach().requires_grad_(grad_x is not None)
            projected = call.layer.project(part, linear, are_values_needed=False)
        cos, sin = (angles[:, tile] for angles in call.rope)
        query, key, value = (grad[:, tile] for grad in grads)
        query, key = (call.layer.rotate(grad, cos, -sin, out=torch.empty_like(grad)) for grad in (query, key))
        grad_part = gradient_of(part, projected, (query, key, value), trained, sums)
        if grad_x is not None:
            grad_x[:, tile] += grad_part
