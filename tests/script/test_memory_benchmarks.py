"""Benchmarks of memory: units of a layer, steps of several contestants, the longest text under a cap."""

import json
import runpy
import sys
from argparse import Namespace

import longest
import pytest
import step_comparison
from conftest import REPO


def run_here(monkeypatch, script: str, *words) -> None:
    """Run benchmark/`script`.py in this process."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    runpy.run_path(str(REPO / "benchmark" / f"{script}.py"), run_name="__main__")


def test_units_of_a_layer(monkeypatch, capsys, tmp_path):
    words = ["--shapes", "7b", "--seq_len", 512, "--hidden_size", 320, "--tile_size", 32]
    run_here(monkeypatch, "layer_memory", *words, "--output_file", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    result = json.loads((tmp_path / "a.json").read_text())["results"]["7b"]
    units = {
        name.removeprefix("layer function, tiles of 32 tokens, "): row["units_per_token"]
        for name, row in result.items()
    }
    assert units["attention kept, 4 head chunks"] < units["attention kept"] < 9 < units["all kept"] < 16
    assert units["gradient checkpointing off, layers as in transformers"] > 50
    assert f"{units['attention kept']:.2f}" in capsys.readouterr().out and (tmp_path / "a.png").stat().st_size > 1000


def test_a_step_with_the_layer_function(monkeypatch, tmp_path):
    words = ["--shape", "tiny", "--seq_len", 64, "--steps", 1, "--device", "cpu", "--output_file", tmp_path / "a.json"]
    run_here(monkeypatch, "train_step", *words, "--memory", "max_length", "--tile_size", 16, "--profile")
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["settings"]["memory"] == "max_length" and result["hfu"] > 0
    assert len(result["losses"]) == 2 and result["losses"][1] < result["losses"][0]
    assert 0.5 < sum(row["share"] for row in result["profile"]) <= 1 and result["profile"][0]["milliseconds"] > 0


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


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("longest", ["--memory_cap", "much"], "--memory_cap: 'much' is not a size"),
        ("longest", ["--memory_cap", "1GiB", "--resolution", "2"], "--resolution: must lie in"),
        ("longest", ["--memory_cap", "1GiB", "--longest", "1"], "--longest: must be at least 2"),
        ("layer_memory", ["--hidden_size", "500"], "--hidden_size: a multiple of 320"),
        ("layer_memory", ["--plot", "a.txt"], "--plot"),
        ("train_step", ["--plot", "a.png"], "name whom to compare with in --peers"),
        ("train_step", ["--peers", "unsloth"], "--peers: unsloth is not installed"),
        ("train_step", ["--memory", "fast", "--tile_size", "0"], "tile_size: must be at least 1"),
        ("train_step", ["--optim", "paged_adamw_8bit", "--device", "cpu"], "paged_adamw_8bit pages GPU memory"),
    ],
)
def test_bad_flags_end_with_one_line(monkeypatch, capsys, script, words, message):
    with pytest.raises(SystemExit) as outcome:
        run_here(monkeypatch, script, *words)
    error = capsys.readouterr().err
    assert outcome.value.code == 2 and message in error and error.count("\n") == 1, error


@pytest.mark.slow
def test_contestants_take_the_same_step(monkeypatch, tmp_path):
    words = ["--shape", "tiny", "--seq_len", 64, "--steps", 1, "--device", "cpu", "--peers", "transformers"]
    run_here(monkeypatch, "train_step", *words, "--output_file", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    first = {name: result["losses"][0] for name, result in results.items()}
    assert first["ours, full"] == pytest.approx(first["transformers"], rel=1e-4)


@pytest.mark.slow
def test_the_longest_row_of_a_tiny_model(monkeypatch, tmp_path):
    words = ["--shape", "tiny", "--memory_cap", "16MiB", "--sets", "checkpointing", "max_length", "--device", "cpu"]
    words += ["--resolution", "0.2", "--output_file", tmp_path / "a.json", "--plot", tmp_path / "a.png"]
    run_here(monkeypatch, "longest", *words)
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert 0 < results["checkpointing"]["length"] < results["max_length"]["length"]
    assert (tmp_path / "a.png").stat().st_size > 1000
