"""Attention kernels that also give each row's log-sum-exp, forward and backward, without holding all scores.

What attention over several ranges of keys is merged from (merged_attention.py). torch's SDPA keeps the
log-sum-exp to itself, so its kernels are called here by name: flash on a CPU, flash on CUDA (Ampere or
later, 16 bit), memory-efficient on CUDA (V100, fp32), and plain torch in blocks of rows everywhere else.

The backward kernels recompute the probabilities as exp(score - lse). Given the output and log-sum-exp of a
row's *whole* attention instead of the part's own, they return the exact gradients of that part.

`is_causal` is allowed for as many queries as keys only: the kernels disagree on where to align a triangle.

Dimensions: B batch, H query heads, K key/value heads (K divides H), Q queries, S keys, D head dim.

Pure maths: knows nothing of Hugging Face.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

aten = torch.ops.aten

# Both CUDA kernels read rows of whole 16-byte words; the memory-efficient one pads rows of lse as well.
CUDA_HEAD_DIM_MULTIPLE = 8
EFFICIENT_LSE_MULTIPLE = 32
# Above it, flash's backward exists on some of the GPUs only.
FLASH_MAX_HEAD_DIM = 192
PLAIN_SCORES_PER_BLOCK = 2**24


class Kernel(NamedTuple):
    """forward(query, key, value, is_causal=, scaling=) -> (output [B, H, Q, D], lse [B, H, Q]);
    backward(gradient, query, key, value, output, lse, is_causal=, scaling=) -> gradients of the three.
    """

    name: str
    forward: Callable
    backward: Callable
    has_gqa: bool


def attend(query, key, value, *, is_causal: bool, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all queries to all keys, or causal for Q == S.

    query [B, H, Q, D]; key and value [B, K, S, D]; one dtype. Returns the output [B, H, Q, D] in that dtype
    and the natural log-sum-exp of the scaled scores [B, H, Q] in fp32 (fp64 for fp64). Keeps no graph.
    """
    kernel, num_kv_heads = choose_kernel(query, value), key.shape[1]
    options = {"is_causal": is_causal, "scaling": scaling}
    match head_layout(kernel, query, key, is_causal):
        case "repeat":
            key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
        case "fold":
            output, lse = kernel.forward(fold_heads(query, num_kv_heads), key, value, **options)
            return unfold_heads(output, query.shape[2]), unfold_heads(lse, query.shape[2])
    return kernel.forward(query, key, value, **options)


def attend_backward(
    gradient, query, key, value, output, lse, *, is_causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, given the gradient, the output [B, H, Q, D] and the lse [B, H, Q] of
    whole rows, of which this attention may be a part."""
    kernel, num_kv_heads = choose_kernel(query, value), key.shape[1]
    options = {"is_causal": is_causal, "scaling": scaling}
    match head_layout(kernel, query, key, is_causal):
        case "repeat":
            repeated = (repeat_heads(x, query.shape[1]) for x in (key, value))
            grad_query, *grads = kernel.backward(gradient, query, *repeated, output, lse, **options)
            return grad_query, *(x.unflatten(1, (num_kv_heads, -1)).sum(dim=2) for x in grads)
        case "fold":
            gradient, folded, output, lse = (fold_heads(x, num_kv_heads) for x in (gradient, query, output, lse))
            grad_query, *grads = kernel.backward(gradient, folded, key, value, output, lse, **options)
            return unfold_heads(grad_query, query.shape[2]), *grads
    return kernel.backward(gradient, query, key, value, output, lse, **options)


def head_layout(kernel: Kernel, query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> str:
    """How query heads that share a key/value head reach the kernel.

    Without a triangle they are just more rows of that head ("fold"): needed where the kernel knows no groups, and
    faster for a single token, whose keys are then read once. Under a triangle keys are repeated ("repeat").
    """
    if query.shape[1] == key.shape[1] or (kernel.has_gqa and (is_causal or query.shape[2] > 1)):
        return "as it is"
    return "repeat" if is_causal else "fold"


def repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def fold_heads(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[B, H, Q, ...] -> [B, K, H/K * Q, ...]."""
    return x.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)


def unfold_heads(x: torch.Tensor, num_queries: int) -> torch.Tensor:
    """[B, K, H/K * Q, ...] -> [B, H, Q, ...]."""
    return x.unflatten(2, (-1, num_queries)).flatten(1, 2)


def choose_kernel(query: torch.Tensor, value: torch.Tensor) -> Kernel:
    """The fastest kernel for these tensors; torch's switches (`sdpa_kernel`, `enable_flash_sdp`) are obeyed."""
    switches, dtype = torch.backends.cuda, query.dtype
    if query.shape[-1] != value.shape[-1]:
        return PLAIN
    if query.device.type == "cpu" and switches.flash_sdp_enabled():
        return CPU_FLASH
    if query.device.type == "cuda" and dtype != torch.float64:
        has_ampere = torch.cuda.get_device_capability(query.device) >= (8, 0)
        fits_flash = has_ampere and query.element_size() == 2 and query.shape[-1] <= FLASH_MAX_HEAD_DIM
        if fits_flash and switches.flash_sdp_enabled():
            return CUDA_FLASH
        if (has_ampere or dtype != torch.bfloat16) and switches.mem_efficient_sdp_enabled():
            return CUDA_EFFICIENT
    return PLAIN


def cpu_flash_forward(query, key, value, *, is_causal, scaling):
    inputs = unit_stride(query, key, value)
    return aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, is_causal, scale=scaling)


def cpu_flash_backward(gradient, query, key, value, output, lse, *, is_causal, scaling):
    tensors = unit_stride(gradient, query, key, value, output)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, 0.0, is_causal, scale=scaling)


def cuda_flash_forward(query, key, value, *, is_causal, scaling):
    padded = pad_head_dim(query, key, value)
    output, lse, *_ = aten._scaled_dot_product_flash_attention(*padded, 0.0, is_causal, False, scale=scaling)
    return output[..., : query.shape[-1]], lse[..., : query.shape[2]]


def cuda_flash_backward(gradient, query, key, value, output, lse, *, is_causal, scaling):
    tensors = pad_head_dim(gradient, query, key, value, output)
    # Random state and cumulated lengths are for dropout and nested tensors; there are none.
    no_state = torch.empty(2, dtype=torch.uint64, device=query.device)
    grads = aten._scaled_dot_product_flash_attention_backward(
        *tensors, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, is_causal, no_state,
        torch.empty(0, dtype=torch.uint64, device=query.device), scale=scaling,
    )  # fmt: skip
    return tuple(x[..., : query.shape[-1]] for x in grads)


def cuda_efficient_forward(query, key, value, *, is_causal, scaling):
    padded = pad_head_dim(query, key, value)
    output, lse, *_ = aten._scaled_dot_product_efficient_attention(*padded, None, True, 0.0, is_causal, scale=scaling)
    return output[..., : query.shape[-1]], lse[..., : query.shape[2]]


def cuda_efficient_backward(gradient, query, key, value, output, lse, *, is_causal, scaling):
    gradient, *inputs, output = pad_head_dim(gradient, query, key, value, output)
    # As the forward kernel leaves it: rows that are not there have an infinite lse, hence probability 0.
    lse = F.pad(lse, (0, -lse.shape[2] % EFFICIENT_LSE_MULTIPLE), value=math.inf).contiguous()
    no_state = torch.zeros((), dtype=torch.int64, device=query.device)
    *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
        gradient, *inputs, None, output, lse, no_state, no_state, 0.0, [True, True, True, False], is_causal,
        scale=scaling,
    )  # fmt: skip
    return tuple(x[..., : query.shape[-1]] for x in grads)


def pad_head_dim(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Zeros behind the head dim up to a multiple that the CUDA kernels read; they change no score and no output."""
    missing = -tensors[0].shape[-1] % CUDA_HEAD_DIM_MULTIPLE
    return tuple(F.pad(x, (0, missing)) for x in tensors) if missing else unit_stride(*tensors)


def unit_stride(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The kernels take any strides but that of the head dim for granted."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def plain_forward(query, key, value, *, is_causal, scaling):
    key, value = (x.to(sum_dtype(x)) for x in (key, value))
    batch, num_heads, num_queries, _ = query.shape
    output = query.new_empty(batch, num_queries, num_heads, value.shape[-1]).transpose(1, 2)
    lse = key.new_empty(batch, num_heads, num_queries)
    for rows in plain_blocks(query, key):
        scores = plain_scores(query, key, rows, is_causal, scaling)
        lse[:, :, rows] = scores.logsumexp(dim=-1)
        output[:, :, rows] = scores.sub_(lse[:, :, rows, None]).exp_() @ value
    return output, lse


def plain_backward(gradient, query, key, value, output, lse, *, is_causal, scaling):
    dtypes = query.dtype, key.dtype, value.dtype
    key, value = (x.to(sum_dtype(x)) for x in (key, value))
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows in plain_blocks(query, key):
        part, exact = gradient[:, :, rows].to(value.dtype), query[:, :, rows].to(key.dtype)
        probabilities = plain_scores(query, key, rows, is_causal, scaling).sub_(lse[:, :, rows, None]).exp_()
        grad_value += probabilities.transpose(-1, -2) @ part
        mean = (part * output[:, :, rows]).sum(dim=-1, keepdim=True)
        grad_scores = (part @ value.transpose(-1, -2)).sub_(mean).mul_(probabilities).mul_(scaling)
        grad_query[:, :, rows] = (grad_scores @ key).to(query.dtype)
        grad_key += grad_scores.transpose(-1, -2) @ exact
    return tuple(x.to(dtype) for x, dtype in zip((grad_query, grad_key, grad_value), dtypes, strict=True))


def plain_scores(query, key, rows: slice, is_causal: bool, scaling: float) -> torch.Tensor:
    """Scaled scores [B, H, rows, S] in the dtype of key; -inf behind the triangle."""
    scores = (query[:, :, rows].to(key.dtype) @ key.transpose(-1, -2)).mul_(scaling)
    if is_causal:
        positions = torch.arange(query.shape[2], device=query.device)
        scores.masked_fill_(positions > positions[rows, None], -math.inf)
    return scores


def plain_blocks(query: torch.Tensor, key: torch.Tensor) -> Iterator[slice]:
    """Slices of rows whose scores number at most PLAIN_SCORES_PER_BLOCK (or are those of one row)."""
    batch, num_heads, num_queries, _ = query.shape
    size = max(1, PLAIN_SCORES_PER_BLOCK // (batch * num_heads * key.shape[2]))
    return (slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size))


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which products over `x` are summed: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


CPU_FLASH = Kernel("cpu_flash", cpu_flash_forward, cpu_flash_backward, has_gqa=True)
CUDA_FLASH = Kernel("cuda_flash", cuda_flash_forward, cuda_flash_backward, has_gqa=True)
CUDA_EFFICIENT = Kernel("cuda_efficient", cuda_efficient_forward, cuda_efficient_backward, has_gqa=False)
PLAIN = Kernel("plain", plain_forward, plain_backward, has_gqa=False)
