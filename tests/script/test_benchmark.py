"""The benchmarks run and write what they say; what they measure against computes what it claims.

Tolerance: 1e-10 in fp64 where two ways compute the same thing.
"""

import gc
import json
import math
import runpy
import sys
from argparse import Namespace

import live_memory
import longest
import pytest
import step_comparison
import torch
from conftest import REPO
from live_memory import LiveStorages, check_free_memory
from rolled_attention import materialized_attention, rolled_shift_short_attention
from torch.nn.functional import scaled_dot_product_attention

import longqlora.model.base
from longqlora.attention.shift_short import shift_short_attention
from longqlora.device import cpu_has_bf16, is_out_of_memory

G = 8
KIB = 1024


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path):
    """Run a benchmark in this process, which has the slow imports behind it: what it printed, and its JSON file."""

    def run(script, *args):
        file = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", [script, *map(str, args), "--output_file", str(file)])
        runpy.run_path(str(REPO / "benchmark" / f"{script}.py"), run_name="__main__")
        return capsys.readouterr().out, json.loads(file.read_text())

    return run


def inputs(batch=2, heads=4, kv_heads=2, length=4 * G, dim=16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, h, dim) for h in (heads, kv_heads, kv_heads)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).transpose(1, 2) for s in shapes]
    return [x.requires_grad_() for x in tensors]


def wrapped_reference(query, key, value, group_size):
    """The rolled form from its definition: rolled position p = (t - G/2) mod S orders the shifted heads."""
    heads, length, dim = query.shape[1:]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    allowed = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        order = (torch.arange(length) - (group_size // 2 if head >= heads // 2 else 0)) % length
        same_group = order[:, None] // group_size == order[None, :] // group_size
        allowed[head] = same_group & (order[:, None] >= order[None, :])
    scores = query @ key.transpose(-1, -2) / math.sqrt(dim)
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ value


@pytest.mark.parametrize("kernel", [None, materialized_attention])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rolled_form_equals_its_definition(kernel, kv_heads):
    options = {} if kernel is None else {"kernel": kernel}
    # The held scores go through an fp32 softmax, as in LongLoRA's code.
    tolerance = 1e-10 if kernel is None else 1e-6
    results = []
    for method in (lambda *x: rolled_shift_short_attention(*x, G, **options), lambda *x: wrapped_reference(*x, G)):
        tensors = inputs(kv_heads=kv_heads)
        output = method(*tensors)
        output.pow(2).sum().backward()
        results.append([output, *[x.grad for x in tensors]])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=0, atol=10 * tolerance)


def test_rolled_form_differs_from_ours_only_where_it_wraps():
    """Only the first half group of the shifted heads is put behind the sequence's end, and sees it."""
    tensors = [x.detach() for x in inputs()]
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


@pytest.mark.parametrize("script", ["attention", "dual_chunk_attention", "train_step", "prefill"])
def test_a_precision_that_the_cpu_lacks_is_refused(script, run_here, monkeypatch, capsys):
    monkeypatch.setattr(longqlora.model.base, "cpu_has_bf16", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run_here(script, "--device", "cpu", "--dtype", "bf16")
    message = "error: --dtype: this CPU multiplies bf16 many times slower than fp32; use fp32\n"
    assert stop.value.code == 2 and capsys.readouterr().err == message


def test_out_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    check_free_memory(1, torch.device("cpu"))
    with pytest.raises(MemoryError):
        check_free_memory(2**60, torch.device("cpu"))


def test_attention_benchmark(tmp_path, run_here):
    words = "--lengths 128 256 --heads 4 --kv_heads 2 --head_dim 16 --repeats 3 --threads 1 --plot"
    printed, record = run_here("attention", *words.split(), tmp_path / "out.png")
    assert record["results"].keys() == {"128", "256"} and (tmp_path / "out.png").stat().st_size > 1000
    for figures in record["results"].values():
        assert list(figures) == ["s2", "materialized", "rolled_sdpa", "full_sdpa"]
        for result in figures.values():
            assert len(result["seconds"]) == 3 and 0 < result["min_seconds"] <= result["median_seconds"]
    extra = {name: result["extra_bytes"] for name, result in record["results"]["256"].items()}
    assert extra["s2"] < extra["rolled_sdpa"] and extra["s2"] < extra["materialized"]
    # Output and gradients: at least these must be held.
    assert extra["full_sdpa"] >= 256 * 16 * 4 * (4 + 4 + 2 + 2)
    assert record["machine"]["num_threads"] == 1 and record["machine"]["versions"]["torch"] == torch.__version__
    assert "torch" in printed and "materialized" in printed and "median" in printed


def test_attention_benchmark_of_packed_rows(run_here):
    words = "--lengths 256 --document_length 50 --heads 4 --head_dim 16 --repeats 1"
    _, record = run_here("attention", *words.split())
    extra = {name: result["extra_bytes"] for name, result in record["results"]["256"].items()}
    assert {"s2_packed", "s2_masked", "full_packed", "full_masked"} < set(extra)
    assert extra["s2_packed"] < extra["s2_masked"] and extra["full_packed"] < extra["full_masked"]


TRAIN_STEP = ["train_step", "--shape", "tiny", "--seq_len", 256, "--lora_rank", 8, "--steps", 4, "--device", "cpu"]
BF16 = ["--dtype", "bf16"] if cpu_has_bf16() else []


@pytest.mark.parametrize(
    "flags",
    [[], [*BF16, "--train_embedding", "--train_norm"], ["--attention", "full", "--no-gradient_checkpointing"],
     ["--memory", "max_length", "--tile_size", 16, "--profile"]],
    ids=["s2", "trains all", "full", "layer function"],
)  # fmt: skip
def test_train_step(run_here, flags):
    printed, record = run_here(*TRAIN_STEP, *flags)
    losses = record["losses"]
    assert len(losses) == 5 and abs(losses[0] - math.log(320)) < 0.3 and losses[-1] < losses[0]
    assert math.isclose(record["tokens_per_second"], 256 / record["median_seconds"]) and len(record["seconds"]) == 4
    assert record["peak_rss_bytes"] > record["extra_bytes"] > 0 and record["weight_bytes"] > 0 and record["hfu"] > 0
    assert "loss in chunks" in printed and "nf4" in printed
    assert ("full causal" if "full" in flags else "groups of 64 tokens") in printed
    if "--profile" in flags:
        assert 0.5 < sum(row["share"] for row in record["profile"]) <= 1 and record["profile"][0]["milliseconds"] > 0


def test_train_step_of_a_config_file_out_of_memory(tmp_path, run_script, tiny_model_dir):
    outcome = run_script(
        "benchmark/train_step.py", "--shape", tiny_model_dir / "config.json", "--seq_len", 8_000_000,
        "--memory_cap", "1GiB",
    )  # fmt: skip
    assert outcome.returncode == 2 and "Traceback" not in outcome.stderr
    assert "error: out of memory within --memory_cap 1GiB" in outcome.stderr.splitlines()[-1]


def test_random_model_is_like_a_loaded_one(tiny_model_dir):
    """Same parameters, dtypes and quantisation as transformers' 4-bit load; a tied head stays one matrix."""
    from bitsandbytes.nn import Linear4bit
    from random_nf4_model import random_nf4_model, shape_config

    from longqlora.model.base import load_config, load_model

    options = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    config = shape_config(str(tiny_model_dir / "config.json"))
    ours = random_nf4_model(config, **options)
    loaded = load_model(str(tiny_model_dir), load_config(str(tiny_model_dir)), load_in_4bit=True, **options)
    facts = [
        {name: (type(p).__name__, p.shape, p.dtype) for name, p in model.named_parameters()} for model in (ours, loaded)
    ]
    assert facts[0] == facts[1]
    layers = [[m for m in model.modules() if isinstance(m, Linear4bit)] for model in (ours, loaded)]
    assert len(layers[0]) == 14
    for mine, theirs in zip(*layers, strict=True):
        states = mine.weight.quant_state, theirs.weight.quant_state
        assert len({(s.quant_type, s.nested, s.blocksize, s.dtype, s.shape) for s in states}) == 1
        assert mine.compute_dtype == theirs.compute_dtype
    for mine, theirs in zip(ours.buffers(), loaded.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    config.tie_word_embeddings = True
    tied = random_nf4_model(config, **options)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and not tied.lm_head.weight.is_meta


def test_units_of_a_layer(run_here, tmp_path):
    words = "--shapes 7b --seq_len 512 --hidden_size 320 --tile_size 32 --plot"
    printed, record = run_here("layer_memory", *words.split(), tmp_path / "a.png")
    units = {
        name.removeprefix("layer function, tiles of 32 tokens, "): row["units_per_token"]
        for name, row in record["results"]["7b"].items()
    }
    assert units["attention kept, 4 head chunks"] < units["attention kept"] < 9 < units["all kept"] < 16
    assert units["gradient checkpointing off, layers as in transformers"] > 50
    assert f"{units['attention kept']:.2f}" in printed and (tmp_path / "a.png").stat().st_size > 1000


def test_ratios_are_to_the_best_of_the_peers():
    results = {
        "ours, s2": {"median_seconds": 2.0, "extra_bytes": 100, "tokens_per_second": 1},
        "ours, full": {"error": "out of memory"},
        "transformers": {"median_seconds": 6.0, "extra_bytes": 500, "tokens_per_second": 1},
        "trl": {"median_seconds": 4.0, "extra_bytes": 1000, "tokens_per_second": 1},
    }
    summary = step_comparison.ratios(results)
    assert summary == {"ours, s2": {"speed": 2.0, "memory": 0.2}}
    text = step_comparison.format_comparison(results, summary)
    assert "2.00x" in text and "20.0%" in text and "ours, full      out of memory" in text
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


PREFILL = ["prefill", "--shape", "tiny", "--device", "cpu"]


@pytest.mark.parametrize(
    "words,message",
    [
        ("attention --lengths 4098", "no multiple of the group size"),
        ("attention --lengths 3", "too short"),
        ("attention --heads 3", "odd number"),
        ("attention --heads 4 --kv_heads 3", "does not divide"),
        ("attention --repeats 0", "at least 1"),
        ("attention --document_length 0", "--document_length: must be at least 1"),
        ("attention --methods s2 full_packed", "--methods: full_packed needs --document_length"),
        ("attention --group_size_ratio 2", "group_size_ratio"),
        ("attention --dtype fp16", "this CPU multiplies fp16 many times slower than fp32; use fp32"),
        ("attention --device tpu", "cpu or cuda"),
        ("attention --plot figure.txt", "--plot"),
        ("attention --lengths many", "invalid int"),
        ("train_step --shape no-such-model", "llama2-7b"),
        ("train_step --seq_len 1", "at least 2"),
        ("train_step --memory_cap much", "--memory_cap: 'much' is not a size"),
        ("train_step --v100 --dtype bf16", "fp16"),
        ("train_step --seq_len 64 --group_size_ratio 0", "group_size_ratio"),
        ("longest --memory_cap much", "--memory_cap: 'much' is not a size"),
        ("longest --memory_cap 1GiB --resolution 2", "--resolution: must lie in"),
        ("longest --memory_cap 1GiB --longest 1", "--longest: must be at least 2"),
        ("layer_memory --hidden_size 500", "--hidden_size: a multiple of 320"),
        ("layer_memory --plot a.txt", "--plot"),
        ("train_step --plot a.png", "name whom to compare with in --peers"),
        ("train_step --peers unsloth", "--peers: unsloth is not installed"),
        ("train_step --memory fast --tile_size 0", "tile_size: 0 is not a whole number of at least 1"),
        ("train_step --optim paged_adamw_8bit --device cpu", "paged_adamw_8bit pages GPU memory"),
        ("prefill --num_tokens 0", "--num_tokens: must be at least 1"),
        ("prefill --prefill_chunk_size -1", "--prefill_chunk_size: must be at least 1"),
        ("prefill --pretraining_length 0", "--pretraining_length: must be at least 1"),
        ("prefill --v100 --dtype bf16", "--v100 computes in fp16"),
        ("prefill --v100 --device cpu", "--v100 needs a CUDA device"),
        ("prefill --memory_cap much", "--memory_cap: 'much' is not a size"),
        ("prefill --shape nothing-here", "--shape: 'nothing-here' is neither"),
        ("prefill --pretraining_length 100", "pretraining_length: the model reads 64 tokens"),
        ("dual_chunk_attention --lengths 0", "--lengths: "),
        ("dual_chunk_attention --kv_heads 3", "--kv_heads: "),
        ("dual_chunk_attention --head_dim 15", "--head_dim: "),
        ("dual_chunk_attention --chunk_size 5000", "chunk_size: "),
        ("dual_chunk_attention --local_window 0", "local_window: "),
        ("dual_chunk_attention --pretraining_length 2", "pretraining_length: "),
    ],
)
def test_bad_flags_end_with_one_line(run_here, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        run_here(*words.split())
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]


def test_prefill_benchmark(run_here):
    printed, record = run_here(*PREFILL, "--num_tokens", 210, "--prefill_chunk_size", 60)
    assert list(record["results"]) == ["dca", "sdpa_with_past", "sdpa"]
    for result in record["results"].values():
        assert len(result["seconds_by_block"]) == 4
        assert math.isclose(result["seconds"], sum(result["seconds_by_block"]))
        assert math.isclose(result["tokens_per_second"], 210 / result["seconds"])
        # Keys and values of 2 layers with 2 heads of 16 numbers, fp32: at least these must be held.
        assert result["extra_bytes"] >= 2 * 2 * 210 * 2 * 16 * 4
    assert "dual chunk attention (chunk 48, local window 8, pretraining length 64)" in printed
    assert record["settings"]["dtype"] == "fp32" and record["machine"]["versions"]["torch"]


def test_the_mask_of_a_block_is_what_sdpa_holds_more(run_here):
    _, record = run_here(*PREFILL, "--num_tokens", 600, "--prefill_chunk_size", 300)
    extra = {name: result["extra_bytes"] for name, result in record["results"].items()}
    # A bool for each query of the block and each key.
    assert extra["sdpa"] >= extra["sdpa_with_past"] + 300 * 600
    assert extra["dca"] < extra["sdpa"]


def test_methods_and_pretraining_length_are_obeyed(run_here):
    printed, record = run_here(*PREFILL, *"--num_tokens 1 --methods dca --pretraining_length 32".split())
    assert "pretraining length 32" in printed and "fp32" in printed and "sdpa" not in printed
    assert list(record["results"]) == ["dca"]


def test_dual_chunk_benchmark(tmp_path, run_here):
    words = "--lengths 100 600 --heads 4 --kv_heads 2 --head_dim 16 --pretraining_length 64 --repeats 3 --plot"
    printed, record = run_here("dual_chunk_attention", *words.split(), tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000 and record["results"].keys() == {"100", "600"}
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
def test_contestants_take_the_same_step(run_here, tmp_path):
    words = "--shape tiny --seq_len 64 --steps 1 --device cpu --peers transformers --plot"
    _, record = run_here("train_step", *words.split(), tmp_path / "a.png")
    first = {name: result["losses"][0] for name, result in record["results"].items()}
    assert first["ours, full"] == pytest.approx(first["transformers"], rel=1e-4)


@pytest.mark.slow
def test_the_longest_row_of_a_tiny_model(run_here, tmp_path):
    words = "--shape tiny --memory_cap 16MiB --sets checkpointing max_length --device cpu --resolution 0.2 --plot"
    _, record = run_here("longest", *words.split(), tmp_path / "a.png")
    lengths = {name: result["length"] for name, result in record["results"].items()}
    assert 0 < lengths["checkpointing"] < lengths["max_length"] and (tmp_path / "a.png").stat().st_size > 1000
