"""What a binding of ours must show before it is used: on a short input, the same as stock transformers.

A binding replaces a part of a model that transformers knows by model type: attention, or whole decoder layers. A type
may do there what ours does not know (sinks, soft caps, another RoPE layout), and training would go on, wrong without
a word. So each binding is tried first, and refused by name where it differs.

It is tried on a small random copy of the model (tiny_copy.py), in float32 on the CPU, not on the loaded
weights. What can be wrong hangs on the model's class and config, which the copy has. In float32 both ways agree to
1e-5, where the rounding of a deep 16-bit model would hide a soft cap. A copy can be made of a model on the meta
device (a dry run), in NF4 and under ZeRO-3, by each process for itself. It takes 0.05 s for the demo's model and 1 s
for a Llama-2-7B. Of the model itself nothing can change: no weight, buffer, cache, gradient or mode, and no 4-bit
weight is repacked. What the copy does not show is the kernel of another device or dtype.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from longqlora.attention.tiny_copy import tiny_copy
from longqlora.device import is_out_of_memory

# Of the largest value; float32 leaves 1e-5, a missing soft cap 5e-3.
TOLERANCE = 1e-3
NUM_TOKENS = 12
FIRST_DOCUMENT = 7


def prove_attention(
    model: PreTrainedModel,
    method: str,
    bind: Callable[[PreTrainedModel], None],
    *,
    fix: str,
    is_packed: bool = False,
    reads_blocks: bool = False,
) -> None:
    """Raise ValueError unless a copy of `model` has the stock logits after `bind(copy)`, in training and evaluation.

    method: the binding's name in the message; fix: what to use instead. is_packed: a row of two documents must equal
    each alone; reads_blocks: an input, longer too, must read the same in two blocks against the cache.
    """
    small, ids = tiny_copy(model), token_ids(NUM_TOKENS)
    documents = ids.split([FIRST_DOCUMENT, NUM_TOKENS - FIRST_DOCUMENT], dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    with torch.no_grad(), refusing(model, method, fix):
        stock = logits(small, ids)
        alone = torch.cat([logits(small, document) for document in documents], dim=1) if is_packed else None
        bind(small)
        pairs = [(logits(small.train(mode), ids), stock) for mode in (True, False)]
        if is_packed:
            pairs += [(logits(small.train(mode), ids, position_ids=positions), alone) for mode in (True, False)]
        if reads_blocks:
            longer = token_ids(2 * NUM_TOKENS)
            pairs += [(in_blocks(small, ids), stock), (in_blocks(small, longer), logits(small, longer))]
        check_equal(pairs)


@contextmanager
def refusing(model: PreTrainedModel, method: str, fix: str) -> Iterator[None]:
    """Turn what goes wrong within into one ValueError that names model type, method and fix."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{method} does not suit {model.config.model_type}: {text}; {fix}") from error


def check_equal(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Raise ValueError where ours and stock, float32 of equal shapes, differ by more than TOLERANCE."""
    worst = max(float((ours - stock).abs().max() / stock.abs().max()) for ours, stock in pairs)
    if not worst <= TOLERANCE:
        raise ValueError(
            f"on {NUM_TOKENS} tokens it differs from the stock model by {worst:.2g} of the largest value "
            f"(at most {TOLERANCE:g} is rounding)"
        )


def token_ids(num_tokens: int) -> torch.Tensor:
    """Fixed random ids [1, num_tokens] of the copy's vocabulary."""
    return torch.randint(3, 60, (1, num_tokens), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel, ids: torch.Tensor, **inputs) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **inputs).logits


def in_blocks(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of `ids`, read in two blocks."""
    first = model(input_ids=ids[:, :FIRST_DOCUMENT], use_cache=True)
    rest = model(input_ids=ids[:, FIRST_DOCUMENT:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat((first.logits, rest.logits), dim=1)


def outputs_and_gradients(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits, and the gradients of a sum over them with respect to all that is trained."""
    found = logits(model, ids)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [found.detach(), *torch.autograd.grad(found.sin().sum(), trained)]
