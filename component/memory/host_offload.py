"""Tensors in host memory between forward and backward pass, copied while the GPU computes.

    store = HostOffload(device)
    handle = store.put([x, y])     # forward: x and y may be dropped right after
    x, y = store.get(handle)       # backward: handles come back in reverse order, the next is fetched meanwhile

Device memory is given back and taken in the order of the stream that computes, never by when a copy happens to
be done: what was put stays until the next put, what is fetched waits for the work before it. So the device
holds the tensors of two layers, however far the CPU runs ahead, and nothing waits on the CPU.
(torch's `save_on_cpu` copies on the computing stream, which waits.)

Pure maths: knows nothing of Hugging Face.
"""

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from longqlora.device import GIB, free_host_memory


@dataclass(eq=False)
class Handle:
    """Tensors that were put together.

    hosts: their copies, complete at the event `copied`. present: the tensors on the device, before they leave and
    once they are fetched, then complete at the event `arrived`. before: a weak reference to the handle put before,
    so that a step that was given up leaves no chain of them behind.
    """

    store: "HostOffload"
    hosts: list[torch.Tensor]
    present: list[torch.Tensor] | None
    before: Callable[[], "Handle | None"]
    copied: torch.cuda.Event | None = None
    arrived: torch.cuda.Event | None = None

    def __del__(self) -> None:
        """Give the host blocks back to the store."""
        used = self.arrived or self.copied
        if used is None:
            return
        if self.present is not None:
            # Given up on the way: its device memory is the computing stream's again, which may not overtake the copy.
            torch.cuda.current_stream(self.store.device).wait_event(used)
        for host in self.hosts:
            self.store.blocks[host.nbytes].append(host.view(-1).view(torch.uint8))


class HostOffload:
    """For one thread at a time. On the GPU are at most the tensors asked for and those put before or after them."""

    def __init__(self, device: torch.device):
        self.device, self.is_pinned = device, True
        # Free host blocks by size. The computing stream has waited for their last copies, and others wait for it.
        self.blocks: dict[int, list[torch.Tensor]] = defaultdict(list)
        self.last = lambda: None
        self.to_host, self.to_device = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.registered: list[torch.Tensor] = []
        # Not at the end of the process: that frees them all.
        weakref.finalize(self, unregister, self.registered).atexit = False

    def put(self, tensors: Sequence[torch.Tensor]) -> Handle:
        """Begin to copy `tensors` to the host."""
        tensors, before = [tensor.contiguous() for tensor in tensors], self.last()
        handle = Handle(self, [self.host_tensor(tensor) for tensor in tensors], tensors, self.last)
        handle.copied = self.copy(self.to_host, handle.hosts, tensors)
        if before is not None and before.present is not None:
            torch.cuda.current_stream(self.device).wait_event(before.copied)
            before.present = None
        self.last = weakref.ref(handle)
        return handle

    def get(self, handle: Handle) -> list[torch.Tensor]:
        """The tensors on the device, ready for the current stream; begins to fetch those put before them. Once only."""
        self.fetch(handle)
        # What has not left the device yet may be written to once its copy is done.
        torch.cuda.current_stream(self.device).wait_event(handle.arrived or handle.copied)
        tensors, handle.present = handle.present, None
        before = handle.before()
        if before is not None:
            self.fetch(before)
        return tensors

    def fetch(self, handle: Handle) -> None:
        """Begin to copy back what is not on the device."""
        if handle.present is None:
            # This memory is the computing stream's: what that did before, with it and with the host's, must be over.
            handle.present = [torch.empty_like(host, device=self.device) for host in handle.hosts]
            handle.arrived = self.copy(self.to_device, handle.present, handle.hosts)

    def copy(self, stream: torch.cuda.Stream, targets: list, sources: list) -> torch.cuda.Event:
        """Begin to copy on `stream`, behind the work that is queued now; returns the event at which it is done."""
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=self.is_pinned)
            return stream.record_event()

    def host_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Host memory of the shape and dtype of `tensor`: a free block of exactly this size, or a new one, pinned.

        torch's own pinned allocator rounds sizes up to powers of two. Where CUDA refuses to pin, memory is pageable
        from then on, with a warning.
        """
        if self.blocks[tensor.nbytes]:
            block = self.blocks[tensor.nbytes].pop()
        elif tensor.nbytes > (free := free_host_memory()):
            needed = f"{tensor.nbytes / GIB:.1f} GiB more of host memory are needed, {free / GIB:.1f} GiB are free"
            raise ValueError(f"offload_activations: {needed}; lower max_seq_length, or set keep_activations: input")
        else:
            block = torch.empty(tensor.nbytes, dtype=torch.uint8)
            if self.is_pinned and register(block):
                self.registered.append(block)
            elif self.is_pinned:
                self.is_pinned, text = False, "host memory cannot be pinned (ulimit -l), copies wait"
                warnings.warn(f"offload_activations: {text}", stacklevel=2)
        return block.view(tensor.dtype).view(tensor.shape)


def register(block: torch.Tensor) -> bool:
    """Pin the memory of `block`, as it is; whether that was possible."""
    if int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0)) == 0:
        return True
    # CUDA hands a failed call's error to the next check, which would end an innocent kernel.
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return False


def unregister(blocks: list[torch.Tensor]) -> None:
    """Unpin blocks that no copy uses any more: their addresses may be given to others."""
    torch.cuda.synchronize()
    for block in blocks:
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
