"""The benchmarks run and write what they say; what they measure against computes what it claims."""

import functools
import gc
import json
import math
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import live_memory
import longest
import pytest
import step_comparison
import torch
from attention_reference import assert_same_with_gradients, dense_attention, random_qkv
from bitsandbytes.nn import Linear4bit
from conftest import REPO
from live_memory import LiveStorages, check_free_memory
from random_nf4_model import random_nf4_model, shape_config
from rolled_attention import materialized_attention, rolled_shift_short_attention, sdpa_attention
from torch.nn.functional import scaled_dot_product_attention
from train_step import POLICIES

import longqlora.model.base
from longqlora.attention.shift_short import shift_short_attention
from longqlora.device import cpu_has_bf16, is_out_of_memory
from longqlora.model.base import load_config, load_model

G = 8
KIB = 1024


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path):
    """Run a benchmark in this process, which has the slow imports behind it: what it printed, and its JSON file."""
    monkeypatch.chdir(tmp_path)

    def run(command):
        script, *flags = command.split()
        monkeypatch.setattr(sys, "argv", [script, *flags, "--output_file", "out.json"])
        runpy.run_path(str(REPO / "benchmark" / f"{script}.py"), run_name="__main__")
        return capsys.readouterr().out, json.loads(Path("out.json").read_text())

    return run


def is_drawn(name):
    return Path(name).stat().st_size > 1000


def rolled_reference(query, key, value):
    """The rolled form from its definition: rolled position p = (t - G/2) mod S orders the shifted heads."""
    heads, length = query.shape[1:3]
    order = torch.stack([(torch.arange(length) - G // 2 * (2 * head >= heads)) % length for head in range(heads)])
    same_group = order[:, :, None] // G == order[:, None] // G
    return dense_attention(query, key, value, same_group & (order[:, :, None] >= order[:, None]))[0]


# The held scores go through an fp32 softmax, as in LongLoRA's code.
@pytest.mark.parametrize("kernel,tolerance", [(sdpa_attention, 1e-10), (materialized_attention, 1e-5)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rolled_form_equals_its_definition(kernel, tolerance, kv_heads):
    rolled = functools.partial(rolled_shift_short_attention, group_size=G, kernel=kernel)
    assert_same_with_gradients(rolled, rolled_reference, random_qkv(4 * G, batch=2, kv_heads=kv_heads), tolerance)


def test_rolled_form_differs_from_ours_only_where_it_wraps():
    """Only the first half group of the shifted heads is put behind the sequence's end, and sees it."""
    tensors = [x.detach() for x in random_qkv(4 * G, batch=2)]
    methods = (rolled_shift_short_attention, shift_short_attention)
    rolled, ours = (method(*tensors, G) for method in methods)
    differs = (rolled - ours).abs().amax(-1) > 1e-10
    assert differs[:, 2:, : G // 2].all()
    assert not differs[:, :2].any() and not differs[:, 2:, G // 2 :].any()
    changed = [x.clone() for x in tensors]
    changed[2][:, :, -1] += 1
    moved = [(method(*changed, G) - method(*tensors, G)).abs().amax((0, 1, 3)) > 0 for method in methods]
    assert moved[0][: G // 2].all() and not moved[1][:-1].any()


def test_tracker_counts_storages_once_and_frees_them():
    before = torch.ones(256)
    with LiveStorages() as tracker:
        first = before + 1
        first.add_(1)
        view = first.view(16, 16).transpose(0, 1)
        alias = first.detach()
        assert tracker.live_bytes == tracker.peak_bytes == KIB
        second = torch.zeros(512)
        assert tracker.live_bytes == 3 * KIB
        del first, alias
        assert tracker.live_bytes == 3 * KIB, "the view still holds the storage"
        del view
        assert tracker.live_bytes == 2 * KIB
        del second
        assert tracker.live_bytes == 0
        third = before * 2
    assert tracker.live_bytes == KIB and tracker.peak_bytes == 3 * KIB
    del third
    assert tracker.live_bytes == 0


def test_tracker_sees_what_autograd_holds():
    """exp saves its output: it lives on though no Python name holds it, and goes with the graph."""
    x = torch.ones(256, requires_grad=True)
    with LiveStorages() as tracker:
        total = x.exp().exp().sum()
        gc.collect()
        assert tracker.live_bytes == 2 * KIB + 4
        total.backward()
        assert tracker.live_bytes == KIB + 4, "the gradient and the sum"
    assert 3 * KIB + 4 <= tracker.peak_bytes <= 5 * KIB


def test_a_cpu_without_bf16_counts_the_same_bytes(monkeypatch):
    """Products, attention and their gradients in fp32 below the tracker: same dtypes, same bytes, near values."""
    counts, outcomes = [], []
    for has_bf16 in (True, False):
        monkeypatch.setattr(live_memory, "cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((2, 4, 16, 8), (8, 8)))
        x, weight, result = x.requires_grad_(), weight.requires_grad_(), torch.empty(8, 8, dtype=torch.bfloat16)
        with live_memory.PeakMemory(torch.device("cpu")) as memory:
            torch.mm(weight.detach(), weight.detach(), out=result)
            scaled_dot_product_attention(x @ weight, x, x).sum().backward()
        counts.append(memory.peak_bytes)
        outcomes.append([result, x.grad, weight.grad])
    assert counts[0] == counts[1]
    for wide, narrow in zip(*outcomes, strict=True):
        assert wide.dtype == narrow.dtype == torch.bfloat16 and torch.allclose(wide, narrow, rtol=0.05, atol=0.1)


def test_out_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    check_free_memory(1, torch.device("cpu"))
    with pytest.raises(MemoryError):
        check_free_memory(2**60, torch.device("cpu"))


def test_attention_benchmark(run_here):
    words = "--document_length 50 --heads 4 --kv_heads 2 --head_dim 16 --repeats 3 --threads 1 --plot a.png"
    printed, record = run_here(f"attention --lengths 128 256 {words}")
    assert record["results"].keys() == {"128", "256"} and is_drawn("a.png")
    for figures in record["results"].values():
        plain, of_documents = list(figures)[:4], list(figures)[4:]
        assert plain == ["s2", "materialized", "rolled_sdpa", "full_sdpa"]
        assert of_documents == ["s2_packed", "s2_masked", "full_packed", "full_masked"]
        for result in figures.values():
            assert len(result["seconds"]) == 3 and 0 < result["min_seconds"] <= result["median_seconds"]
    extra = {name: result["extra_bytes"] for name, result in record["results"]["256"].items()}
    assert extra["s2"] < extra["rolled_sdpa"] and extra["s2"] < extra["materialized"]
    assert extra["s2_packed"] < extra["s2_masked"] and extra["full_packed"] < extra["full_masked"]
    # Output and gradients: at least these must be held.
    assert extra["full_sdpa"] >= 256 * 16 * 4 * (4 + 4 + 2 + 2)
    assert record["machine"]["num_threads"] == 1 and record["machine"]["versions"]["torch"] == torch.__version__
    assert "torch" in printed and "materialized" in printed and "median" in printed


@pytest.mark.parametrize(
    "flags",
    ["", f"{'--dtype bf16' if cpu_has_bf16() else ''} --train_embedding --train_norm",
     "--attention full --no-gradient_checkpointing", "--memory max_length --tile_size 16 --profile"],
    ids=["s2", "trains all", "full", "layer function"],
)  # fmt: skip
def test_train_step(run_here, flags):
    command = "train_step --shape tiny --seq_len 256 --lora_rank 8 --steps 4 --device cpu"
    printed, record = run_here(f"{command} {flags}")
    losses = record["losses"]
    assert len(losses) == 5 and abs(losses[0] - math.log(320)) < 0.3 and losses[-1] < losses[0]
    assert math.isclose(record["tokens_per_second"], 256 / record["median_seconds"]) and len(record["seconds"]) == 4
    assert record["peak_rss_bytes"] > record["extra_bytes"] > 0 and record["weight_bytes"] > 0 and record["hfu"] > 0
    assert "loss in chunks" in printed and "nf4" in printed
    assert ("full causal" if "full" in flags else "groups of 64 tokens") in printed
    if "--profile" in flags:
        assert 0.5 < sum(row["share"] for row in record["profile"]) <= 1 and record["profile"][0]["milliseconds"] > 0


def test_train_step_of_a_config_file_out_of_memory(run_script, tiny_model_dir):
    outcome = run_script(
        "benchmark/train_step.py", "--shape", tiny_model_dir / "config.json", "--seq_len", 8_000_000,
        "--memory_cap", "1GiB",
    )  # fmt: skip
    assert outcome.returncode == 2 and "Traceback" not in outcome.stderr
    assert "error: out of memory within --memory_cap 1GiB" in outcome.stderr.splitlines()[-1]


def test_random_model_is_like_a_loaded_one(tiny_model_dir):
    """Same parameters, dtypes and quantisation as transformers' 4-bit load; a tied head stays one matrix."""
    options = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    config = shape_config(str(tiny_model_dir / "config.json"))
    ours = random_nf4_model(config, **options)
    loaded = load_model(str(tiny_model_dir), load_config(str(tiny_model_dir)), load_in_4bit=True, **options)

    def facts(model):
        layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
        states = [(m.weight.quant_state, m.compute_dtype) for m in layers]
        return [
            {name: (type(p).__name__, p.shape, p.dtype) for name, p in model.named_parameters()},
            [(s.quant_type, s.nested, s.blocksize, s.dtype, s.shape, dtype) for s, dtype in states],
            [buffer.tolist() for buffer in model.buffers()],
        ]

    assert facts(ours) == facts(loaded) and len(facts(ours)[1]) == 14
    config.tie_word_embeddings = True
    tied = random_nf4_model(config, **options)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and not tied.lm_head.weight.is_meta


def test_units_of_a_layer(run_here):
    printed, record = run_here("layer_memory --shapes 7b --seq_len 512 --hidden_size 320 --tile_size 32 --plot a.png")
    units = {
        name.removeprefix("layer function, tiles of 32 tokens, "): row["units_per_token"]
        for name, row in record["results"]["7b"].items()
    }
    assert units["attention kept, 4 head chunks"] < units["attention kept"] < 9 < units["all kept"] < 16
    assert units["gradient checkpointing off, layers as in transformers"] > 50
    assert f"{units['attention kept']:.2f}" in printed and is_drawn("a.png")


def test_ratios_are_to_the_best_of_the_peers():
    results = {
        "ours, s2": {"cpu_seconds": [2.0], "median_seconds": 2.0, "extra_bytes": 100, "tokens_per_second": 1},
        "ours, full": {"error": "out of memory"},
        "transformers": {"cpu_seconds": [6.0], "median_seconds": 6.0, "extra_bytes": 500, "tokens_per_second": 1},
        "trl": {"cpu_seconds": [4.0], "median_seconds": 4.0, "extra_bytes": 1000, "tokens_per_second": 1},
    }
    summary = step_comparison.ratios(results)
    assert summary == {"ours, s2": {"speed": 2.0, "memory": 0.2}}
    text = step_comparison.format_comparison(results, summary)
    assert "2.00x" in text and "20.0%" in text and "ours, full: out of memory" in text
    assert step_comparison.ratios({"ours, s2": results["ours, s2"], "trl": {"error": "none"}}) == {}


@pytest.mark.parametrize("limit", [1, 2, 777, 5000, 100_000])
def test_bisection_ends_at_the_limit(monkeypatch, limit):
    args = Namespace(resolution=0.02, longest=100_000)
    tried = []

    def trains(args, name, length, cap):
        tried.append(length)
        return length <= limit

    monkeypatch.setattr(longest, "trains", trains)
    for predicted in (2, 800, 4800, 2**30):
        monkeypatch.setattr(longest, "predicted_length", lambda args, name, cap, predicted=predicted: predicted)
        tried.clear()
        found = longest.longest_length(args, "balanced", 0)
        assert found <= limit <= found * 1.02 + 1 and len(tried) < 40


def test_a_prediction_grows_with_the_cap():
    args = Namespace(
        shape="llama-4l", longest=2**20, dtype=None, optim=None, lora_rank=64, attention="s2", device="cpu"
    )
    lengths = [longest.predicted_length(args, "balanced", gib * 2**30) for gib in (1, 2)]
    assert 1000 < lengths[0] < lengths[1] and longest.predicted_length(args, "fast", 2**30) < lengths[0]
    assert longest.predicted_length(args, "balanced", 2**20) == 0


SLOW_DTYPE = "error: --dtype: this CPU multiplies {} many times slower than fp32; use fp32"
NO_SIZE = "--memory_cap: 'much' is not a size"
# Flags of a benchmark, and what its one line says.
BAD_FLAGS = {
    "attention": [
        ("--lengths 4098", "no multiple of the group size"), ("--lengths 3", "too short"), ("--heads 3", "odd number"),
        ("--heads 4 --kv_heads 3", "does not divide"), ("--repeats 0", "at least 1"), ("--plot figure.txt", "--plot"),
        ("--document_length 0", "--document_length: must be at least 1"), ("--device tpu", "cpu or cuda"),
        ("--methods s2 full_packed", "--methods: full_packed needs --document_length"),
        ("--group_size_ratio 2", "group_size_ratio"), ("--dtype fp16", SLOW_DTYPE.format("fp16")),
        ("--device cpu --dtype bf16", SLOW_DTYPE.format("bf16")), ("--lengths many", "invalid int"),
    ],
    "dual_chunk_attention": [
        ("--lengths 0", "--lengths: "), ("--kv_heads 3", "--kv_heads: "), ("--head_dim 15", "--head_dim: "),
        ("--chunk_size 5000", "chunk_size: "), ("--local_window 0", "local_window: "),
        ("--pretraining_length 2", "pretraining_length: "), ("--device cpu --dtype bf16", SLOW_DTYPE.format("bf16")),
    ],
    "layer_memory": [("--hidden_size 500", "--hidden_size: a multiple of 320"), ("--plot a.txt", "--plot")],
    "longest": [
        ("--memory_cap much", NO_SIZE), ("--memory_cap 1GiB --resolution 2", "--resolution: must lie in"),
        ("--memory_cap 1GiB --longest 1", "--longest: must be at least 2"),
    ],
    "prefill": [
        ("--num_tokens 0", "--num_tokens: must be at least 1"), ("--memory_cap much", NO_SIZE),
        ("--prefill_chunk_size -1", "--prefill_chunk_size: must be at least 1"),
        ("--pretraining_length 0", "--pretraining_length: must be at least 1"),
        ("--pretraining_length 100", "pretraining_length: beyond the model's 64 tokens"),
        ("--v100 --dtype bf16", "--v100 computes in fp16"), ("--v100 --device cpu", "--v100 needs a CUDA device"),
        ("--shape nothing-here", "--shape: 'nothing-here' is neither"),
        ("--device cpu --dtype bf16", SLOW_DTYPE.format("bf16")),
    ],
    "train_step": [
        ("--shape no-such-model", "llama2-7b"), ("--seq_len 1", "at least 2"), ("--memory_cap much", NO_SIZE),
        ("--v100 --dtype bf16", "fp16"), ("--seq_len 64 --group_size_ratio 0", "group_size_ratio"),
        ("--plot a.png", "name whom to compare with in --peers"),
        ("--peers unsloth", "--peers: unsloth is not installed"),
        ("--memory fast --tile_size 0", "tile_size: 0 is not a whole number of at least 1"),
        ("--optim paged_adamw_8bit --device cpu", "paged_adamw_8bit pages GPU memory"),
        ("--device cpu --dtype bf16", SLOW_DTYPE.format("bf16")),
    ],
}  # fmt: skip


@pytest.mark.parametrize("script,flags,message", [(script, *row) for script, rows in BAD_FLAGS.items() for row in rows])
def test_bad_flags_end_with_one_line(run_here, monkeypatch, capsys, script, flags, message):
    monkeypatch.setattr(longqlora.model.base, "cpu_has_bf16", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run_here(f"{script} {flags}")
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]


def test_prefill_benchmark(run_here):
    printed, record = run_here("prefill --shape tiny --device cpu --num_tokens 600 --prefill_chunk_size 150")
    assert list(record["results"]) == ["dca", "sdpa_with_past", "sdpa"]
    for result in record["results"].values():
        assert len(result["seconds_by_block"]) == 4
        assert math.isclose(result["seconds"], sum(result["seconds_by_block"]))
        assert math.isclose(result["tokens_per_second"], 600 / result["seconds"])
        # Keys and values of 2 layers with 2 heads of 16 numbers, fp32: at least these must be held.
        assert result["extra_bytes"] >= 2 * 2 * 600 * 2 * 16 * 4
    assert "dual chunk attention (chunk 48, local window 8, pretraining length 64)" in printed
    assert record["settings"]["dtype"] == "fp32" and record["machine"]["versions"]["torch"]
    extra = {name: result["extra_bytes"] for name, result in record["results"].items()}
    # The mask: a bool for each query of the block and each key.
    assert extra["sdpa"] >= extra["sdpa_with_past"] + 150 * 600
    assert extra["dca"] < extra["sdpa"]


def test_methods_and_pretraining_length_are_obeyed(run_here):
    words = "--num_tokens 1 --methods dca --pretraining_length 32"
    printed, record = run_here(f"prefill --shape tiny --device cpu {words}")
    assert "pretraining length 32" in printed and "fp32" in printed and "sdpa" not in printed
    assert list(record["results"]) == ["dca"]


def test_dual_chunk_benchmark(run_here):
    words = "--lengths 100 600 --heads 4 --kv_heads 2 --head_dim 16 --pretraining_length 64 --repeats 3 --plot a.png"
    printed, record = run_here(f"dual_chunk_attention {words}")
    assert is_drawn("a.png") and record["results"].keys() == {"100", "600"}
    assert (record["settings"]["chunk_size"], record["settings"]["local_window"]) == (48, 8)
    result = record["results"]["600"]
    # s is 40 tokens: 15 chunks.
    assert (result["num_chunks"], result["num_chunk_pairs"], result["qkv_bytes"]) == (15, 120, 600 * 16 * 8 * 4)
    for figures in result["methods"].values():
        assert len(figures["seconds"]) == 3 and 0 < figures["min_cpu_seconds"]
        assert 0 < figures["min_seconds"] <= figures["median_seconds"]
        assert math.isclose(figures["extra_per_qkv"], figures["extra_bytes"] / result["qkv_bytes"])
        # The output, at least.
        assert figures["extra_bytes"] >= 600 * 16 * 4 * 4
    assert "15 chunks" in printed and "full_sdpa" in printed


@pytest.mark.slow
def test_contestants_take_the_same_step(run_here):
    words = "--shape tiny --seq_len 64 --steps 1 --device cpu --memory all --peers transformers --plot a.png"
    _, record = run_here(f"train_step {words}")
    first = {name: result["losses"][0] for name, result in record["results"].items()}
    assert [name for name in first if name.endswith("s2")] == [f"ours, {memory}, s2" for memory in POLICIES]
    for memory in POLICIES:
        assert first[f"ours, {memory}, full"] == pytest.approx(first["transformers"], rel=1e-4)
    assert is_drawn("a.png")


@pytest.mark.slow
def test_the_longest_row_of_a_tiny_model(run_here):
    words = "--shape tiny --memory_cap 16MiB --sets checkpointing max_length --device cpu --resolution 0.2 --plot a.png"
    _, record = run_here(f"longest {words}")
    lengths = {name: result["length"] for name, result in record["results"].items()}
    assert 0 < lengths["checkpointing"] < lengths["max_length"] and is_drawn("a.png")
