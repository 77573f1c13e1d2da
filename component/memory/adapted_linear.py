"""Frozen linear layers with LoRA that read the same input; their dropout can be replayed in any order, at any time.

LoRA (arXiv 2106.09685): y = x W' + b + scaling * dropout(x) A' B'. Autograd through the single operations
keeps the input twice, a mask and every intermediate, for each layer; here one node for all of them keeps the dropped
input, its mask as one byte an element and the product with all A. Used on tiles of a sequence, where even that is
small (layer_function.py).

A dropout mask is a function of its seed alone: recomputation draws the same mask, which nobody keeps. Layers that read
the same input (queries, keys and values; gate and up) share its mask, where PEFT draws one for each.

Dimensions: T tokens, C input features, N output features, R rank.

Pure maths: knows nothing of Hugging Face.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

# Masks compare 16 random bits with a threshold: four elements from each 64-bit draw.
MASK_LEVELS = 2**16


@dataclass(frozen=True)
class AdaptedLinear:
    """Weights of one linear layer in the dtype of the products.

    weight [N, C]; bias [N] or None; lora_a [R, C] and lora_b [N, R], which are trained, or both None;
    scaling = alpha / rank; dropout: share of inputs of A that are zeroed.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0

    @property
    def kept_scaling(self) -> float:
        """Of the product with inputs that dropout has zeroed, not scaled up."""
        return self.scaling * MASK_LEVELS / (MASK_LEVELS - num_dropped_levels(self.dropout))

    def rows(self, rows: slice) -> "AdaptedLinear":
        """The layer that computes only some of the outputs: views, no copies."""
        bias, lora_b = (x if x is None else x[rows] for x in (self.bias, self.lora_b))
        return replace(self, weight=self.weight[rows], bias=bias, lora_b=lora_b)


def adapted_outputs(
    linears: Sequence[AdaptedLinear], x: torch.Tensor, seed: int, *, known=None, is_needed: Sequence[bool] | None = None
) -> tuple[torch.Tensor, ...]:
    """Output [..., N] of each layer for x [..., C]; differentiable in x and what is trained: LoRA, or weight and bias.

    seed: of the dropout mask, which the layers share. known: results that are there (or None); only their gradients are
    wanted then. is_needed: where not, the values that come back are meaningless, but gradients flow through them.
    """
    if linears[0].weight.requires_grad:
        cast = [[w if w is None else w.to(x.dtype) for w in (linear.weight, linear.bias)] for linear in linears]
        return tuple(F.linear(x, *weights) for weights in cast)
    known = list(known or [None] * len(linears))
    for i, linear in enumerate(linears):
        if known[i] is None and is_needed and not is_needed[i]:
            known[i] = x.new_empty(()).expand(*x.shape[:-1], linear.weight.shape[0])
    adapted = [linear for linear in linears if linear.lora_a is not None]
    trained = [weight for linear in adapted for weight in (linear.lora_a, linear.lora_b)]
    # In a tuple, autograd takes no notice of what is known.
    return AdaptedLinearsFunction.apply(x, linears, seed, tuple(known), *trained)


class AdaptedLinearsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, linears: Sequence[AdaptedLinear], seed: int, known: tuple[torch.Tensor | None, ...], *trained):
        flat, dropped, mask, low_rank, outputs = x.reshape(-1, x.shape[-1]), None, None, None, []
        if trained:
            mask = keep_mask(flat, max(linear.dropout for linear in linears), seed)
            dropped = flat if mask is None else flat * mask
            low_rank = dropped @ torch.cat(trained[::2]).T.to(x.dtype)
        low_ranks = low_rank_parts(low_rank, linears)
        for linear, part, output in zip(linears, low_ranks, known, strict=True):
            if output is None:
                output = F.linear(flat, linear.weight, linear.bias)
                if part is not None:
                    output.addmm_(part, linear.lora_b.T.to(x.dtype), alpha=linear.kept_scaling)
                output = output.view(*x.shape[:-1], -1)
            outputs.append(output.view_as(output))
        ctx.save_for_backward(dropped, mask, low_rank)
        ctx.linears, ctx.trained, ctx.shape = linears, trained, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):
        (dropped, mask, low_rank), linears = ctx.saved_tensors, ctx.linears
        dtype, grad_x, grads = linears[0].weight.dtype, None, []
        gradients = [gradient.reshape(-1, gradient.shape[-1]).to(dtype) for gradient in gradients]
        for linear, gradient in zip(linears, gradients, strict=True):
            grad_x = gradient @ linear.weight if grad_x is None else grad_x.addmm_(gradient, linear.weight)
        if low_rank is not None:
            grad_low_rank = torch.empty_like(low_rank)
            parts = low_rank_parts(low_rank, linears), low_rank_parts(grad_low_rank, linears)
            for linear, gradient, part, grad_part in zip(linears, gradients, *parts, strict=True):
                if part is not None:
                    torch.mm(gradient, linear.lora_b.to(dtype), out=grad_part).mul_(linear.kept_scaling)
                    grads.append((gradient.T @ part).mul_(linear.kept_scaling).to(linear.lora_b.dtype))
            a = torch.cat(ctx.trained[::2])
            grads_a = (grad_low_rank.T @ dropped).to(a.dtype).split([len(x) for x in ctx.trained[::2]])
            grads = [x for pair in zip(grads_a, grads, strict=True) for x in pair]
            if mask is None:
                grad_x.addmm_(grad_low_rank, a.to(dtype))
            else:
                grad_x.add_((grad_low_rank @ a.to(dtype)).mul_(mask))
        return grad_x.view(ctx.shape), None, None, None, *grads


def low_rank_parts(low_rank: torch.Tensor | None, linears: Sequence[AdaptedLinear]) -> Iterator[torch.Tensor | None]:
    """For each layer its columns of low_rank [T, all R], a view; None where it has no LoRA."""
    ranks = [0 if linear.lora_a is None else len(linear.lora_a) for linear in linears]
    parts = [None] * len(linears) if low_rank is None else low_rank.split(ranks, dim=1)
    return (part if rank else None for part, rank in zip(parts, ranks, strict=True))


def keep_mask(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor | None:
    """Mask uint8 [T, C] for x [T, C], 1 where kept, None if all are; the same for the same shape, device and seed."""
    threshold = num_dropped_levels(dropout)
    if not threshold:
        return None
    generator = torch.Generator(x.device).manual_seed(seed)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    # From the least integer on: without it the sign bit would always be zero.
    draws.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    is_kept = draws.view(torch.int16)[: x.numel()] >= threshold - MASK_LEVELS // 2
    # A product with it takes half the time of one with bool on a CPU.
    return is_kept.view(torch.uint8).view(x.shape)


def num_dropped_levels(dropout: float) -> int:
    """How many of the 65536 values of a draw drop an element."""
    return round(dropout * MASK_LEVELS)
