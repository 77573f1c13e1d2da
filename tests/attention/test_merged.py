"""Kernels with log-sum-exp and the merging of parts, against dense attention in float64; GPU kernels against the CPU.

The CUDA kernels' calls are checked without a GPU against their declared signatures (meta tensors) and against
stand-ins that insist on what the real ones do: equal heads, padded head dims, padded rows of the log-sum-exp.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from live_memory import PeakMemory
from torch.nn.attention import SDPBackend, sdpa_kernel

from longqlora.attention import dual_chunk as dca
from longqlora.attention import sdpa as kernels
from longqlora.attention.dual_chunk import DualChunkSizes, dual_chunk_attention
from longqlora.attention.merged import Block, Part, causal_attention_with_past, merged_attention
from longqlora.attention.sdpa import attend, attend_backward
from longqlora.attention.shift_short import causal_attention

CPU_KERNELS = ["cpu_flash", "plain", "cuda_flash", "cuda_efficient"]
HAS_CUDA = torch.cuda.is_available()
gpu = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device, and torch.cuda.is_available() is false")


def dense(query, key, value, scaling, allowed=None):
    """Output and log-sum-exp, from all scores; allowed: bool [Q, S]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    scores = scores if allowed is None else scores.masked_fill(~allowed, -math.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def last_rows(num_queries, num_keys):
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)


def inputs(num_queries, num_keys, heads=4, kv_heads=2, dim=16, batch=2, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, n, h, dim) for n, h in ((num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads))]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(device, dtype).transpose(1, 2).requires_grad_() for x in tensors]


def assert_close(ours, expected, tolerance=1e-10):
    assert ours.shape == expected.shape
    assert torch.allclose(ours.double().cpu(), expected.double().cpu(), rtol=0, atol=tolerance)


def flash(query, key, value, dropout, is_causal, debug, *, scale):
    """What torch's CUDA flash operator asks for and returns, on a CPU."""
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.shape[-1] % 8 == 0 and not dropout and not debug
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, scale=scale
    )
    return output, lse, None, None, 0, 0, None, None, None


def flash_backward(gradient, query, key, value, output, lse, cum_q, cum_k, max_q, max_k, dropout, is_causal,
                   seed, offset, *, scale):  # fmt: skip
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.shape[-1] % 8 == 0 and lse.is_contiguous() and (max_q, max_k) == (query.shape[2], key.shape[2])
    assert cum_q is None and cum_k is None and not dropout
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, output, lse, 0.0, is_causal, scale=scale
    )


def efficient(query, key, value, bias, with_lse, dropout, is_causal, *, scale):
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.shape[1] == key.shape[1] and query.shape[-1] % 8 == 0 and bias is None and with_lse and not dropout
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, scale=scale
    )
    return output, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf), None, None


def efficient_backward(gradient, query, key, value, bias, output, lse, seed, offset, dropout, mask, is_causal,
                       *, scale):  # fmt: skip
    rows = query.shape[2]
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.shape[1] == key.shape[1] and query.shape[-1] % 8 == 0 and bias is None and not dropout
    assert lse.shape[2] == -(-rows // 32) * 32 and lse.is_contiguous() and torch.isinf(lse[:, :, rows:]).all()
    assert mask == [True, True, True, False]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, output, lse[:, :, :rows], 0.0, is_causal, scale=scale
    )
    return *grads, None


@pytest.fixture
def use_kernel(monkeypatch):
    """Make every attention go through the kernel of that name, the CUDA ones by stand-ins."""

    def use(name):
        stand_ins = SimpleNamespace(
            _scaled_dot_product_flash_attention=flash,
            _scaled_dot_product_flash_attention_backward=flash_backward,
            _scaled_dot_product_efficient_attention=efficient,
            _scaled_dot_product_efficient_attention_backward=efficient_backward,
        )
        if name.startswith("cuda"):
            monkeypatch.setattr(kernels, "aten", stand_ins)
        monkeypatch.setattr(kernels, "choose_kernel", lambda query, value: getattr(kernels, name.upper()))

    return use


@pytest.mark.parametrize("name", CPU_KERNELS)
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    "num_queries,num_keys,is_causal", [(1, 9, False), (33, 70, False), (37, 37, True), (8, 3, False)]
)
@pytest.mark.parametrize("dim", [16, 10])
def test_attend_forward_and_backward(use_kernel, name, heads, kv_heads, num_queries, num_keys, is_causal, dim):
    use_kernel(name)
    tensors = inputs(num_queries, num_keys, heads, kv_heads, dim)
    allowed = last_rows(num_queries, num_keys) if is_causal else None
    expected, expected_lse = dense(*tensors, 0.3, allowed)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.autograd.grad(expected, tensors, gradient)
    query, key, value = (x.detach() for x in tensors)
    output, lse = attend(query, key, value, is_causal=is_causal, scaling=0.3)
    assert_close(output, expected)
    assert_close(lse, expected_lse)
    grads = attend_backward(gradient, query, key, value, output, lse, is_causal=is_causal, scaling=0.3)
    for ours, theirs in zip(grads, exact, strict=True):
        assert_close(ours, theirs, 1e-9)


@pytest.mark.parametrize("name", CPU_KERNELS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_dual_chunk_attention_on_every_kernel(use_kernel, name, kv_heads):
    """All of them give one result and one gradient, within rounding."""
    sizes, inv_freq = DualChunkSizes(16), 0.9 ** torch.arange(5, dtype=torch.float64)
    results = []
    for kernel in ("cpu_flash", name):
        use_kernel(kernel)
        tensors = inputs(33, 43, 4, kv_heads, dim=10)
        output = dual_chunk_attention(*tensors, inv_freq=inv_freq, sizes=sizes)
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    for ours, theirs in zip(*reversed(results), strict=True):
        assert_close(ours, theirs, 1e-9)


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_any_strides_are_taken(use_kernel, name):
    use_kernel(name)
    tensors = [x.detach().transpose(2, 3).contiguous().transpose(2, 3) for x in inputs(7, 9)]
    output, lse = attend(*tensors, is_causal=False, scaling=0.3)
    assert_close(output, dense(*tensors, 0.3)[0])
    gradient = output.transpose(2, 3).contiguous().transpose(2, 3)
    packed = [x.contiguous() for x in tensors]
    grads = attend_backward(gradient, *tensors, gradient, lse, is_causal=False, scaling=0.3)
    for ours, theirs in zip(
        grads, attend_backward(output, *packed, output, lse, is_causal=False, scaling=0.3), strict=True
    ):
        assert_close(ours, theirs)


def test_autocast_does_not_reach_into_the_plain_kernel():
    """Its products are summed in fp32 whatever autocast is set to, forward and backward."""
    results = []
    for is_enabled in (False, True):
        tensors = inputs(9, 30, dtype=torch.bfloat16)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            output = causal_attention_with_past(*tensors)
            results.append([output, *torch.autograd.grad(output.float().square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("size", [1, 50, 10**6])
def test_plain_kernel_in_blocks_of_any_size(monkeypatch, size):
    monkeypatch.setattr(kernels, "PLAIN_SCORES_PER_BLOCK", size)
    with sdpa_kernel(SDPBackend.MATH):
        for allowed, num_keys in ((last_rows(13, 13), 13), (None, 21)):
            tensors = [x.detach() for x in inputs(13, num_keys)]
            output, lse = attend(*tensors, is_causal=allowed is not None, scaling=0.3)
            expected, expected_lse = dense(*tensors, 0.3, allowed)
            assert_close(output, expected)
            assert_close(lse, expected_lse)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("name", ["cpu_flash", "plain"])
def test_dtypes(use_kernel, name, dtype, tolerance):
    use_kernel(name)
    tensors = [x.detach() for x in inputs(20, 31, dtype=dtype)]
    output, lse = attend(*tensors, is_causal=False, scaling=0.3)
    expected, expected_lse = dense(*(x.double() for x in tensors), 0.3)
    assert output.dtype == dtype and lse.dtype == torch.float32
    assert_close(output, expected, tolerance)
    assert_close(lse, expected_lse, 1e-4)
    grads = attend_backward(output, *tensors, output, lse, is_causal=False, scaling=0.3)
    assert all(x.dtype == dtype for x in grads)


def test_the_kernel_is_chosen_by_device_dtype_and_switch(monkeypatch):
    query, _, value = inputs(2, 2)
    assert kernels.choose_kernel(query, value) is kernels.CPU_FLASH
    assert kernels.choose_kernel(query, value[..., :8]) is kernels.PLAIN
    with sdpa_kernel(SDPBackend.MATH):
        assert kernels.choose_kernel(query, value) is kernels.PLAIN
    assert kernels.choose_kernel(query.to("meta"), value.to("meta")) is kernels.PLAIN
    half, full, bf16, double = torch.float16, torch.float32, torch.bfloat16, torch.float64
    ampere = {half: "cuda_flash", bf16: "cuda_flash", full: "cuda_efficient", double: "plain"}
    volta = {half: "cuda_efficient", full: "cuda_efficient", bf16: "plain", double: "plain"}
    for capability, expected in (((8, 0), ampere), ((9, 0), ampere), ((7, 0), volta)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        for dtype, name in expected.items():
            fake = SimpleNamespace(
                dtype=dtype, shape=(1, 2, 3, 128), device=torch.device("cuda"), element_size=lambda d=dtype: d.itemsize
            )
            assert kernels.choose_kernel(fake, fake).name == name
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                assert kernels.choose_kernel(fake, fake).name == name.replace("flash", "efficient")
            fake.shape = (1, 2, 3, 256)
            assert kernels.choose_kernel(fake, fake).name == name.replace("flash", "efficient")


def test_heads_of_a_group_share_one_reading_of_the_keys():
    several, one, key = (torch.empty(1, 4, 5, 8), torch.empty(1, 4, 1, 8), torch.empty(1, 2, 5, 8))
    layouts = [
        kernels.head_layout(kernel, query, key, is_causal)
        for kernel in (kernels.CPU_FLASH, kernels.CUDA_EFFICIENT)
        for query, is_causal in ((one, False), (several, False), (several, True))
    ]
    assert layouts == ["fold", "as it is", "as it is", "fold", "fold", "repeat"]
    assert kernels.head_layout(kernels.PLAIN, one, key.repeat(1, 2, 1, 1), False) == "as it is"


@pytest.mark.parametrize("kernel", [kernels.CUDA_FLASH, kernels.CUDA_EFFICIENT], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dim", [64, 20])
def test_calls_fit_the_signatures_of_the_cuda_operators(kernel, dim):
    query, key, value = (x.detach() for x in inputs(40, 40, 4, 4, dim, dtype=torch.float16, device="meta"))
    output, lse = kernel.forward(query, key, value, is_causal=True, scaling=0.3)
    assert output.shape == query.shape and lse.shape == query.shape[:3] and lse.dtype == torch.float32
    grads = kernel.backward(output, query, key, value, output, lse, is_causal=True, scaling=0.3)
    assert [x.shape for x in grads] == [query.shape] * 3


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("num_queries,num_keys", [(1, 1), (1, 23), (5, 23), (22, 23), (23, 23)])
def test_causal_attention_with_past(num_queries, num_keys, kv_heads):
    tensors = inputs(num_queries, num_keys, kv_heads=kv_heads)
    output = causal_attention_with_past(*tensors, scaling=0.2)
    expected, _ = dense(*tensors, 0.2, last_rows(num_queries, num_keys))
    assert_close(output, expected)
    ours, theirs = (torch.autograd.grad(x.square().sum(), tensors) for x in (output, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-9)


def test_causal_attention_with_past_has_sdpas_scaling_and_refuses_too_many_queries():
    tensors = [x.detach() for x in inputs(5, 5)]
    whole = causal_attention(*tensors)
    assert torch.equal(causal_attention_with_past(*tensors), whole)
    assert_close(causal_attention_with_past(tensors[0][:, :, 3:], *tensors[1:]), whole[:, :, 3:])
    assert causal_attention_with_past(tensors[0][:, :, 5:], *tensors[1:]).shape == (2, 4, 0, 16)
    with pytest.raises(ValueError, match="5 queries cannot be the last of 4"):
        causal_attention_with_past(tensors[0], *(x[:, :, 1:] for x in tensors[1:]))


def test_rows_of_no_block_are_zero_and_parts_of_some_rows_merge():
    tensors = inputs(9, 12)
    blocks = [Block(slice(2, 8), [Part(slice(2, 8), slice(0, 4)), Part(slice(5, 8), slice(7, 12))], slice(1, 2))]
    allowed = torch.zeros(9, 12, dtype=torch.bool)
    allowed[2:8, :4] = allowed[5:8, 7:] = True
    output = merged_attention(*tensors, blocks, scaling=0.3)
    expected, _ = dense(*tensors, 0.3, allowed)
    assert_close(output[1, :, 2:8], expected[1, :, 2:8])
    assert not output[0].any() and not output[1, :, :2].any() and not output[1, :, 8:].any()
    output.sum().backward()
    assert not tensors[1].grad[0].any() and not tensors[1].grad[1, :, 4:7].any() and tensors[1].grad[1, :, :4].any()


def test_many_parts_in_bf16_are_as_exact_as_one():
    """Partial results are kept in fp32: thirty parts lose no more than one kernel over all keys."""
    tensors = inputs(16, 480, 2, 2, 16, 1, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    parts = [Part(slice(0, 16), slice(start, start + 16)) for start in range(0, 480, 16)]
    errors = []
    for split in ([Part(slice(0, 16), slice(0, 480))], parts):
        output = merged_attention(*tensors, [Block(slice(0, 16), split)], scaling=0.3)
        expected, _ = dense(*exact, 0.3)
        ours, theirs = (
            torch.autograd.grad(x.double().sum(), y[:1])[0] for x, y in ((output, tensors), (expected, exact))
        )
        errors.append([(output - expected).abs().max().item(), (ours - theirs).abs().max().item()])
    assert all(many <= 3 * one for one, many in zip(*errors, strict=True)), errors


def test_keys_of_many_blocks_in_bf16_get_gradients_as_exact_as_of_one():
    tensors = inputs(960, 16, 2, 2, 16, 1, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    theirs = torch.autograd.grad(dense(*exact, 0.3)[0].sum(), exact[1:])
    starts, errors = range(0, 960, 16), []
    many = [Block(slice(start, start + 16), [Part(slice(start, start + 16), slice(0, 16))]) for start in starts]
    for blocks in ([Block(slice(0, 960), [Part(slice(0, 960), slice(0, 16))])], many):
        output = merged_attention(*tensors, blocks, scaling=0.3)
        ours = torch.autograd.grad(output.double().sum(), tensors[1:])
        errors.append([(a - b).abs().mean().item() for a, b in zip(ours, theirs, strict=True)])
    assert all(split <= 1.5 * one for one, split in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("rows,limit", [(8192, 1.4), (640, 0.5)])
def test_memory_is_linear_and_small(monkeypatch, kv_heads, rows, limit):
    """Beside q, k and v of as many heads: one block of all rows, and several blocks. No [S, S] anywhere."""
    monkeypatch.setattr(dca, "ROWS_PER_BLOCK", rows)
    sizes, inv_freq = DualChunkSizes(128), 0.9 ** torch.arange(32)
    for length in (2048, 4096):
        tensors = [x.detach() for x in inputs(length, length, 8, kv_heads, 64, 1, torch.float32)]
        with torch.no_grad(), PeakMemory(torch.device("cpu")) as memory:
            dual_chunk_attention(*tensors, inv_freq=inv_freq, sizes=sizes)
        ratio = memory.peak_bytes / (3 * tensors[0].nbytes)
        assert ratio <= limit * (1 if length == 4096 else 2), ratio


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kv_heads,dim", [(8, 64), (2, 128), (1, 40), (4, 20)])
def test_gpu_kernels_agree_with_the_cpu_in_float64(backend, dtype, tolerance, kv_heads, dim):
    """Every switch leads to a kernel that runs (plain where torch has none), forward and backward."""
    sizes, results = DualChunkSizes(256), []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        tensors = [
            x.detach().to(dtype).to(device, kind).requires_grad_()
            for x in inputs(900, 1003, 8, kv_heads, dim, dtype=torch.float32)
        ]
        inv_freq = 10000.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
        with sdpa_kernel([backend] if device == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            output = dual_chunk_attention(*tensors, inv_freq=inv_freq, sizes=sizes)
            gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            output.backward(gradient.to(dtype).to(device, kind))
        results.append([output, *(x.grad for x in tensors)])
    for ours, theirs in zip(*results, strict=True):
        error = (ours.double().cpu() - theirs).abs().max() / theirs.abs().max()
        assert error <= tolerance, error
