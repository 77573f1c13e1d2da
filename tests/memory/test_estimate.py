"""Predicted memory against live bytes counted in a real step, for three shapes and every activation policy."""

import json
import math
from dataclasses import replace

import pytest
import torch
from live_memory import PeakMemory
from random_nf4_model import random_nf4_model, shape_config
from transformers import AutoConfig

from longqlora.attention.binding import bind_attention
from longqlora.memory import layer_binding
from longqlora.memory.decoder_layer import LayerKind
from longqlora.memory.estimate import CUDA_CONTEXT, GIB, ModelShape, RunShape, optimizer_bytes, predict
from longqlora.memory.layer_binding import apply_policy
from longqlora.memory.policy import BALANCED, CANDIDATES, CHECKPOINTED, MAX_LENGTH, POLICIES, STOCK
from longqlora.model.adapter import attach_adapter
from longqlora.model.loss_binding import bind_chunked_loss
from longqlora.settings.config import AdapterConfig, AttentionConfig

CPU = torch.device("cpu")
# Ratios of Llama-2-7B, of 70B (grouped heads), and of a Qwen2.5-1.5B with its tied, large vocabulary.
SHAPES = {
    "7b": {
        "hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 8, "num_key_value_heads": 8,
        "head_dim": 16, "vocab_size": 2000,
    },
    "70b": {
        "hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": 2000,
    },
    "qwen": {
        "hidden_size": 96, "intermediate_size": 560, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 9500, "tie_word_embeddings": True,
    },
}  # fmt: skip


def assert_prediction_is_close(name, run, policies, dtype, model_type="llama", **inputs):
    config = AutoConfig.for_model(
        model_type, num_hidden_layers=2, max_position_embeddings=2048, pad_token_id=None, **SHAPES[name]
    )
    attention = AttentionConfig(attention="full" if run.attended == run.num_tokens else "s2")
    ids = torch.randint(config.vocab_size, (run.num_rows, run.num_tokens))
    for policy in policies:
        model = random_nf4_model(config, dtype=dtype, device=CPU)
        bind_attention(model, attention, run.num_tokens, is_packed="position_ids" in inputs)
        bind_chunked_loss(model)
        model = attach_adapter(model, AdapterConfig(lora_rank=run.lora_rank)).train()
        apply_policy(model, policy, CPU)
        if policy.gradient_checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        with PeakMemory(CPU) as memory, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(input_ids=ids, labels=ids, **inputs).loss.backward()
        ratio = predict(ModelShape.of(config), run, policy).step / memory.peak_bytes
        assert 0.9 < ratio < 1.1, (policy.describe(), ratio)


RUN = RunShape(512, activation_bytes=2, lora_rank=2, attended=128, is_gpu=False)
# A CPU offloads nothing, and tiles are scaled down with the rest.
ON_CPU = {"tile_size": 128, "optim": None, "offload_activations": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_prediction_is_within_a_tenth_of_live_bytes(name, dtype):
    policies = dict.fromkeys(replace(policy, **ON_CPU) for policy in (STOCK, CHECKPOINTED, *CANDIDATES))
    assert_prediction_is_close(name, replace(RUN, activation_bytes=dtype.itemsize), policies, dtype)


# No gate; norms behind attention and MLP; those beside others; a multiplier; all heads by one layer.
@pytest.mark.parametrize("model_type", ["arcee", "olmo2", "glm4", "granite", "phi3"])
def test_other_kinds_of_layers_are_predicted_as_closely(model_type):
    policies = dict.fromkeys(replace(policy, **ON_CPU) for policy in CANDIDATES)
    assert_prediction_is_close("7b", replace(RUN, activation_bytes=4), policies, torch.float32, model_type)


def test_heads_that_cannot_be_projected_alone_cost_time_and_no_memory():
    whole = replace(LLAMA_7B, kind=LayerKind(norms_all_heads=True))
    policies = [replace(CANDIDATES[2], num_head_chunks=num) for num in (1, 4)]
    (one, four), (own_one, own_four) = ([predict(x, RUN, policy) for policy in policies] for x in (whole, LLAMA_7B))
    assert (one.peak, four.peak) == (own_one.peak, own_four.peak) and one.flops == own_one.flops
    # Three times more in either pass, of 2 x 3 x 4096 x 4096 FLOPs a token and layer.
    assert four.flops - own_four.flops == pytest.approx(1.06 * 6 * 6 * 4096**2 * 32 * RUN.tokens, rel=0.01)


@pytest.mark.parametrize("attended", [128, 512])
@pytest.mark.parametrize("length", [50, 350])
def test_packed_rows_take_what_plain_rows_take(length, attended):
    """Documents of this length; S2-Attn and full attention."""
    policies = (CANDIDATES[0], CANDIDATES[2], replace(CANDIDATES[2], num_head_chunks=4))
    policies = [replace(policy, **ON_CPU) for policy in policies]
    rows = {"position_ids": (torch.arange(512) % length)[None], "use_cache": False}
    assert_prediction_is_close("7b", replace(RUN, attended=attended), policies, torch.bfloat16, **rows)


@pytest.mark.parametrize("attended", [128, 512])
def test_padded_rows_take_what_whole_rows_take(attended):
    """S2-Attn and full attention: a mask [B, 1, S, S] is made for neither."""
    policies = [replace(policy, **ON_CPU) for policy in (STOCK, CHECKPOINTED, CANDIDATES[0], CANDIDATES[2])]
    rows = {"attention_mask": (torch.arange(512) < torch.tensor([[512], [200]])).long()}
    assert_prediction_is_close("7b", replace(RUN, attended=attended, num_rows=2), policies, torch.bfloat16, **rows)


@pytest.mark.parametrize("attended", [128, 512])
def test_attention_through_autograd_takes_the_same_sparse_and_dense(attended, monkeypatch):
    """flash-attn and rows shared by processes."""
    monkeypatch.setattr(layer_binding, "attention_pattern", lambda *_: None)
    run = replace(RUN, attended=attended, by_kernels=False)
    policies = [replace(policy, **ON_CPU) for policy in POLICIES.values()]
    assert_prediction_is_close("7b", run, policies, torch.bfloat16)


LLAMA_7B = ModelShape(4096, 11008, 32, 32, 32, 128, 32000)


def test_candidates_lead_from_fast_to_lean():
    estimates = [predict(LLAMA_7B, RunShape(65536, attended=16384), policy) for policy in CANDIDATES]
    assert [e.peak for e in estimates] == sorted((e.peak for e in estimates), reverse=True)
    times = [e.relative_time for e in estimates]
    assert times[:3] == sorted(times[:3]) and times[0] == min(times) and times[-1] == max(times)
    assert [e.host > 0 for e in estimates] == [policy.offload_activations for policy in CANDIDATES]
    assert predict(LLAMA_7B, RUN, CANDIDATES[-1]).host == 0, "a CPU keeps tensors where they are"


def test_weights_are_counted_by_what_they_are():
    run = RunShape(1024)
    linear, embedding, lora = 32 * 202375168, 2 * 32000 * 4096, 159907840
    fast = predict(LLAMA_7B, run, CANDIDATES[0])
    assert fast.static == pytest.approx(linear * 4.127 / 8 + embedding * 2 + lora * (4 + 8), rel=1e-3)
    assert fast.gradients == lora * 4
    paged = predict(LLAMA_7B, replace(run, optimizer_bytes=optimizer_bytes("paged_adamw_8bit")), CANDIDATES[0])
    assert fast.static - paged.static == lora * 8
    plain = predict(LLAMA_7B, replace(run, weights="plain"), CANDIDATES[0])
    assert plain.static - fast.static == pytest.approx(linear * (2 - 4.127 / 8), rel=1e-3)
    trained = predict(LLAMA_7B, replace(run, weights="trained", activation_bytes=4), CANDIDATES[0])
    assert trained.static == (linear + embedding) * 12 and trained.gradients == (linear + embedding) * 4
    embeds = predict(LLAMA_7B, replace(run, num_trained_embeddings=2), CANDIDATES[0])
    assert embeds.static - fast.static == embedding * (4 - 2 + 8), "no frozen twin"


def test_targets_of_the_project():
    """What the policies are for, as predicted: 7B at 100k and 256k, 13B at 100k, 70B at 32k."""
    lean, offloaded = CANDIDATES[-1], CANDIDATES[4]
    llama_13b = ModelShape(5120, 13824, 40, 40, 40, 128, 32000)
    llama_70b = ModelShape(8192, 28672, 80, 64, 8, 128, 32000)
    for shape, length, limit, policy in (
        (LLAMA_7B, 100_000, 18, offloaded), (LLAMA_7B, 262_144, 32, lean), (llama_13b, 100_000, 26, offloaded),
        (llama_70b, 32_768, 52, lean),
    ):  # fmt: skip
        optimizer = 8 if policy.optim is None else 0
        run = RunShape(length, attended=length // 4, optimizer_bytes=optimizer)
        assert predict(shape, run, policy).peak < limit * GIB, (length, limit)


def test_several_processes_share_what_zero_splits():
    run = RunShape(8192, attended=2048, weights="plain")
    alone = predict(LLAMA_7B, run, CANDIDATES[0])
    two = predict(LLAMA_7B, replace(run, state_shards=8), CANDIDATES[0])
    three = predict(LLAMA_7B, replace(run, state_shards=8, weight_shards=8), CANDIDATES[0])
    offloaded = predict(LLAMA_7B, replace(run, state_shards=8, weight_shards=math.inf), CANDIDATES[0])
    assert 13 * GIB < alone.static and alone.static - 1.2 * GIB < two.static < alone.static - 0.9 * GIB
    assert two.gradients == alone.gradients / 8
    # 12.06 GiB of layers, 0.49 of embeddings, 0.6 of LoRA: an eighth of it, and two layers of 0.38 whole.
    assert two.static - three.static == pytest.approx((13.15 * 7 / 8 - 0.75) * GIB, rel=0.02)
    assert offloaded.static < 2 * GIB


ON_GPU = {
    "": CHECKPOINTED,
    "--memory balanced": BALANCED,
    "--memory balanced --offload_activations": replace(BALANCED, offload_activations=True),
    "--memory max_length": MAX_LENGTH,
}


@pytest.mark.gpu
@pytest.mark.parametrize("words,policy", ON_GPU.items())
def test_prediction_is_within_a_tenth_of_what_is_reserved(run_script, tmp_path, words, policy):
    """A step of the 7B shape at 16,384 tokens; the CUDA context is not the allocator's."""
    file, length = tmp_path / "step.json", 16384
    flags = ["--shape", "llama2-7b", "--seq_len", length, "--steps", 1, "--optim", "paged_adamw_8bit", *words.split()]
    run_script("benchmark/train_step.py", *flags, "--output_file", file, check=True, timeout=600)
    reserved = json.loads(file.read_text())["peak_reserved_bytes"]
    run = RunShape(length, attended=length // 4, optimizer_bytes=0)
    predicted = predict(ModelShape.of(shape_config("llama2-7b")), run, policy).peak - CUDA_CONTEXT
    assert 0.9 < predicted / reserved < 1.1, f"predicted {predicted / GIB:.2f} GiB, reserved {reserved / GIB:.2f} GiB"
