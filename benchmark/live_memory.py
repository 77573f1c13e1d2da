"""Peak extra memory of a piece of code: exact tensor bytes on a CPU, the allocator's count on a GPU.

    with PeakMemory(device) as memory:
        loss.backward()
    memory.peak_bytes

On a CPU every storage that an operation returns is counted from then until it is freed, in the forward
and in the backward pass. Scratch space inside a kernel is not seen there. On a CPU without bf16 instructions 16-bit
products are computed in fp32 meanwhile, which changes their time and not the count.
"""

import weakref
from contextlib import ExitStack

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from longqlora.device import cpu_has_bf16, free_host_memory

PRODUCTS = {
    getattr(torch.ops.aten, name)
    for name in ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu",
                 "_scaled_dot_product_flash_attention_for_cpu_backward")
}  # fmt: skip


class LiveStorages(TorchDispatchMode):
    """Bytes of the CPU storages made inside the block: `live_bytes` now, `peak_bytes` at the highest.

    Views and in-place results share a storage and count once. Tensors made before the block do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        outputs = function(*args, **(kwargs or {}))
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor) and id(x.untyped_storage()) not in known:
                self.add(x.untyped_storage())
        return outputs

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.storages:
            return
        self.storages.add(storage)
        num_bytes = storage.nbytes()
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self.remove, num_bytes).atexit = False

    def remove(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


class ProductsInFp32(TorchDispatchMode):
    """Computes 16-bit matrix products and attention on a CPU in fp32; the results keep their dtypes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        narrow = {x.dtype for x in args if isinstance(x, torch.Tensor)} & {torch.bfloat16, torch.float16}
        if function.overloadpacket not in PRODUCTS or not narrow:
            return function(*args, **kwargs)
        (dtype,) = narrow
        wide_args, wide_kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        outputs = function(*wide_args, **wide_kwargs)
        if "out" in kwargs:
            return kwargs["out"].copy_(outputs)
        # Attention's log-sum-exp [B, S, H] is fp32 whatever its inputs are.
        return tree_map_only(torch.Tensor, lambda x: x if x.dim() == 3 and x is not outputs else x.to(dtype), outputs)


class PeakMemory:
    """Context manager; `peak_bytes` is the most memory held at once above what was held at its start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.modes = ExitStack()
            if not cpu_has_bf16():
                # Below the tracker, so that it does not see the fp32 tensors: the bytes are those of 16-bit products.
                self.modes.enter_context(ProductsInFp32())
            self.tracker = self.modes.enter_context(LiveStorages())
        return self

    def __exit__(self, *error) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            self.modes.__exit__(*error)
            self.peak_bytes = self.tracker.peak_bytes


def check_free_memory(num_bytes: int, device: torch.device) -> None:
    """Raise MemoryError where a CPU has less free memory than `num_bytes`; a GPU refuses by itself."""
    if device.type == "cpu" and num_bytes > free_host_memory():
        raise MemoryError(f"{num_bytes} bytes are more than is free")
