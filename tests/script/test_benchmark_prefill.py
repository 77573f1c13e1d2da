"""The benchmarks of long prompts run in a tiny shape on a CPU and write what they say."""

import json
import math
import runpy
import sys

import pytest

PREFILL = ["prefill", "--shape", "tiny", "--device", "cpu"]


@pytest.fixture
def run_here(repo, monkeypatch, capsys):
    """Run a benchmark in this process, which has the slow imports behind it; returns what it printed."""

    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        runpy.run_path(str(repo / "benchmark" / f"{script}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def error_of(run_here, capsys):
    """The one line that a benchmark prints on bad input."""

    def run(script, *args):
        with pytest.raises(SystemExit) as exit:
            run_here(script, *args)
        lines = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and lines[-1].startswith("error: ")
        return lines[-1]

    return run


def test_prefill_benchmark(tmp_path, run_script):
    out = tmp_path / "out.json"
    outcome = run_script(
        "benchmark/prefill.py", *PREFILL[1:], "--num_tokens", 210, "--prefill_chunk_size", 60, "--output_file", out,
        check=True, cwd=tmp_path,
    )  # fmt: skip
    record = json.loads(out.read_text())
    assert list(record["results"]) == ["dca", "sdpa_with_past", "sdpa"]
    for result in record["results"].values():
        assert len(result["seconds_by_block"]) == 4
        assert math.isclose(result["seconds"], sum(result["seconds_by_block"]))
        assert math.isclose(result["tokens_per_second"], 210 / result["seconds"])
        # Keys and values of 2 layers with 2 heads of 16 numbers, fp32: at least these must be held.
        assert result["extra_bytes"] >= 2 * 2 * 210 * 2 * 16 * 4
    assert "dual chunk attention (chunk 48, local window 8, pretraining length 64)" in outcome.stdout
    assert record["settings"]["dtype"] == "fp32" and record["machine"]["versions"]["torch"]


def test_the_mask_of_a_block_is_what_sdpa_holds_more(tmp_path, run_here):
    out = tmp_path / "out.json"
    run_here(*PREFILL, "--num_tokens", 600, "--prefill_chunk_size", 300, "--output_file", out)
    extra = {name: result["extra_bytes"] for name, result in json.loads(out.read_text())["results"].items()}
    # A bool for each query of the block and each key.
    assert extra["sdpa"] >= extra["sdpa_with_past"] + 300 * 600
    assert extra["dca"] < extra["sdpa"]


def test_methods_and_pretraining_length_are_obeyed(tmp_path, run_here):
    out = tmp_path / "out.json"
    flags = ["--num_tokens", 1, "--methods", "dca", "--pretraining_length", 32]
    text = run_here(*PREFILL, *flags, "--output_file", out)
    assert "pretraining length 32" in text and "fp32" in text and "sdpa" not in text
    assert list(json.loads(out.read_text())["results"]) == ["dca"]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--num_tokens", 0], "--num_tokens: must be at least 1"),
        (["--prefill_chunk_size", -1], "--prefill_chunk_size: must be at least 1"),
        (["--pretraining_length", 0], "--pretraining_length: must be at least 1"),
        (["--v100", "--dtype", "bf16"], "--v100 computes in fp16"),
        (["--v100"], "--v100 needs a CUDA device"),
        (["--memory_cap", "much"], "--memory_cap: 'much' is not a size"),
        (["--dtype", "fp16"], "--dtype: this CPU multiplies fp16"),
        (["--shape", "nothing-here"], "--shape: 'nothing-here' is neither"),
        (["--pretraining_length", 100], "pretraining_length: the model reads 64 tokens"),
    ],
)
def test_prefill_benchmark_refuses(error_of, flags, message):
    assert error_of(*PREFILL, *flags).startswith(f"error: {message}")


def test_dual_chunk_benchmark(tmp_path, run_here):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    text = run_here(
        "dual_chunk_attention", "--lengths", 100, 600, "--heads", 4, "--kv_heads", 2, "--head_dim", 16,
        "--pretraining_length", 64, "--repeats", 3, "--output_file", out, "--plot", plot,
    )  # fmt: skip
    record = json.loads(out.read_text())
    assert plot.stat().st_size > 1000 and record["results"].keys() == {"100", "600"}
    assert (record["settings"]["chunk_size"], record["settings"]["local_window"]) == (48, 8)
    result = record["results"]["600"]
    # s is 40 tokens: 15 chunks.
    assert (result["num_chunks"], result["num_chunk_pairs"], result["qkv_bytes"]) == (15, 120, 600 * 16 * 8 * 4)
    for figures in result["methods"].values():
        assert (
            len(figures["seconds"]) == 3
            and 0 < figures["min_cpu_seconds"]
            and 0 < figures["min_seconds"] <= figures["median_seconds"]
        )
        assert math.isclose(figures["extra_per_qkv"], figures["extra_bytes"] / result["qkv_bytes"])
        # The output, at least.
        assert figures["extra_bytes"] >= 600 * 16 * 4 * 4
    assert "15 chunks" in text and "full_sdpa" in text


BAD_FLAGS = [
    ["--lengths", 0], ["--kv_heads", 3], ["--head_dim", 15], ["--repeats", 0], ["--device", "tpu"], ["--dtype", "fp16"],
    ["--plot", "x.txt"], ["--chunk_size", 5000], ["--local_window", 0], ["--pretraining_length", 2],
]  # fmt: skip


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=lambda flags: flags[0])
def test_dual_chunk_benchmark_refuses(error_of, flags):
    assert f"{flags[0].removeprefix('--')}: " in error_of("dual_chunk_attention", *flags)
