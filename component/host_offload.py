"""Tensors in host memory between forward and backward pass, copied beside the computation.

    store = HostOffload(device)
    handle = store.put([x, y])     # forward: x and y may be dropped right after
    x, y = store.get(handle)       # backward: handles come back in reverse order, the next is fetched meanwhile

Host blocks are pinned at their exact size (torch's own pinned allocator rounds each up to a power of two) and
used again by the next step. On a CPU tensors stay where they are.
"""

import warnings
import weakref
from collections.abc import Sequence

import torch

from component.device_memory import GIB, free_host_memory


class Handle:
    """Tensors that were put together: their copies on the host and, once fetched, the tensors on the device."""

    def __init__(self, store: "HostOffload", hosts: list[torch.Tensor], before: "Handle | None"):
        self.store, self.hosts, self.fetched = store, hosts, None
        # A step that was given up leaves no chain of handles behind.
        self.before = weakref.ref(before) if before is not None else lambda: None
        self.copied = self.arrived = None

    def __del__(self) -> None:
        self.store.recycle(self)


class HostOffload:
    """For one thread. On their way to the device are at most the tensors asked for and those put before them."""

    def __init__(self, device: torch.device):
        self.device, self.is_pinned, self.blocks = device, True, {}
        self.last = lambda: None
        if device.type == "cuda":
            self.to_host, self.to_device = (torch.cuda.Stream(device) for _ in range(2))

    def put(self, tensors: Sequence[torch.Tensor]) -> Handle:
        """Begin to copy `tensors` to the host."""
        if self.device.type != "cuda":
            return Handle(self, list(tensors), None)
        tensors = [tensor.contiguous() for tensor in tensors]
        handle = Handle(self, [self.host_tensor(tensor) for tensor in tensors], self.last())
        self.to_host.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.to_host):
            for host, tensor in zip(handle.hosts, tensors, strict=True):
                host.copy_(tensor, non_blocking=self.is_pinned)
                # Its memory may not be given to another tensor before the copy is done.
                tensor.record_stream(self.to_host)
            handle.copied = self.to_host.record_event()
        self.last = weakref.ref(handle)
        return handle

    def get(self, handle: Handle) -> list[torch.Tensor]:
        """The tensors on the device, ready for the current stream; begins to fetch those put before them. Once only."""
        if self.device.type != "cuda":
            return handle.hosts
        self.fetch(handle)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(handle.arrived)
        tensors, handle.fetched = handle.fetched, None
        for tensor in tensors:
            tensor.record_stream(stream)
        before = handle.before()
        if before is not None:
            self.fetch(before)
        return tensors

    def fetch(self, handle: Handle) -> None:
        if handle.fetched is not None:
            return
        with torch.cuda.stream(self.to_device):
            self.to_device.wait_event(handle.copied)
            handle.fetched = [host.to(self.device, non_blocking=self.is_pinned) for host in handle.hosts]
            handle.arrived = self.to_device.record_event()

    def host_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Host memory of the shape and dtype of `tensor`: a free block of exactly this size, or a new one."""
        free = self.blocks.setdefault(tensor.nbytes, [])
        block = free.pop() if free else self.new_block(tensor.nbytes)
        return block.view(tensor.dtype).view(tensor.shape)

    def new_block(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], registered with CUDA; pageable, with a warning, where that is refused."""
        free = free_host_memory()
        if free is not None and num_bytes > free:
            raise ValueError(
                f"offload_activations: {num_bytes / GIB:.1f} GiB more of host memory are needed, {free / GIB:.1f} GiB "
                "are free; lower max_seq_length, or set keep_activations: input"
            )
        block = torch.empty(num_bytes, dtype=torch.uint8)
        if self.is_pinned and not register(block):
            self.is_pinned = False
            warnings.warn(
                "offload_activations: host memory cannot be pinned (ulimit -l); copies will wait", stacklevel=2
            )
        return block

    def recycle(self, handle: Handle) -> None:
        """Take back the blocks of a handle that nobody holds any more."""
        for event in (handle.copied, handle.arrived):
            if event is not None:
                event.synchronize()
        if self.device.type == "cuda":
            for host in handle.hosts:
                self.blocks.setdefault(host.nbytes, []).append(host.view(-1).view(torch.uint8))


def register(block: torch.Tensor) -> bool:
    """Pin the memory of `block`, as it is; whether that was possible."""
    return int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0)) == 0
