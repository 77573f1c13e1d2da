"""A frozen linear layer with LoRA, whose dropout can be replayed in any order and any number of times.

LoRA (arXiv 2106.09685): y = x W' + b + scaling * dropout(x) A' B'. Autograd through the single operations
keeps the input twice, a mask and every intermediate; here one node keeps the input, the mask as one byte an
element and the product with A. Used on tiles of a sequence, where even that is small (layer_function.py).

A dropout mask is a function of its seed alone: recomputation draws the same mask, which nobody keeps.

Dimensions: T tokens, C input features, N output features, R rank.

Pure maths: knows nothing of Hugging Face.
"""

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

    def rows(self, rows: slice) -> "AdaptedLinear":
        """The layer that computes only some of the outputs: views, no copies."""
        bias, lora_b = (x if x is None else x[rows] for x in (self.bias, self.lora_b))
        return replace(self, weight=self.weight[rows], bias=bias, lora_b=lora_b)

    def __call__(self, x: torch.Tensor, seed: int, *, output=None, is_output_needed: bool = True) -> torch.Tensor:
        """Output [..., N] for x [..., C]; differentiable in x and in what is trained: LoRA, or weight and bias.

        seed: of the dropout mask. output: the result where it is known; only its gradient is wanted then.
        is_output_needed: if not, the values that come back are meaningless, but gradients flow through them.
        """
        if self.weight.requires_grad:
            return F.linear(x, *(w if w is None else w.to(x.dtype) for w in (self.weight, self.bias)))
        if output is None and not is_output_needed:
            output = x.new_empty(()).expand(*x.shape[:-1], self.weight.shape[0])
        # In a tuple, autograd takes no notice of it.
        return AdaptedLinearFunction.apply(x, self.lora_a, self.lora_b, self, seed, (output,))


class AdaptedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lora_a, lora_b, linear: AdaptedLinear, seed: int, known: tuple[torch.Tensor | None]):
        flat = x.reshape(-1, x.shape[-1])
        mask = low_rank = None
        if lora_a is not None:
            mask = keep_mask(flat, linear.dropout, seed)
            low_rank = apply_mask(flat, mask, linear.dropout) @ lora_a.T.to(x.dtype)
        ctx.save_for_backward(x, mask, low_rank, lora_a, lora_b)
        ctx.linear = linear
        (output,) = known
        if output is not None:
            return output.view_as(output)
        output = F.linear(flat, linear.weight, linear.bias)
        if low_rank is not None:
            output.addmm_(low_rank, lora_b.T.to(x.dtype), alpha=linear.scaling)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        x, mask, low_rank, lora_a, lora_b = ctx.saved_tensors
        linear, dtype = ctx.linear, x.dtype
        flat, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]).to(dtype)
        grad_x, grad_a, grad_b = gradient @ linear.weight, None, None
        if lora_a is not None:
            grad_b = (gradient.T @ low_rank).mul_(linear.scaling).to(lora_b.dtype)
            grad_low_rank = (gradient @ lora_b.to(dtype)).mul_(linear.scaling)
            grad_a = (grad_low_rank.T @ apply_mask(flat, mask, linear.dropout)).to(lora_a.dtype)
            if mask is None:
                grad_x.addmm_(grad_low_rank, lora_a.to(dtype))
            else:
                grad_x.add_(apply_mask(grad_low_rank @ lora_a.to(dtype), mask, linear.dropout))
        return grad_x.view_as(x), grad_a, grad_b, None, None, None


def apply_mask(x: torch.Tensor, mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """x [T, C] with some elements zeroed and the others scaled up; also the gradient of that, given the output's."""
    return x if mask is None else (x * mask).mul_(MASK_LEVELS / (MASK_LEVELS - num_dropped_levels(dropout)))


def keep_mask(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor | None:
    """Mask bool [T, C] for x [T, C], True where kept, None if all are; the same for the same shape, device and seed."""
    threshold = num_dropped_levels(dropout)
    if not threshold:
        return None
    generator = torch.Generator(x.device).manual_seed(seed)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    # From the least integer on: without it the sign bit would always be zero.
    draws.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return (draws.view(torch.int16)[: x.numel()] >= threshold - MASK_LEVELS // 2).view(x.shape)


def num_dropped_levels(dropout: float) -> int:
    """How many of the 65536 values of a draw drop an element."""
    return round(dropout * MASK_LEVELS)
