"""Kernels with log-sum-exp and their merging, against dense attention in float64.

The CUDA kernels' operators, which are private to torch, are called without a GPU too, by their declared signatures, on
stand-ins that insist on what the real ones do: equal heads, padded head dims, padded rows of the log-sum-exp.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from attention_reference import assert_close, assert_same_with_gradients, causal, dense_attention, random_qkv
from live_memory import PeakMemory
from torch.nn.attention import SDPBackend, sdpa_kernel

from longqlora.attention import dual_chunk as dca
from longqlora.attention import sdpa as kernels
from longqlora.attention.dual_chunk import DualChunkSizes, dual_chunk_attention
from longqlora.attention.merged import KeyRange, QueryBlock, causal_attention_with_past, merged_attention
from longqlora.attention.sdpa import attend

aten = torch.ops.aten
KERNELS = ["cpu_flash", "plain", "cuda_flash", "cuda_efficient"]
ALL, NOTHING = slice(None), torch.empty(0)


def check_inputs(*tensors):
    """What both CUDA kernels take for granted."""
    assert all(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 for x in tensors)


def flash(query, key, value, dropout=0.0, is_causal=False, *, scale):
    check_inputs(query, key, value)
    results = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)
    return *results, NOTHING, NOTHING, 0, 0, NOTHING, NOTHING, NOTHING


def flash_backward(gradient, query, key, value, output, lse, cum_q, cum_k, max_q, max_k, dropout, is_causal,
                   seed, offset, *, scale):  # fmt: skip
    check_inputs(gradient, query, key, value, output)
    assert lse.is_contiguous() and (max_q, max_k) == (query.shape[2], key.shape[2])
    assert cum_q is None and cum_k is None and not dropout
    inputs = gradient, query, key, value, output, lse
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, 0.0, is_causal, scale=scale)


def efficient(query, key, value, attn_bias, compute_log_sumexp, dropout=0.0, is_causal=False, *, scale):
    output, lse, *_ = flash(query, key, value, is_causal=is_causal, scale=scale)
    assert query.shape[1] == key.shape[1] and attn_bias is None and compute_log_sumexp
    return output, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf), NOTHING, NOTHING


def efficient_backward(gradient, query, key, value, bias, output, lse, seed, offset, dropout, mask, is_causal=False,
                       *, scale):  # fmt: skip
    rows = query.shape[2]
    check_inputs(gradient, query, key, value, output)
    assert query.shape[1] == key.shape[1] and bias is None and not dropout and list(mask) == [True, True, True, False]
    assert lse.shape[2] == -(-rows // 32) * 32 and lse.is_contiguous() and torch.isinf(lse[:, :, rows:]).all()
    inputs = gradient, query, key, value, output, lse[:, :, :rows]
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, 0.0, is_causal, scale=scale)
    return *grads, NOTHING


@pytest.fixture(scope="module", autouse=True)
def cuda_operators():
    """The stand-ins as the operators' CPU kernels: torch checks each call against the operator's signature."""
    library, name = torch.library.Library("aten", "IMPL"), "_scaled_dot_product_{}_attention{}"
    for kind, forward, backward in (("flash", flash, flash_backward), ("efficient", efficient, efficient_backward)):
        library.impl(name.format(kind, ""), forward, "CPU")
        library.impl(name.format(kind, "_backward"), backward, "CPU")
    yield
    library._destroy()


@pytest.fixture
def use_kernel(monkeypatch):
    """Let every attention go through the kernel of that name."""

    def use(name):
        monkeypatch.setattr(kernels, "choose_kernel", lambda query, value: getattr(kernels, name.upper()))

    return use


def check_attend(tensors, *, is_causal=False, tolerance=1e-10):
    """Output, log-sum-exp and gradients of one kernel call."""
    blocks = [QueryBlock(ALL, ALL, [KeyRange(ALL, ALL, is_causal)])]
    dense = partial(dense_attention, allowed=causal(tensors[0].shape[2]) if is_causal else None, scaling=0.3)
    method = partial(merged_attention, blocks=blocks, scaling=0.3)
    assert_same_with_gradients(method, lambda *x: dense(*x)[0], tensors, tolerance)
    _, lse = attend(*(x.detach() for x in tensors), is_causal=is_causal, scaling=0.3)
    assert lse.dtype == kernels.sum_dtype(tensors[0])
    expected = dense(*(x.detach().double() for x in tensors))[1]
    assert_close(lse, expected, 1e-10 if lse.dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("num_queries,num_keys", [(1, 9), (33, 70), (37, 37), (8, 3)])
@pytest.mark.parametrize("dim", [16, 10])
def test_kernels_equal_dense_attention(use_kernel, name, heads, kv_heads, num_queries, num_keys, dim):
    """Whole and causal, for tensors of any strides."""
    use_kernel(name)
    tensors = random_qkv(num_queries, num_keys, batch=2, heads=heads, kv_heads=kv_heads, dim=dim)
    for x in (tensors, [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]):
        check_attend(x, is_causal=num_queries == num_keys)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("name", ["cpu_flash", "plain"])
def test_dtypes(use_kernel, name, dtype, tolerance):
    use_kernel(name)
    check_attend(random_qkv(20, 31, dtype=dtype), tolerance=tolerance)


@pytest.mark.parametrize("size", [1, 50, 10**6])
@pytest.mark.parametrize("num_keys", [13, 21])
def test_plain_kernel_in_blocks_of_any_size(use_kernel, monkeypatch, size, num_keys):
    monkeypatch.setattr(kernels, "PLAIN_SCORES_PER_BLOCK", size)
    use_kernel("plain")
    check_attend(random_qkv(13, num_keys), is_causal=num_keys == 13)


def test_autocast_does_not_reach_into_the_plain_kernel():
    """Its products are summed in fp32 whatever autocast is set to, forward and backward."""
    results = []
    for is_enabled in (False, True):
        tensors = random_qkv(9, 30, dtype=torch.bfloat16)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            output = causal_attention_with_past(*tensors)
            results.append([output, *torch.autograd.grad(output.float().square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_kernel_is_chosen_by_device_dtype_and_switch(monkeypatch):
    def chosen(dtype, dim=16, value_dim=None, device="cuda"):
        sizes = {"dtype": dtype, "device": torch.device(device), "element_size": lambda: dtype.itemsize}
        states = (SimpleNamespace(shape=(1, 2, 3, n), **sizes) for n in (dim, value_dim or dim))
        kernel = kernels.choose_kernel(*states)
        return next(name for name in KERNELS if getattr(kernels, name.upper()) is kernel)

    half, full, bf16, double = torch.float16, torch.float32, torch.bfloat16, torch.float64
    assert chosen(double, device="cpu") == "cpu_flash" and chosen(double, device="meta") == "plain"
    assert chosen(double, value_dim=8, device="cpu") == "plain"
    with sdpa_kernel(SDPBackend.MATH):
        assert chosen(double, device="cpu") == "plain"
    ampere = {half: "cuda_flash", bf16: "cuda_flash", full: "cuda_efficient", double: "plain"}
    volta = {half: "cuda_efficient", full: "cuda_efficient", bf16: "plain", double: "plain"}
    for capability, expected in (((8, 0), ampere), ((9, 0), ampere), ((7, 0), volta)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        for dtype, name in expected.items():
            without_flash = name.replace("cuda_flash", "cuda_efficient")
            assert (chosen(dtype, 128), chosen(dtype, 256)) == (name, without_flash)
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                assert chosen(dtype, 128) == without_flash


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("num_queries,num_keys", [(0, 5), (1, 1), (1, 23), (5, 23), (22, 23), (23, 23)])
def test_causal_attention_with_past(num_queries, num_keys, kv_heads):
    for scaling in (0.2, None):
        assert_same_with_gradients(
            partial(causal_attention_with_past, scaling=scaling),
            lambda *x, scaling=scaling: dense_attention(*x, causal(num_queries, num_keys), scaling)[0],
            random_qkv(num_queries, num_keys, batch=2, kv_heads=kv_heads),
        )


def test_rows_of_no_block_are_zero_and_key_ranges_of_some_rows_merge():
    tensors = random_qkv(9, 12, batch=2)
    key_ranges = [KeyRange(slice(0, 6), slice(0, 4)), KeyRange(slice(3, 6), slice(7, 12))]
    named = torch.zeros(2, 1, 9, 1)
    named[1, :, 2:8] = 1
    allowed = (named == 0).repeat(1, 4, 1, 12)
    allowed[1, :, 2:8, :4] = allowed[1, :, 5:8, 7:] = True
    method = partial(merged_attention, blocks=[QueryBlock(slice(1, 2), slice(2, 8), key_ranges)], scaling=0.3)
    assert not method(*tensors)[(named == 0).expand(-1, 4, -1, 16)].any()
    assert_same_with_gradients(method, lambda *x: dense_attention(*x, allowed, scaling=0.3)[0], tensors, rows=named)


@pytest.mark.parametrize("num_queries,num_keys,limit", [(16, 480, 3), (960, 16, 1.5)])
def test_many_key_ranges_and_blocks_in_bf16_are_as_exact_as_one(num_queries, num_keys, limit):
    """Partial results, and gradients of keys that many blocks read, are kept in fp32."""
    tensors = random_qkv(num_queries, num_keys, heads=2, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = dense_attention(*exact, scaling=0.3)[0]
    theirs, errors = torch.autograd.grad(expected.sum(), exact), []
    for size in (max(num_queries, num_keys), 16):
        keys = [slice(start, min(start + size, num_keys)) for start in range(0, num_keys, size)]
        rows = [slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]
        blocks = [QueryBlock(ALL, block, [KeyRange(ALL, span) for span in keys]) for block in rows]
        output = merged_attention(*tensors, blocks, scaling=0.3)
        ours = torch.autograd.grad(output.double().sum(), tensors)
        errors.append([(a - b).abs().mean().item() for a, b in zip([output, *ours], [expected, *theirs], strict=True)])
    assert all(many <= limit * one for one, many in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("rows,limit", [(8192, 1.4), (640, 0.5)])
def test_memory_is_linear_and_small(monkeypatch, kv_heads, rows, limit):
    """Beside q, k and v of as many heads: one block of all rows, and several blocks. No [S, S] anywhere."""
    monkeypatch.setattr(dca, "ROWS_PER_BLOCK", rows)
    sizes, inv_freq = DualChunkSizes(128), 0.9 ** torch.arange(32)
    for length in (2048, 4096):
        tensors = [x.detach() for x in random_qkv(length, heads=8, kv_heads=kv_heads, dim=64, dtype=torch.float32)]
        with torch.no_grad(), PeakMemory(torch.device("cpu")) as memory:
            dual_chunk_attention(*tensors, inv_freq=inv_freq, sizes=sizes)
        ratio = memory.peak_bytes / (3 * tensors[0].nbytes)
        assert ratio <= limit * (1 if length == 4096 else 2), ratio
