"""A norm over long sequences, tile by tile: nothing but its input is kept, and no fp32 copy of all tokens exists.

Dimensions: B batch, S sequence, C hidden size.

Pure maths: knows nothing of Hugging Face.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable


def tiled_norm(norm: Callable, x: torch.Tensor, parameters: list[torch.Tensor], *, tile_size: int) -> torch.Tensor:
    """norm(x) for x [B, S, C], in the dtype of x. `norm` works token by token; `parameters`: those of it that train."""
    return TiledNorm.apply(x, norm, tile_size, *parameters)


class TiledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, tile_size, *parameters):
        ctx.save_for_backward(x)
        ctx.norm, ctx.tile_size, ctx.parameters = norm, tile_size, parameters
        result = torch.empty_like(x)
        for part, target in zip(x.split(tile_size, dim=1), result.split(tile_size, dim=1), strict=True):
            target.copy_(norm(part))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,), parameters = ctx.saved_tensors, ctx.parameters
        grad_x, sums = torch.empty_like(x), [torch.zeros_like(p) for p in parameters]
        tiles = (tensor.split(ctx.tile_size, dim=1) for tensor in (x, gradient, grad_x))
        for part, part_gradient, target in zip(*tiles, strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                output = ctx.norm(leaf)
            grads = torch.autograd.grad(output, [leaf, *parameters], part_gradient.to(output.dtype))
            target.copy_(grads[0])
            for total, grad in zip(sums, grads[1:], strict=True):
                total += grad
        return grad_x, None, None, *sums
