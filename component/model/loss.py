"""Next-token cross-entropy from hidden states, without the logits of the whole sequence.

At 8192 tokens and 32000 words fp32 logits, their shifted copy and their gradient take 3 GiB; here one
chunk of tokens at a time is projected, reduced and turned into gradients. torch >= 2.13 has the
operation for full precision; `ChunkedLinearCrossEntropy` does the same elsewhere and in 16 bit.

Pure maths: knows nothing of Hugging Face. Dimensions: B batch, S sequence, T tokens, C hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F

from longqlora.attention.sdpa import sum_dtype
from longqlora.settings.config import IGNORE_INDEX

# Of fp32 logits. torch's own choice is a quarter of it at 8192 tokens, whose products take 1.4 times as long on a CPU.
CHUNK_BYTES = 64 * 2**20
MAX_CHUNK_ROWS = 512


def next_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items: torch.Tensor | int | None = None,
    is_shifted: bool = False,
) -> torch.Tensor:
    """Cross-entropy of predicting each token's next one.

    hidden [B, S, C]; weight [V, C], the output embedding; labels int [B, S], the tokens themselves, or with is_shifted
    the next ones, IGNORE_INDEX where nothing is to be learned. The sum over tokens is divided by `num_items`, or by the
    number of labels that count when it is None. Returns a scalar, fp64 for fp64 input and else fp32; 0 without labels.
    """
    if not is_shifted:
        # Shifting the labels rather than the states spares a copy of the states at batch size one.
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    states, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).to(hidden.device)
    # torch's operation returns the sum in the input's dtype: infinite in fp16 from some 5000 tokens on.
    is_full_precision = states.dtype == weight.dtype and states.dtype in (torch.float32, torch.float64)
    if hasattr(F, "linear_cross_entropy") and is_full_precision:
        num_rows = num_chunk_rows(weight.shape[0])
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=num_rows, chunking_method=None)
        total = F.linear_cross_entropy(
            states, weight, targets, reduction="sum", ignore_index=IGNORE_INDEX, options=options
        )
    else:
        total = ChunkedLinearCrossEntropy.apply(states, weight, targets)
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum().clamp_min(1)
    return total / (num_items.to(total.device) if torch.is_tensor(num_items) else num_items)


def num_chunk_rows(num_words: int) -> int:
    """Tokens whose logits are there at a time, for a vocabulary of `num_words`."""
    return min(MAX_CHUNK_ROWS, max(1, CHUNK_BYTES // (4 * num_words)))


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Sum of cross_entropy(hidden @ weight.T, targets), a scalar. hidden [T, C], weight [V, C], targets int [T].

    Gradients are computed chunk by chunk in the forward pass, while the chunk's logits exist. Softmax and sum in fp32
    (fp64 for fp64 input); matrix products in the input dtype.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        compute = sum_dtype(hidden)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=compute) if need_weight else None
        total = torch.zeros((), dtype=compute, device=hidden.device)
        num_rows = num_chunk_rows(weight.shape[0])
        for start in range(0, len(hidden), num_rows):
            rows = slice(start, start + num_rows)
            into = None if grad_hidden is None else grad_hidden[rows]
            total += chunk_of_loss(hidden[rows], weight, targets[rows], into, grad_weight)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        return *(None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors), None


def chunk_of_loss(hidden, weight, targets, grad_hidden, grad_weight) -> torch.Tensor:
    """Summed loss of some tokens; gradients are written into grad_hidden [T, C] and added to grad_weight [V, C]."""
    compute = sum_dtype(hidden)
    counted, index = (targets != IGNORE_INDEX)[:, None], targets.clamp_min(0)[:, None]
    log_probs = (hidden @ weight.T.to(hidden.dtype)).to(compute).log_softmax(-1)
    total = -(log_probs.gather(1, index) * counted).sum()
    if grad_hidden is None and grad_weight is None:
        return total
    grad_logits = log_probs.exp_().scatter_add_(1, index, -torch.ones_like(index, dtype=compute)).mul_(counted)
    grad_logits = grad_logits.to(hidden.dtype)
    if grad_hidden is not None:
        torch.matmul(grad_logits, weight.to(hidden.dtype), out=grad_hidden)
    if grad_weight is not None:
        grad_weight += grad_logits.T @ hidden
    return total
