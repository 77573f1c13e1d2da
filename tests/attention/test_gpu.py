"""What only a CUDA device can show: kernels in 16 bit, NF4 on the GPU, the command lines end to end.

    pytest -m gpu

Tolerances, relative to the largest expected value, against fp32 or fp64 from the same 16-bit inputs:
fp16 4e-3, bf16 3e-2 (a few units in the last place of values of that size); fp32 1e-4.
"""

import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_reference import assert_close, assert_same_with_gradients, random_qkv, shift_short_reference
from conftest import NUM_STEPS, ZERO2
from torch.nn.attention import SDPBackend, sdpa_kernel

from longqlora.attention import shift_short
from longqlora.attention.binding import bind_attention, flash_kernel
from longqlora.attention.dual_chunk import DualChunkSizes, dual_chunk_attention
from longqlora.attention.sdpa import causal_attention
from longqlora.attention.shift_short import shift_short_attention
from longqlora.distributed import free_port
from longqlora.inference.load import load_for_inference
from longqlora.model.adapter import attach_adapter
from longqlora.model.adapter_folder import save_adapter
from longqlora.model.base import load_config, load_model
from longqlora.model.context import extend_rope
from longqlora.model.loss_binding import bind_chunked_loss
from longqlora.settings.config import AdapterConfig, AttentionConfig

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}
HAS_BF16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this GPU has no bf16")
BF16 = pytest.param(torch.bfloat16, marks=needs_bf16)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, BF16])
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
G = 128


def inputs(heads, kv_heads, length, dim, dtype):
    return random_qkv(length, batch=2, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, device=DEVICE)


def skip_where_missing(backend, dtype, dim):
    """Skip where SDPA has no such kernel for plain causal attention on this GPU."""
    try:
        with sdpa_kernel(BACKENDS[backend]):
            F.scaled_dot_product_attention(*inputs(2, 2, G, dim, dtype), is_causal=True).sum().backward()
    except RuntimeError as error:
        pytest.skip(f"no {backend} kernel here for {dtype}, head dim {dim}: {str(error).splitlines()[0]}")


@pytest.mark.parametrize("backend", [*BACKENDS, "flash-attn"])
@HALVES
@pytest.mark.parametrize("heads,kv_heads,dim", [(8, 8, 64), (8, 8, 128), (8, 2, 128), (8, 1, 64)])
@pytest.mark.parametrize("length", [4 * G, 5 * G + 60])
def test_s2_equals_the_reference_on_every_backend(backend, dtype, heads, kv_heads, dim, length):
    if backend == "flash-attn":
        pytest.importorskip("flash_attn", reason="the flash-attn package is not installed")
    else:
        skip_where_missing(backend, dtype, dim)
    kernel = flash_kernel() if backend == "flash-attn" else causal_attention
    method = partial(shift_short_attention, group_size=G, kernel=kernel)
    dense, tensors = partial(shift_short_reference, group_size=G), inputs(heads, kv_heads, length, dim, dtype)
    with sdpa_kernel(BACKENDS.get(backend, [*BACKENDS.values()])):
        assert_same_with_gradients(method, dense, tensors, TOLERANCE[dtype])


@HALVES
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_s2_with_padding_on_the_left(dtype, kv_heads, monkeypatch):
    """The kernel that takes a mask, and document by document. Rows of padding are left out: nothing reads them."""
    segment_ids = torch.zeros(2, 3 * G, dtype=torch.long)
    segment_ids[0, :70] = -1
    method = partial(shift_short_attention, group_size=G, segment_ids=segment_ids.to(DEVICE))
    dense = partial(shift_short_reference, group_size=G, segment_ids=segment_ids)
    real, tensors = (segment_ids >= 0)[:, None, :, None], inputs(8, kv_heads, 3 * G, 64, dtype)
    for lengths_of in (shift_short.segment_lengths, lambda segment_ids: None):
        monkeypatch.setattr(shift_short, "segment_lengths", lengths_of)
        assert_same_with_gradients(method, dense, tensors, TOLERANCE[dtype], rows=real)


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
@pytest.mark.parametrize("kv_heads,dim", [(8, 64), (2, 128), (1, 40), (4, 20)])
def test_dual_chunk_attention_agrees_with_the_cpu_in_float64(backend, dtype, kv_heads, dim):
    """Every switch leads to a kernel that runs (plain where torch has none), forward and backward."""
    tensors = random_qkv(900, 1003, batch=2, heads=8, kv_heads=kv_heads, dim=dim, dtype=dtype, device=DEVICE)
    inv_freq = 10000.0 ** -(torch.arange(0, dim, 2) / dim)
    method = partial(dual_chunk_attention, inv_freq=inv_freq, sizes=DualChunkSizes(256))
    # On the CPU, a backend that it lacks leads to the plain kernel.
    with sdpa_kernel(backend):
        assert_same_with_gradients(method, method, tensors, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_nf4_training_reaches_the_adapter_alone_and_survives_saving(tmp_path, tiny_model_dir, dtype):
    torch.manual_seed(0)
    config = load_config(str(tiny_model_dir))
    extend_rope(config, 256)
    model = load_model(str(tiny_model_dir), config, dtype=dtype, load_in_4bit=True, device=DEVICE)
    bind_attention(model, AttentionConfig(attention="s2"), 256)
    bind_chunked_loss(model)
    adapter = AdapterConfig(lora_rank=8, lora_dropout=0, train_embedding=True, train_norm=True)
    model = attach_adapter(model, adapter).train()
    ids = torch.randint(4, 320, (2, 200), device=DEVICE)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(6):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        # The scale that fp16 needs; Adam's steps do not depend on it.
        (loss * 128).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(320)) < 0.5 and losses[-1] < losses[0] - 0.2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert not parameter.requires_grad or parameter.dtype == torch.float32, name
    save_adapter(model.eval(), tmp_path)
    loaded = load_for_inference(None, adapter_name_or_path=str(tmp_path), load_in_4bit=True, dtype=dtype).model
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, TOLERANCE[dtype])


LAUNCHERS = {
    "no deepspeed": ([], None),
    "deepspeed without launcher": ([], ZERO2),
    "deepspeed launcher": (["-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port"], ZERO2),
}


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize("launcher,deepspeed", LAUNCHERS.values(), ids=LAUNCHERS)
def test_training(write_yaml, repo, precision, launcher, deepspeed):
    path, out = write_yaml(deepspeed=deepspeed, optim="paged_adamw_32bit", **{precision: True})
    port = [str(free_port())] if launcher else []
    command = [sys.executable, *launcher, *port, repo / "train.py", "--train_args_file", path]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    result = json.loads((out / "train_results.json").read_text())
    assert result["global_step"] == NUM_STEPS and math.isfinite(result["last_loss"]) and result["last_loss"] < 7
    assert result["peak_gpu_memory_gib"] is not None and (out / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("flags", [[], ["--load_in_4bit"]])
def test_evaluation_on_the_gpu_agrees_with_the_cpu(tmp_path, tiny_model_dir, run_script, flags):
    np.random.default_rng(0).integers(4, 320, 4096).astype("<u2").tofile(tmp_path / "ids.bin")
    perplexities = []
    for device, environment in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        out = tmp_path / f"{device}.json"
        run_script(
            "script/evaluate/evaluate.py", "--base_model", tiny_model_dir, "--data_path", tmp_path / "ids.bin",
            "--seq_len", 64, "--sliding_window", 64, "--output_file", out, *flags, check=True, env=environment,
            timeout=600,
        )  # fmt: skip
        perplexities.append(json.loads(out.read_text())["results"][0]["perplexity"])
    assert math.isclose(*perplexities, rel_tol=0.02) and 200 < perplexities[0] < 600


def test_attention_benchmark_on_the_gpu(tmp_path, run_script):
    out = tmp_path / "out.json"
    run_script("benchmark/attention.py", "--device", "cuda", "--dtype", "fp16", "--output_file", out, check=True)
    figures = json.loads(out.read_text())["results"]["4096"]
    assert figures["s2"]["extra_bytes"] <= figures["materialized"]["extra_bytes"] / 4


@pytest.mark.parametrize("flags", [[], ["--v100"], ["--attention", "full"]])
def test_train_step_on_the_gpu(tmp_path, run_script, flags):
    out = tmp_path / "out.json"
    run_script(
        "benchmark/train_step.py", "--shape", "tiny", "--seq_len", 1024, "--memory_cap", "4GiB", "--output_file", out,
        *flags, check=True, timeout=600,
    )  # fmt: skip
    record = json.loads(out.read_text())
    assert record["peak_reserved_bytes"] >= record["peak_allocated_bytes"] > record["weight_bytes"] > 0
    assert record["peak_reserved_bytes"] <= 4 * 2**30 and all(map(math.isfinite, record["losses"]))


def test_train_step_beyond_the_memory_cap(run_script):
    outcome = run_script("benchmark/train_step.py", "--shape", "tiny", "--seq_len", 2**22, "--memory_cap", "1GiB")
    assert outcome.returncode == 2 and "Traceback" not in outcome.stderr
    assert "out of memory within --memory_cap 1GiB" in outcome.stderr
