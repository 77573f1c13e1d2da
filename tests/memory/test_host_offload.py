"""Host memory's copies in the worst order: on streams that do nothing before they are waited for.

The CPU plays the GPU: the computing stream runs at once, copies as late as the waits allow. What reads or writes
memory that was given away by then, or comes before the work that it needs, fails here. On real
streams (`pytest -m gpu`), the last test.
"""

import weakref
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from longqlora.memory import host_offload
from longqlora.memory.host_offload import HostOffload

NUM_LAYERS = 5
COPY = torch.Tensor.copy_


class Streams:
    """torch.cuda's streams, as far as HostOffload uses them."""

    def __init__(self):
        self.num_computed, self.current, self.device_tensors, self.side_streams = 0, None, [], []

    def make(self, device):
        self.side_streams.append(SideStream(self))
        return self.side_streams[-1]

    @contextmanager
    def stream(self, stream):
        self.current = stream
        yield
        self.current = None

    def copy(self, target, source):
        """Tensor.copy_, later, on tensors that must still be there by then."""
        assert self.current.seen == self.num_computed, "a copy that does not wait for the work before it"
        device_side = source if self.current is self.side_streams[0] else target
        self.device_tensors.append(weakref.ref(device_side))
        sides = [weakref.ref(x) if x is device_side else (lambda x=x: x) for x in (target, source)]

        def work():
            there, here = (side() for side in sides)
            assert there is not None and here is not None, "device memory was given away before its copy was done"
            COPY(there, here)

        self.current.queue.append(work)

    def num_present(self) -> int:
        return len({id(x()) for x in self.device_tensors if x() is not None})


class SideStream:
    """An event is a function that does what was queued before it."""

    def __init__(self, streams):
        self.streams, self.queue, self.num_done, self.seen = streams, [], 0, -1

    def wait_stream(self, compute):
        self.seen = self.streams.num_computed

    def record_event(self):
        return partial(self.work, len(self.queue))

    def work(self, position):
        while self.num_done < position:
            self.num_done += 1
            self.queue[self.num_done - 1]()


@pytest.fixture
def streams(monkeypatch):
    streams, compute = Streams(), SimpleNamespace(wait_event=lambda event: event())
    monkeypatch.setattr(torch.cuda, "Stream", streams.make)
    monkeypatch.setattr(torch.cuda, "stream", streams.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, source, non_blocking: streams.copy(x, source))
    monkeypatch.setattr(host_offload, "register", lambda block: True)
    monkeypatch.setattr(host_offload, "unregister", lambda blocks: None)
    return streams


@pytest.fixture
def store(streams):
    return HostOffload(torch.device("cpu"))


def layer_values(step: int, layer: int) -> list[torch.Tensor]:
    return [torch.full((3, 4), 100.0 * step + layer), torch.full((7,), -100 * step - layer, dtype=torch.bfloat16)]


def forward(store, streams, step: int) -> list:
    handles = []
    for layer in range(NUM_LAYERS):
        streams.num_computed += 1
        handles.append(store.put(layer_values(step, layer)))
        assert streams.num_present() <= 4, "two layers of two tensors"
    return handles


def take_back(store, streams, handles, step: int, layers) -> None:
    """Last layer first; what came back is spoilt afterwards."""
    for layer in reversed(layers):
        streams.num_computed += 1
        for got, expected in zip(store.get(handles.pop()), layer_values(step, layer), strict=True):
            assert streams.num_present() <= 4, "two layers of two tensors"
            assert got.dtype == expected.dtype and torch.equal(got, expected)
            got.fill_(float("nan"))


@pytest.mark.parametrize("num_got", range(NUM_LAYERS + 1))
def test_what_is_put_comes_back_in_the_worst_order(store, streams, num_got):
    """Also after a step that was given up, which leaves its memory to the next."""
    handles = forward(store, streams, step=0)
    take_back(store, streams, handles, 0, range(NUM_LAYERS - num_got, NUM_LAYERS))
    del handles
    assert streams.num_present() == 0
    for step in (1, 2):
        take_back(store, streams, forward(store, streams, step), step, range(NUM_LAYERS))
    sizes = sorted(block.nbytes for blocks in store.blocks.values() for block in blocks)
    assert sizes == sorted(x.nbytes for x in layer_values(0, 0) * NUM_LAYERS), "exact sizes, one set for all steps"
    assert sum(x.nbytes for x in store.registered) == sum(sizes)


def test_only_layers_that_have_left_the_device_are_copied_back(store, streams):
    take_back(store, streams, forward(store, streams, step=0), 0, range(NUM_LAYERS))
    num_copies = 2 * NUM_LAYERS
    assert len(streams.device_tensors) == num_copies + num_copies - 2, "the last layer's tensors were still there"


def test_a_host_that_runs_short_is_named(store, monkeypatch):
    monkeypatch.setattr(host_offload, "free_host_memory", lambda: 47)
    with pytest.raises(ValueError, match="offload_activations: .* keep_activations: input"):
        store.put([torch.zeros(3, 4)])


def test_memory_that_cannot_be_pinned_is_used_as_it_is(store, streams, monkeypatch):
    monkeypatch.setattr(host_offload, "register", lambda block: False)
    with pytest.warns(UserWarning, match="cannot be pinned"):
        handle = store.put(layer_values(0, 0))
    assert not store.registered and torch.equal(store.get(handle)[0], layer_values(0, 0)[0])


@pytest.mark.gpu
def test_device_memory_is_that_of_two_layers_however_far_the_cpu_runs_ahead():
    size, handles, store = 2**26, [], HostOffload(torch.device("cuda"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda._sleep(10**9)
    for _ in range(8):
        x = torch.randn(size // 4, device="cuda")
        handles.append(store.put([x]))
        del x
    while handles:
        store.get(handles.pop())[0].add_(1)
    assert torch.cuda.max_memory_allocated() - before <= 2.1 * size
