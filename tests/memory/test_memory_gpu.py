"""The layer function and its host memory on a GPU: exact, bounded, and overlapping nothing that it should not."""

import json
from dataclasses import replace

import pytest
import torch
from test_layer_function import assert_equal, batch, build, loss_and_gradients

from benchmark.random_nf4_model import shape_config
from longqlora.attention.binding import bind_attention
from longqlora.memory.estimate import CUDA_CONTEXT, GIB, predict
from longqlora.memory.host_offload import HostOffload
from longqlora.memory.layer_binding import bind_layers
from longqlora.memory.layer_call import LayerOptions
from longqlora.memory.policy import BALANCED, CHECKPOINTED, MAX_LENGTH
from longqlora.memory.shapes import ModelShape, RunShape
from longqlora.settings.config import KEPT, AttentionConfig

pytestmark = pytest.mark.gpu


def on_gpu(inputs: dict) -> dict:
    return {name: x.cuda() for name, x in inputs.items()}


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("attention", ["s2", "full"])
# fp32 goes through the memory-efficient kernel, fp64 through the plain one.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_equals_the_plain_layers(attention, keep, dtype, tolerance):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = build("llama", attention, dtype=dtype).cuda()
    expected = loss_and_gradients(model, on_gpu(batch()))
    for store in (None, HostOffload(torch.device("cuda"))):
        for num_head_chunks in (1, 2):
            bind_layers(model, LayerOptions(keep, 16, num_head_chunks), store=store)
            for _ in range(2):
                assert_equal(loss_and_gradients(model, on_gpu(batch())), expected, tolerance)


@pytest.mark.parametrize("attention", ["s2", "full"])
def test_packed_rows_equal_the_plain_layers(attention):
    model = build("llama", attention).cuda()
    bind_attention(model.get_base_model(), AttentionConfig(attention=attention), 64, is_packed=True)
    inputs = on_gpu(batch())
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1], device="cuda").remainder(23).expand(2, -1)
    expected = loss_and_gradients(model, inputs)
    bind_layers(model, LayerOptions(tile_size=16), store=HostOffload(torch.device("cuda")))
    assert_equal(loss_and_gradients(model, inputs), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_is_near_fp32(dtype):
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16 arithmetic")
    model = build(dtype=torch.float32).cuda()
    expected = loss_and_gradients(model, on_gpu(batch()))
    bind_layers(model, LayerOptions(tile_size=16), store=HostOffload(torch.device("cuda")))
    with torch.autocast("cuda", dtype):
        loss, _ = loss_and_gradients(model, on_gpu(batch()))
    assert loss == pytest.approx(expected[0], rel=0.01)


def test_what_is_put_comes_back_and_host_memory_is_used_again():
    store = HostOffload(torch.device("cuda"))
    tensors = [[torch.randn(1000 + 7 * i, 33, device="cuda") for _ in range(2)] for i in range(4)]
    for _ in range(3):
        handles = [store.put([x.clone() for x in group]) for group in tensors]
        for group, handle in zip(tensors[::-1], handles[::-1], strict=True):
            for x, y in zip(group, store.get(handle), strict=True):
                assert torch.equal(x, y)
        del handles, handle
    torch.cuda.synchronize()
    num_bytes = sum(block.nbytes for blocks in store.blocks.values() for block in blocks)
    assert num_bytes == sum(x.nbytes for group in tensors for x in group), "exact sizes, one set for all steps"
    assert store.is_pinned


def test_a_step_that_was_given_up_leaves_its_memory_to_the_next():
    store = HostOffload(torch.device("cuda"))
    handles = [store.put([torch.randn(100, 100, device="cuda")]) for _ in range(3)]
    store.get(handles[-1])
    del handles
    handle = store.put([torch.ones(100, 100, device="cuda")])
    assert torch.equal(store.get(handle)[0], torch.ones(100, 100, device="cuda"))


def test_device_memory_is_that_of_two_layers_however_far_the_cpu_runs_ahead():
    store, size = HostOffload(torch.device("cuda")), 2**26
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda._sleep(10**9)
    handles = []
    for _ in range(8):
        x = torch.randn(size // 4, device="cuda")
        handles.append(store.put([x]))
        del x
    while handles:
        store.get(handles.pop())[0].add_(1)
    assert torch.cuda.max_memory_allocated() - before <= 2.1 * size


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ([], CHECKPOINTED),
        (["--memory", "balanced"], BALANCED),
        (["--memory", "balanced", "--offload_activations"], replace(BALANCED, offload_activations=True)),
        (["--memory", "max_length"], MAX_LENGTH),
    ],
)
def test_prediction_is_within_a_tenth_of_what_is_reserved(run_script, tmp_path, words, policy):
    """A step of the 7B shape at 16,384 tokens; the CUDA context is not the allocator's."""
    file, length = tmp_path / "step.json", 16384
    flags = ["--shape", "llama2-7b", "--seq_len", length, "--steps", 1, "--optim", "paged_adamw_8bit", *words]
    run_script("benchmark/train_step.py", *flags, "--output_file", file, check=True, timeout=600)
    reserved = json.loads(file.read_text())["peak_reserved_bytes"]
    run = RunShape(length, attended=length // 4, optimizer_bytes=0)
    predicted = predict(ModelShape.of(shape_config("llama2-7b")), run, policy).peak - CUDA_CONTEXT
    assert 0.9 < predicted / reserved < 1.1, f"predicted {predicted / GIB:.2f} GiB, reserved {reserved / GIB:.2f} GiB"
