"""One decoder layer as one node of the graph, whose backward pass keeps and recomputes only what it must.

Forward and backward walk over tiles of the sequence; only attention sees it whole. What is kept between them
is chosen (layer_call.KEPT); the rest is made again, each dropout mask from its seed. The products whose values no
gradient needs (the down projection, queries, keys and values the second time) are not made again at all.

In units of one [B, S, C] tensor, the backward pass of a layer with as many key/value heads as query heads
holds: input, incoming and outgoing gradient, attention output and its gradient, queries, keys, values (in
whose memory their gradients are written) = 8, 3/4 for the piece of attention at work, and one tile.

Dimensions: B batch, S sequence, T tokens of a tile, C hidden size, H query heads, K key/value heads, D head dim.
"""

from collections.abc import Iterable

import torch
from torch.autograd.function import once_differentiable

from longqlora.attention.lse_kernels import attention_backward, attention_forward, empty_lse
from longqlora.memory.decoder_layer import MLP, PROJECTIONS, rotated, rotated_back
from longqlora.memory.layer_call import LayerCall
from longqlora.settings.config import KEPT


class LayerFunction(torch.autograd.Function):
    """layer(hidden [B, S, C]) -> [B, S, C] in the dtype of the call; `trained` are the layer's trained parameters."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, call: LayerCall, *trained: torch.nn.Parameter) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.to(call.dtype)
            output, lse, projected = attention_of(call, x)
            is_all = call.options.keep == "all"
            result, products = finish(call, x, output, are_products_kept=is_all)
        level = KEPT.index(call.options.keep)
        kept = [x] + ([output, lse] if level >= 1 else []) + (projected if level >= 2 else []) + products
        if call.pattern is None:
            # Autograd runs through attention again whatever was kept of it.
            kept = [x] + products
        ctx.call, ctx.dtype, ctx.trained, ctx.num_products, ctx.is_spent = (
            call,
            hidden.dtype,
            trained,
            len(products),
            False,
        )
        if call.store is None:
            ctx.save_for_backward(*kept)
        else:
            ctx.handle = call.store.put(kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        if ctx.is_spent:
            raise RuntimeError("a layer's backward pass ran twice; gradients took the place of what it had kept")
        ctx.is_spent, call = True, ctx.call
        kept = list(ctx.saved_tensors if call.store is None else call.store.get(ctx.handle))
        products = [kept.pop() for _ in range(ctx.num_products)][::-1]
        x, *kept = kept
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            gradient = gradient.to(call.dtype)
            sums = GradientSums(ctx.trained)
            if call.pattern is None:
                grads = backward_through_autograd(call, x, gradient, products, sums)
            else:
                grads = backward_by_kernels(call, x, kept, gradient, products, sums)
            grad_hidden = grads[0]
            project_backward(call, x, grads[1:], grad_hidden if ctx.needs_input_grad[0] else None, sums)
        return grad_hidden.to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, *sums.results()


class GradientSums:
    """Gradients of the trained parameters, summed over tiles in fp32 (fp64 for fp64)."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self.parameters, self.sums = list(parameters), {}

    def backward(self, outputs, gradients, inputs, parameters) -> list[torch.Tensor]:
        """Gradients of `inputs`; those of `parameters` are added up."""
        grads = torch.autograd.grad(outputs, [*inputs, *parameters], gradients, allow_unused=True)
        for parameter, grad in zip(parameters, grads[len(inputs) :], strict=True):
            if grad is None:
                continue
            known = self.sums.get(parameter)
            exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
            self.sums[parameter] = exact if known is None else known.add_(exact)
        return list(grads[: len(inputs)])

    def results(self) -> list[torch.Tensor | None]:
        sums = [self.sums.get(parameter) for parameter in self.parameters]
        return [x if x is None else x.to(p.dtype) for x, p in zip(sums, self.parameters, strict=True)]


def attention_of(call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
    """Attention output [B, S, H, D], log-sum-exp [B, H, S] and the last chunk's queries, keys and values."""
    layer, projected = call.layer, []
    if call.pattern is None:
        projected = project(call, x, *call.head_chunks()[0])
        return call.attend(*(states.transpose(1, 2) for states in projected)), None, projected
    output = x.new_empty(*x.shape[:2], layer.num_heads, layer.head_dim)
    lse = empty_lse(output)
    for heads, kv_heads in call.head_chunks():
        projected.clear()
        projected += project(call, x, heads, kv_heads)
        options = {"pattern": call.pattern, "first_head": heads.start, "scaling": layer.scaling}
        attention_forward(*projected, output[:, :, heads], lse[:, heads], **options)
    return output, lse, projected


def project(call: LayerCall, x: torch.Tensor, heads: slice, kv_heads: slice) -> list[torch.Tensor]:
    """Queries, keys and values after RoPE, of some heads: [B, S, H, D], [B, S, K, D] twice."""
    layer = call.layer
    linears = chunk_of(layer.weights(*PROJECTIONS, dtype=call.dtype), layer.head_dim, heads, kv_heads)
    counts = (heads.stop - heads.start, *[kv_heads.stop - kv_heads.start] * 2)
    states = [x.new_empty(*x.shape[:2], count, layer.head_dim) for count in counts]
    for tile, seed in call.tiles(x.shape[1]):
        query, key, value = layer.project(x[:, tile], linears, seed, are_values_needed=True)
        rope = call.rope(tile)
        for target, source in zip(states, (rotated(query, *rope), rotated(key, *rope), value), strict=True):
            target[:, tile] = source
    return states


def chunk_of(linears: dict, head_dim: int, heads: slice, kv_heads: slice) -> dict:
    rows = [slice(part.start * head_dim, part.stop * head_dim) for part in (heads, kv_heads, kv_heads)]
    return {name: linears[name].rows(part) for name, part in zip(PROJECTIONS, rows, strict=True)}


def finish(
    call: LayerCall, x: torch.Tensor, output: torch.Tensor, *, are_products_kept: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The layer's result from its input and its attention output, and what "all" keeps of the way there."""
    layer, result = call.layer, torch.empty_like(x)
    linears, kept = layer.weights("o_proj", *MLP, dtype=call.dtype), []
    for tile, seed in call.tiles(x.shape[1]):
        hidden = x[:, tile] + linears["o_proj"](output[:, tile].flatten(2), seed("o_proj"))
        added, *products = layer.mlp(hidden, linears, seed)
        result[:, tile] = hidden + added
        if are_products_kept:
            kept = kept or [p.new_empty(*x.shape[:2], p.shape[-1]) for p in (hidden, *products)]
            for target, source in zip(kept, (hidden, *products), strict=True):
                target[:, tile] = source
    return result, kept


def finish_backward(call, x, output, gradient, products, sums) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x [B, S, C], as far as they do not pass attention, and of the attention output [B, S, H, D]."""
    layer, grad_x, grad_output = call.layer, torch.empty_like(x), torch.empty_like(output)
    linears = layer.weights("o_proj", *MLP, dtype=call.dtype)
    trained, trained_mlp = layer.trained("o_proj"), layer.trained(*MLP)
    for tile, seed in call.tiles(x.shape[1]):
        with torch.enable_grad():
            attended = output[:, tile].flatten(2).detach().requires_grad_()
            added = linears["o_proj"](attended, seed("o_proj"), is_output_needed=not products)
            hidden = products[0][:, tile] if products else x[:, tile] + added.detach()
            hidden = hidden.detach().requires_grad_()
            known = tuple(p[:, tile] for p in products[1:]) or None
            mlp_added, _, _ = layer.mlp(hidden, linears, seed, products=known, is_output_needed=False)
        (grad_hidden,) = sums.backward([mlp_added], [gradient[:, tile]], [hidden], trained_mlp)
        grad_x[:, tile] = grad_hidden + gradient[:, tile]
        (grad_attended,) = sums.backward([added], [grad_x[:, tile]], [attended], trained)
        grad_output[:, tile] = grad_attended.view_as(output[:, tile])
    return grad_x, grad_output


def backward_by_kernels(call, x, kept, gradient, products, sums) -> tuple[torch.Tensor, ...]:
    """Gradients of x past attention, and of queries, keys and values after RoPE."""
    layer, chunks = call.layer, call.head_chunks()
    output, lse, *projected = kept or [None, None]
    if output is None:
        output, lse, projected = attention_of(call, x)
    if len(chunks) > 1:
        # The last chunk's only: they are made again when its turn comes.
        projected = []
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
        # Not to be held while the next chunk is projected.
        del states, arguments, grads
    return grad_x, output, grad_key, grad_value


def backward_through_autograd(call, x, gradient, products, sums) -> tuple[torch.Tensor, ...]:
    """The same for attention of any kind."""
    with torch.enable_grad():
        projected = [states.requires_grad_() for states in project(call, x, *call.head_chunks()[0])]
        output = call.attend(*(states.transpose(1, 2) for states in projected))
    grad_x, grad_output = finish_backward(call, x, output.detach(), gradient, products, sums)
    return grad_x, *torch.autograd.grad(output, projected, grad_output)


def project_backward(call, x, grads, grad_x: torch.Tensor | None, sums) -> None:
    """Add the gradient that reaches x through queries, keys and values to grad_x [B, S, C], where that is wanted."""
    layer = call.layer
    linears, trained = layer.weights(*PROJECTIONS, dtype=call.dtype), layer.trained(*PROJECTIONS)
    for tile, seed in call.tiles(x.shape[1]):
        with torch.enable_grad():
            part = x[:, tile].detach().requires_grad_(grad_x is not None)
            projected = layer.project(part, linears, seed, are_values_needed=False)
        rope = call.rope(tile)
        parts = [rotated_back(grad[:, tile], *rope) for grad in grads[:2]] + [grads[2][:, tile]]
        got = sums.backward(projected, parts, [] if grad_x is None else [part], trained)
        if grad_x is not None:
            grad_x[:, tile] += got[0]
