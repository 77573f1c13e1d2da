"""Our calls of torch's CUDA kernels, on fake CUDA tensors: the operators' own signatures and shapes, without a GPU.

S2-Attn's groups and full attention as the layer function calls them, merged attention, grouped heads, packed rows.
Values are for test_kernels.py, with stand-ins, and for test_gpu.py.
"""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from longqlora.attention import sdpa
from longqlora.attention.dual_chunk import DualChunkSizes, dual_chunk_attention
from longqlora.attention.inplace_attention import CausalPattern, attention_backward, attention_forward
from longqlora.attention.merged import causal_attention_with_past

B, S, D = 2, 300, 128
# dtype, whether the GPU is an Ampere, and the kernel that this takes: V100, A100, A100 in fp32.
GPUS = {
    "V100": (torch.float16, False, "efficient"),
    "A100": (torch.bfloat16, True, "flash"),
    "A100-fp32": (torch.float32, True, "efficient"),
}


class Calls(TorchDispatchMode):
    """Attention's operators get fake CUDA tensors, others fake CPU tensors: all that torch without CUDA can index."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, inputs = function.overloadpacket.__name__, (args, kwargs or {})
        if "dot_product" not in name:
            return function(*args, **inputs[1])
        self.names.add(name)
        args, kwargs = tree_map_only(torch.Tensor, partial(moved, device="cuda"), inputs)
        outputs = function(*args, **kwargs)
        assert all(x.is_cuda for x in outputs[:2])
        return tree_map_only(torch.Tensor, partial(moved, device="cpu"), outputs)


def moved(x: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


@pytest.fixture(params=GPUS.values(), ids=GPUS)
def fake(request, monkeypatch):
    """Makes fake tensors for one GPU; at the end its kernel must have run forward and backward, no other."""
    dtype, is_ampere, kernel = request.param
    choose = sdpa.choose_kernel
    monkeypatch.setattr(sdpa, "has_ampere", lambda _: is_ampere)
    monkeypatch.setattr(sdpa, "choose_kernel", lambda *inputs: choose(*(moved(x, "cuda") for x in inputs)))
    with FakeTensorMode(), Calls() as calls:
        yield lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype)
    name = f"_scaled_dot_product_{kernel}_attention"
    assert calls.names == {name, f"{name}_backward"}


PACKED = ((100, 200), (300,))


@pytest.mark.parametrize(
    "heads,kv_heads,dim,group_size,lengths",
    [(8, 8, D, None, None), (8, 2, D, None, PACKED), (8, 2, D, 64, None), (6, 2, 60, 64, PACKED), (2, 1, D, 64, None)],
)
def test_attention_of_the_layer_function(fake, heads, kv_heads, dim, group_size, lengths):
    pattern = CausalPattern(group_size, heads, lengths)
    query, output, gradient = (fake(B, S, heads, dim) for _ in range(3))
    key, value, lse = fake(B, S, kv_heads, dim), fake(B, S, kv_heads, dim), fake(B, heads, S, dtype=torch.float32)
    options = {"pattern": pattern, "first_head": 0, "scaling": 1.0}
    attention_forward(query, key, value, output, lse, **options)
    grads = attention_backward(gradient, query, key, value, output, lse, **options)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (query, key, value)]


def dual_chunk(query, key, value):
    sizes = DualChunkSizes(64, chunk_size=48, local_window=16)
    return dual_chunk_attention(query, key, value, inv_freq=torch.empty(D // 2), sizes=sizes)


@pytest.mark.parametrize("attend", [dual_chunk, lambda *x: causal_attention_with_past(x[0][:, :, 100:], *x[1:])])
@pytest.mark.parametrize("heads,kv_heads", [(8, 8), (8, 2)])
def test_merged_attention(fake, attend, heads, kv_heads):
    """Dual chunk attention, and a block of queries against a key/value cache."""
    inputs = [fake(B, num_heads, S, D).requires_grad_() for num_heads in (heads, kv_heads, kv_heads)]
    output = attend(*inputs)
    grads = torch.autograd.grad(output, inputs, torch.empty_like(output))
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in inputs]
