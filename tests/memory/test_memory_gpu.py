"""The layer function and its host memory on a GPU: exact, bounded, and overlapping nothing that it should not."""

import json
from dataclasses import replace

import pytest
import torch
from random_nf4_model import shape_config
from test_layer_function import LENGTH, assert_layers_give, batch, bind, build, loss_and_gradients

from longqlora.attention.binding import bind_attention
from longqlora.memory.estimate import CUDA_CONTEXT, GIB, ModelShape, RunShape, predict
from longqlora.memory.host_offload import HostOffload
from longqlora.memory.policy import BALANCED, CHECKPOINTED, MAX_LENGTH
from longqlora.settings.config import AttentionConfig

pytestmark = pytest.mark.gpu


@pytest.fixture
def store() -> HostOffload:
    return HostOffload(torch.device("cuda"))


@pytest.fixture
def inputs() -> dict:
    return {name: x.cuda() for name, x in batch().items()}


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("attention", ["s2", "full"])
# fp32 goes through the memory-efficient kernel, fp64 through the plain one.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_equals_the_plain_layers(store, inputs, attention, dtype, tolerance, is_packed):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = build("llama", attention, dtype=dtype).cuda()
    if is_packed:
        bind_attention(model.get_base_model(), AttentionConfig(attention=attention), 64, is_packed=True)
        inputs["position_ids"] = torch.arange(LENGTH, device="cuda").remainder(23).expand(2, -1)
    expected = loss_and_gradients(model, inputs)
    for place in (None, store, store):
        assert_layers_give(expected, model, inputs, tolerance=tolerance, store=place)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_is_near_fp32(store, inputs, dtype):
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16 arithmetic")
    model = build(dtype=torch.float32).cuda()
    expected = loss_and_gradients(model, inputs)
    bind(model, store=store)
    with torch.autocast("cuda", dtype):
        loss, _ = loss_and_gradients(model, inputs)
    assert loss == pytest.approx(expected[0], rel=0.01)


def test_what_is_put_comes_back_and_host_memory_is_used_again(store):
    """Also after a step that was given up."""
    tensors = [[torch.randn(1000 + 7 * i, 33, device="cuda") for _ in range(2)] for i in range(4)]
    for num_got in (4, 1, 4):
        handles = [store.put([x.clone() for x in group]) for group in tensors]
        for group, handle in list(zip(tensors[::-1], handles[::-1], strict=True))[:num_got]:
            assert all(torch.equal(x, y) for x, y in zip(group, store.get(handle), strict=True))
        del handles, handle
    torch.cuda.synchronize()
    num_bytes = sum(block.nbytes for blocks in store.blocks.values() for block in blocks)
    assert num_bytes == sum(x.nbytes for group in tensors for x in group), "exact sizes, one set for all steps"
    assert store.is_pinned


def test_device_memory_is_that_of_two_layers_however_far_the_cpu_runs_ahead(store):
    size = 2**26
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
