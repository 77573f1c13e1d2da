"""torch's attention kernels: causal attention through SDPA, and the kernels below it that return the log-sum-exp.

SDPA does not return the log-sum-exp, so `attend` calls its kernels by their operator names: flash on a CPU, flash on
CUDA (Ampere or later, 16 bit), memory-efficient on CUDA (V100, fp32), and plain torch in blocks of rows everywhere
else. The backward kernels recompute the probabilities as exp(score - lse): given the output and log-sum-exp of a row
over *all* its keys, they return the exact gradients for the range of keys that they are called with (merged.py).

Pure maths: knows nothing of Hugging Face.
Dimensions: B batch, H query heads, K key/value heads (K divides H), Q queries, S keys, D head dim.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

aten = torch.ops.aten

# The signature of `causal_attention`.
AttentionKernel = Callable[..., torch.Tensor]

# The memory-efficient kernel pads rows of the log-sum-exp.
EFFICIENT_LSE_MULTIPLE = 32
# Above it, flash's backward exists on some of the GPUs only.
FLASH_MAX_HEAD_DIM = 192
PLAIN_SCORES_PER_BLOCK = 2**24
# Query heads that share a key/value head, as further rows of that head.
FOLD, UNFOLD = "b (k r) q ... -> b k (r q) ...", "b k (r q) ... -> b (k r) q ..."


def causal_attention(query, key, value, *, scaling: float | None = None, dropout=0.0, mask=None) -> torch.Tensor:
    """Causal attention through torch's SDPA, which picks flash, cuDNN, memory-efficient or math.

    query [B, H, S, D]; key and value [B, K, S, D]; mask bool [B, 1, S, S], True where attention is allowed and
    already causal. Returns [B, H, S, D] in the dtype of query.
    """
    num_shared = query.shape[1] // key.shape[1]
    enable_gqa = num_shared > 1 and has_gqa_kernel(query, mask)
    if num_shared > 1 and not enable_gqa:
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
        enable_gqa=enable_gqa,
    )  # fmt: skip


def has_gqa_kernel(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a fused SDPA kernel reads grouped key/value heads as they are.

    On CUDA only flash attention does (Ampere or later, 16 bit, no mask, D <= 256). Without it SDPA would fall back
    to the kernel that holds all scores, which costs more than repeating heads.
    """
    if query.device.type != "cuda":
        return True
    has_flash = has_ampere(query) and torch.backends.cuda.flash_sdp_enabled()
    return has_flash and mask is None and query.element_size() == 2 and query.shape[-1] <= 256


def has_ampere(x: torch.Tensor) -> bool:
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


class Kernel(NamedTuple):
    """forward(query, key, value, ...) -> output [B, H, Q, D], lse [B, H, Q or more], ...; backward(gradient, query,
    key, value, output, lse, ...) -> gradients of query, key and value; both take is_causal and scale."""

    forward: Callable
    backward: Callable
    has_gqa: bool
    head_dim_multiple: int = 1


def attend(query, key, value, *, is_causal: bool, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all queries to all keys; causal only for Q == S, since kernels differ in the alignment otherwise.

    query [B, H, Q, D]; key and value [B, K, S, D]; one dtype. Returns the output [B, H, Q, D] in that dtype
    and the natural log-sum-exp of the scaled scores [B, H, Q] in fp32 (fp64 for fp64). Keeps no graph.
    """
    kernel, num_queries, head_dim = choose_kernel(query, value), query.shape[2], value.shape[-1]
    layout = head_layout(kernel, query, key, is_causal=is_causal)
    if layout == "fold":
        query = rearrange(query, FOLD, k=key.shape[1])
    if layout == "repeat":
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    output, lse, *_ = kernel.forward(*fit_kernel(kernel, query, key, value), is_causal=is_causal, scale=scaling)
    lse = lse[..., : query.shape[2]]
    if layout == "fold":
        output, lse = (rearrange(x, UNFOLD, q=num_queries) for x in (output, lse))
    return output[..., :head_dim], lse


def attend_backward(
    gradient, query, key, value, output, lse, *, is_causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value for that of the output [B, H, Q, D]; output and lse are those of whole rows."""
    kernel, num_queries, num_kv_heads = choose_kernel(query, value), query.shape[2], key.shape[1]
    layout, head_dims = head_layout(kernel, query, key, is_causal=is_causal), [x.shape[-1] for x in (query, key, value)]
    if layout == "fold":
        gradient, query, output, lse = (rearrange(x, FOLD, k=num_kv_heads) for x in (gradient, query, output, lse))
    if layout == "repeat":
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    inputs = fit_kernel(kernel, gradient, query, key, value, output)
    grads = kernel.backward(*inputs, lse, is_causal=is_causal, scale=scaling)
    grad_query, *grads = (x[..., :head_dim] for x, head_dim in zip(grads, head_dims, strict=True))
    if layout == "fold":
        grad_query = rearrange(grad_query, UNFOLD, q=num_queries)
    if layout == "repeat":
        grads = [rearrange(x, "b (k r) s d -> b k r s d", k=num_kv_heads).sum(dim=2) for x in grads]
    return grad_query, *grads


def fit_kernel(kernel: Kernel, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Head dims adjacent in memory and padded to the kernel's multiple: zeros change no score and no output."""
    missing = -tensors[0].shape[-1] % kernel.head_dim_multiple
    if missing:
        return [F.pad(x, (0, missing)) for x in tensors]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def head_layout(kernel: Kernel, query: torch.Tensor, key: torch.Tensor, *, is_causal: bool) -> str:
    """How query heads that share a key/value head reach the kernel.

    Without a causal mask they are further rows of that head ("fold"): needed where the kernel takes no grouped heads,
    and faster for a single token, whose keys are then read once. Under a causal mask keys are repeated ("repeat").
    """
    if query.shape[1] == key.shape[1] or (kernel.has_gqa and (is_causal or query.shape[2] > 1)):
        return "as it is"
    return "repeat" if is_causal else "fold"


def repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def fold_groups(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[B, H, N * G, ...] -> [B * N, H, G, ...], equal groups as rows of the batch; a view for one batch row."""
    return x if num_groups == 1 else rearrange(x, "b h (n g) ... -> (b n) h g ...", n=num_groups)


def unfold_groups(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[B * N, H, G, ...] -> [B, H, N * G, ...]; a view on what the kernels write, [B * N, G, H, ...] in memory."""
    return x if num_groups == 1 else rearrange(x, "(b n) h g ... -> b h (n g) ...", n=num_groups)


def choose_kernel(query: torch.Tensor, value: torch.Tensor) -> Kernel:
    """The fastest kernel for these tensors; torch's switches (`sdpa_kernel`, `enable_flash_sdp`) are obeyed."""
    switches, dtype = torch.backends.cuda, query.dtype
    if query.shape[-1] != value.shape[-1]:
        return PLAIN
    if query.device.type == "cpu" and switches.flash_sdp_enabled():
        return CPU_FLASH
    if query.device.type == "cuda" and dtype != torch.float64:
        fits_flash = has_ampere(query) and query.element_size() == 2 and query.shape[-1] <= FLASH_MAX_HEAD_DIM
        if fits_flash and switches.flash_sdp_enabled():
            return CUDA_FLASH
        if (has_ampere(query) or dtype != torch.bfloat16) and switches.mem_efficient_sdp_enabled():
            return CUDA_EFFICIENT
    return PLAIN


def cuda_flash_backward(gradient, query, key, value, output, lse, *, is_causal, scale):
    # Random state and cumulated lengths are for dropout and nested tensors; there are none.
    no_state, none = (torch.empty(size, dtype=torch.uint64, device=query.device) for size in (2, 0))
    return aten._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, output, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, is_causal,
        no_state, none, scale=scale,
    )  # fmt: skip


def cuda_efficient_backward(gradient, query, key, value, output, lse, *, is_causal, scale):
    # As the forward kernel leaves it: rows that are not there have an infinite lse, hence probability 0.
    lse = F.pad(lse, (0, -lse.shape[2] % EFFICIENT_LSE_MULTIPLE), value=math.inf).contiguous()
    no_state = torch.zeros((), dtype=torch.int64, device=query.device)
    return aten._scaled_dot_product_efficient_attention_backward(
        gradient, query, key, value, None, output, lse, no_state, no_state, 0.0, [True, True, True, False], is_causal,
        scale=scale,
    )[:3]  # fmt: skip


def plain_forward(query, key, value, *, is_causal, scale):
    key, value = (x.to(sum_dtype(x)) for x in (key, value))
    batch, num_heads, num_queries, _ = query.shape
    output = query.new_empty(batch, num_queries, num_heads, value.shape[-1]).transpose(1, 2)
    lse = key.new_empty(batch, num_heads, num_queries)
    for rows, scores in plain_scores(query, key, is_causal=is_causal, scale=scale):
        lse[:, :, rows] = scores.logsumexp(dim=-1)
        output[:, :, rows] = scores.sub_(lse[:, :, rows, None]).exp_() @ value
    return output, lse


def plain_backward(gradient, query, key, value, output, lse, *, is_causal, scale):
    dtypes = query.dtype, key.dtype, value.dtype
    key, value = (x.to(sum_dtype(x)) for x in (key, value))
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows, scores in plain_scores(query, key, is_causal=is_causal, scale=scale):
        own_gradient, own_query = gradient[:, :, rows].to(value.dtype), query[:, :, rows].to(key.dtype)
        probabilities = scores.sub_(lse[:, :, rows, None]).exp_()
        grad_value += probabilities.transpose(-1, -2) @ own_gradient
        mean = (own_gradient * output[:, :, rows]).sum(dim=-1, keepdim=True)
        grad_scores = (own_gradient @ value.transpose(-1, -2)).sub_(mean).mul_(probabilities).mul_(scale)
        grad_query[:, :, rows] = (grad_scores @ key).to(query.dtype)
        grad_key += grad_scores.transpose(-1, -2) @ own_query
    return tuple(x.to(dtype) for x, dtype in zip((grad_query, grad_key, grad_value), dtypes, strict=True))


def plain_scores(query, key, *, is_causal: bool, scale: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows, and their scaled scores [B, H, rows, S] in the dtype of key, -inf in the future if causal."""
    batch, num_heads, num_queries, _ = query.shape
    size = max(1, PLAIN_SCORES_PER_BLOCK // (batch * num_heads * key.shape[2]))
    positions = torch.arange(num_queries, device=query.device)
    for start in range(0, num_queries, size):
        rows = slice(start, min(start + size, num_queries))
        scores = (query[:, :, rows].to(key.dtype) @ key.transpose(-1, -2)).mul_(scale)
        yield rows, scores.masked_fill_(positions > positions[rows, None], -math.inf) if is_causal else scores


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which products over `x` are summed: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


CPU_FLASH = Kernel(
    aten._scaled_dot_product_flash_attention_for_cpu,
    partial(aten._scaled_dot_product_flash_attention_for_cpu_backward, dropout_p=0.0),
    has_gqa=True,
)
# Both CUDA kernels read rows of whole 16-byte words.
CUDA_FLASH = Kernel(aten._scaled_dot_product_flash_attention, cuda_flash_backward, has_gqa=True, head_dim_multiple=8)
CUDA_EFFICIENT = Kernel(
    partial(aten._scaled_dot_product_efficient_attention, attn_bias=None, compute_log_sumexp=True),
    cuda_efficient_backward, has_gqa=False, head_dim_multiple=8,
)  # fmt: skip
PLAIN = Kernel(plain_forward, plain_backward, has_gqa=False)
