"""The comparison of methods: cells equal evaluate.py's numbers, settings are checked by name."""

import json
from dataclasses import fields

import numpy as np
import pytest
from conftest import save_tiny_model, tiny_config

from longqlora.evaluation.comparison import read_comparison
from longqlora.evaluation.trials import run_trials
from longqlora.model.context_request import ContextRequest

METHODS = """
  none: {}
  PI: {rope_type: linear}
  NTK: {rope_type: ntk}
  dynamic: {rope_type: dynamic}
  YaRN: {rope_type: yarn}
  llama3: {rope_type: llama3}
  theta: {rope_type: theta, rope_theta: 500000}
  DCA: {attention: dca}
  DCA on PI: {attention: dca, rope_type: linear, pretraining_length: 128}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "ids.bin"
    np.random.default_rng(0).integers(4, 320, 2000).astype("<u2").tofile(path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer):
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", tiny_tokenizer, tiny_config(head_dim=16))


def write_yaml(folder, base, data, methods=METHODS, **settings):
    values = {"base_model": base, "lengths": "[64, 160]", "data_path": data, "sliding_window": 200, "max_windows": 4,
              "dtype": "fp32", **settings}  # fmt: skip
    path = folder / "compare.yaml"
    path.write_text("".join(f"{k}: {v}\n" for k, v in values.items() if v is not None) + f"methods:{methods}\n")
    return path


def run(path, output_file=None, seen=None):
    """The record of the comparison in a YAML, of the trials that `seen` gets five before it is interrupted."""
    task = read_comparison(str(path), {})
    (trials,) = task.make_trials()

    def ask(trial):
        if seen is not None:
            seen.append(trial)
            if len(seen) == 6:
                raise KeyboardInterrupt
        return task.ask(trial)

    return task.score(run_trials(trials, ask, output_file=output_file, fingerprint=task.settings, desc=""))


def test_every_cell_equals_evaluate(base, data, tmp_path, evaluate):
    """A context that was changed in place, through the methods in both orders, is that of a fresh load."""
    task = read_comparison(str(write_yaml(tmp_path, base, data)), {})
    (trials,) = task.make_trials()
    result = task.score([task.ask(trial) for trial in trials])
    assert result == task.score([task.ask(trial) for trial in reversed(trials)][::-1])
    for name, method in task.methods.items():
        asked = {item.name: getattr(method.at(160), item.name) for item in fields(ContextRequest)}
        words = [word for name, value in asked.items() if value for word in (f"--{name}", value)]
        code, _, err = evaluate("evaluate", "--base_model", base, "--data_path", data, "--seq_len", 160, *words,
                                "--sliding_window", 200, "--max_windows", 4,
                                "--output_file", tmp_path / "single.json")  # fmt: skip
        assert code == 0, err
        single, model = json.loads((tmp_path / "single.json").read_text()), result["models"][name][160]
        assert result["results"][name][160]["loss"] == single["loss"]
        assert (model["context_size"], model["attention"]) == (single["context_size"], single["attention"])
    at_64 = {result["results"][name][64]["loss"] for name in ("none", "PI", "NTK", "dynamic", "YaRN", "llama3")}
    assert len(at_64) == 1, "within its own length, a method scaled to that length changes nothing"
    assert len({cells[160]["loss"] for cells in result["results"].values()}) == len(result["results"])


def test_a_comparison_goes_on_with_new_methods(base, data, tmp_path, monkeypatch):
    import longqlora.evaluation.comparison as module

    loads, load, seen = [], module.load_for_inference, []
    monkeypatch.setattr(module, "load_for_inference", lambda *a, **k: loads.append(1) or load(*a, **k))
    yaml, output = write_yaml(tmp_path, base, data, "\n  none: {}\n  PI: {rope_type: linear}"), tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        run(yaml, output, seen)
    write_yaml(tmp_path, base, data, "\n  none: {}\n  PI: {rope_type: linear}\n  NTK: {rope_type: ntk}")
    found = run(yaml, output, seen)
    assert len(seen) - 1 == 3 * 2 * 4, "no window was scored twice"
    assert found == run(yaml) and len(loads) == 3, "weights are loaded once for all RoPE methods"
    write_yaml(tmp_path, base, data, "\n  none: {}\n  PI: {rope_type: yarn}")
    run(yaml, output, seen)
    assert len(seen) - 1 == 4 * 2 * 4, "a method of other settings is another, whatever its name"


def test_blocks_need_no_mask_in_any_method(base, data, tmp_path):
    task = read_comparison(str(write_yaml(tmp_path, base, data, prefill_chunk_size=32)), {})
    names = {name: task.model(name, 160).model.config._attn_implementation for name in ("none", "DCA", "YaRN")}
    assert names["none"] == names["YaRN"] == "sdpa_no_mask" and names["DCA"].startswith("dca_")


BAD = {
    "unknown key": ({"lengthes": "[3]"}, METHODS, "lengthes: unknown setting"),
    "bad rope_type": ({}, "\n  PI: {rope_type: spiral}", "methods: PI: rope_type"),
    "theta without base": ({}, "\n  T: {rope_type: theta}", "rope_theta"),
    "no methods": ({}, " {}", "methods: give a mapping"),
    "method is a list": ({}, "\n  PI: [linear]", "methods: PI: give a mapping"),
    "no adapter": ({}, "\n  A: {peft_model: nowhere}", "peft_model"),
    "lengths": ({"lengths": "[0]"}, METHODS, "lengths: give"),
    "no data": ({"data_path": None}, METHODS, "data_path: perplexity needs"),
    "data not there": ({"data_path": "nowhere.bin"}, METHODS, "data_path: no file"),
    "too short": ({"lengths": "[5000]"}, METHODS, "5000"),
    "measure": ({"measure": "speed"}, METHODS, "measure: 'speed'"),
    "dca without room": ({}, "\n  D: {attention: dca, pretraining_length: 4}", "pretraining_length"),
    "dca beyond rope": ({}, "\n  D: {attention: dca, pretraining_length: 4096}", "methods: D: pretraining_length"),
    "no base": ({"base_model": "./nowhere"}, METHODS, "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_one_line(name, base, data, tmp_path):
    """Everything that the script does before weights are loaded."""
    settings, methods, text = BAD[name]
    path = write_yaml(tmp_path, base, data, methods, **settings)
    with pytest.raises(ValueError) as error:
        read_comparison(str(path), {}).make_trials()
    assert text in str(error.value)


@pytest.mark.parametrize("name", ["compare", "compare-books", "compare-passkey"])
def test_the_shipped_yamls_are_valid(repo, monkeypatch, name):
    monkeypatch.setattr("longqlora.evaluation.comparison.input_path", lambda key, value: value)
    monkeypatch.setattr("longqlora.evaluation.comparison.require_folder", lambda path, flag: path)
    settings = read_comparison(str(repo / "script" / "evaluate" / f"{name}.yaml"), {})
    assert {"none", "PI", "NTK", "dynamic NTK", "YaRN", "DCA"} <= set(settings.methods)
