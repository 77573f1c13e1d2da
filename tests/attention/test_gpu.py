"""What only a CUDA device can show: kernels in 16 bit, NF4 on the GPU, the command lines end to end.

    pytest -m gpu

Tolerances, relative to the largest expected value, against fp32 or fp64 from the same 16-bit inputs:
fp16 4e-3, bf16 3e-2 (a few units in the last place of values of that size); fp32 1e-4.
"""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_reference import assert_close, assert_same_with_gradients, random_qkv, shift_short_reference
from conftest import sentences
from torch.nn.attention import SDPBackend, sdpa_kernel

import longqlora.model.loss as loss_module
from longqlora.attention import shift_short
from longqlora.attention.binding import bind_attention, flash_kernel
from longqlora.attention.dual_chunk import DualChunkSizes, dual_chunk_attention
from longqlora.attention.sdpa import causal_attention
from longqlora.attention.shift_short import shift_short_attention
from longqlora.inference.load import load_for_inference
from longqlora.model.adapter import attach_adapter
from longqlora.model.adapter_folder import save_adapter
from longqlora.model.base import load_config, load_model
from longqlora.model.context import extend_rope
from longqlora.model.loss_binding import bind_chunked_loss
from longqlora.settings.config import AdapterConfig, AttentionConfig

HAS_CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device, and torch.cuda.is_available() is false"),
]

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}
HAS_BF16 = HAS_CUDA and torch.cuda.is_bf16_supported(including_emulation=False)
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this GPU has no bf16")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
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


def loss_inputs(rows, length, dim, dtype):
    """Hidden states [rows, length, dim], weight [1000, dim] and labels."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, length, dim, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (0.1 * torch.randn(1000, dim, generator=generator)).to(DEVICE, dtype).requires_grad_()
    return states, weight, torch.randint(1000, (rows, length), generator=generator).to(DEVICE)


@pytest.mark.parametrize("implementation", ["library", "own"])
@HALVES
def test_chunked_loss_equals_stock(monkeypatch, implementation, dtype):
    if implementation == "own":
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 1000 * 100)
    elif not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch older than 2.13 has no linear_cross_entropy")
    *ours, labels = loss_inputs(2, 500, 64, dtype)
    labels[0, :50] = -100
    exact = [x.detach().float().requires_grad_() for x in ours]
    loss = loss_module.next_token_loss(*ours, labels)
    logits = exact[0] @ exact[1].T
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    # fp16 gradients of a mean over 1000 tokens need the scale that training gives them.
    (loss * 1024).backward()
    (expected * 1024).backward()
    # A loss of 7 in bf16 would be known to 0.03 only.
    assert abs(loss.item() - expected.item()) < 5e-3
    for x, y in zip(ours, exact, strict=True):
        assert_close(x.grad, y.grad, TOLERANCE[dtype])


@HALVES
def test_loss_of_a_long_row_is_finite(dtype):
    """The sum over 9000 tokens is beyond the range of fp16; the loss itself, a mean of 13.8, is not."""
    states, weight, labels = loss_inputs(1, 9000, 16, dtype)
    loss = loss_module.next_token_loss(states, weight.detach() * 10, labels)
    loss.backward()
    assert abs(loss.item() - 13.81) < 0.02 and torch.isfinite(states.grad).all() and states.grad.any()


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
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for step in range(6):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        (loss * 128).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        for name, parameter in trained.items():
            # B is zero at first, so A gets its first gradient in the second step.
            assert (step == 0 and "lora_A" in name) or parameter.grad.any(), name
            parameter.grad /= 128
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(320)) < 0.5 and losses[-1] < losses[0] - 0.2
    assert all(torch.equal(parameter, frozen.get(name, parameter)) for name, parameter in model.named_parameters())
    model.eval()
    save_adapter(model, tmp_path / "adapter")
    loaded = load_for_inference(
        None, adapter_name_or_path=str(tmp_path / "adapter"), load_in_4bit=True, dtype=dtype, device=DEVICE
    )
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        expected, logits = model(input_ids=ids).logits, loaded.model(input_ids=ids).logits
    assert_close(logits, expected, TOLERANCE[dtype])


PLAIN, RUNNER = [sys.executable], [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1"]


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize(
    "launcher,flags",
    [
        pytest.param(PLAIN, ["--deepspeed", "null"], id="no deepspeed"),
        pytest.param(PLAIN, [], id="deepspeed without launcher", marks=needs_deepspeed),
        pytest.param(RUNNER, [], id="deepspeed launcher", marks=needs_deepspeed),
    ],
)
def test_training(tmp_path, tiny_model_dir, repo, precision, launcher, flags):
    train_file = tmp_path / "train.jsonl"
    train_file.write_text("".join(json.dumps({"text": sentences(400, seed)}) + "\n" for seed in range(40)))
    if launcher is RUNNER:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            launcher = [*launcher, "--master_port", probe.getsockname()[1]]
    settings = {
        "model_name_or_path": tiny_model_dir, "train_file": train_file, "output_dir": tmp_path / "run",
        "model_max_length": 256, "max_seq_length": 256, "max_steps": 3, "save_steps": 3, "logging_steps": 1,
        "warmup_steps": 1, "lora_rank": 8, "per_device_train_batch_size": 2, "report_to": "none",
        "optim": "paged_adamw_32bit", "data_cache_dir": tmp_path / "cache", precision: "true",
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", value)] + flags
    command = [*launcher, repo / "train.py", "--train_args_file", repo / "train_args/tiny-llama-pretrain.yaml", *words]
    options = {"capture_output": True, "text": True, "timeout": 900, "cwd": tmp_path}
    outcome = subprocess.run([*map(str, command)], env={**os.environ, "HF_HUB_OFFLINE": "1"}, **options)
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    result = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert result["global_step"] == 3 and math.isfinite(result["last_loss"]) and result["last_loss"] < 7
    assert result["peak_gpu_memory_gib"] is not None
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


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
