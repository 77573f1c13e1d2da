"""Divergence: what is not finite in a step's loss, gradients or weights, found at that step whatever is logged.

A step that fp16 skips, since its loss scale was too high, is part of training. Skipping without end is not.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist

from longqlora.distributed import gather_objects, world_size

# DeepSpeed's largest initial scale, 2**32, is down to 1 after 33 skipped steps, torch's 2**16 after 16.
MAX_SKIPPED_STEPS = 40


class DivergenceWatch:
    """Follows the loss of every micro-batch on its device; one synchronisation per optimizer step."""

    def __init__(self) -> None:
        self.loss: torch.Tensor | None = None
        self.num_skipped = 0

    def add(self, loss: torch.Tensor) -> torch.Tensor:
        """Take note of a micro-batch's loss, a scalar; returns it, or zero where it is not finite.

        One NaN of a step that fp16 skips would turn every later mean in the log into NaN.
        """
        self.loss = loss.detach().float() + (0 if self.loss is None else self.loss)
        return loss.nan_to_num(0.0, 0.0, 0.0)

    def end_step(self, grad_norm: torch.Tensor | float | None, *, is_fp16: bool) -> str | None:
        """What shows that training has diverged, the same on every rank; None while it goes well.

        grad_norm: norm of the gradients over all ranks, infinite where DeepSpeed skipped the step, or None if unknown.
        """
        loss, self.loss = self.loss / world_size(), None
        if world_size() > 1:
            dist.all_reduce(loss)
        if torch.isfinite(loss if grad_norm is None else loss + grad_norm):
            self.num_skipped = 0
            return None
        norm = math.nan if grad_norm is None else float(grad_norm)
        if is_fp16 and not math.isfinite(norm):
            self.num_skipped += 1
            if self.num_skipped < MAX_SKIPPED_STEPS:
                return None
            return f"fp16 skipped {self.num_skipped} steps in a row"
        return f"loss {loss.item():.4g}, gradient norm {norm:.4g}"


def all_finite(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether every trained weight is finite, on all ranks."""
    # Under ZeRO-3 a rank holds its share of a weight as `ds_tensor`. A norm needs no memory of the weight's size.
    held = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in parameters if parameter.requires_grad]
    largest = [torch.linalg.vector_norm(weight, math.inf).float() for weight in held if weight.numel()]
    return all(gather_objects(not largest or bool(torch.stack(largest).isfinite().all())))
