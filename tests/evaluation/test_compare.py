"""The comparison of methods: cells equal evaluate.py's numbers, settings are checked by name."""

import json
from dataclasses import fields

import numpy as np
import pytest
from conftest import save_tiny_model, tiny_config

import longqlora.evaluation.comparison as module
from longqlora.evaluation.comparison import read_comparison
from longqlora.evaluation.trials import run_trials
from longqlora.model.context_request import ContextRequest

LINEAR = {"rope_type": "linear"}
METHODS = {
    "none": {}, "PI": LINEAR, **{name: {"rope_type": name} for name in ("ntk", "dynamic", "yarn", "llama3")},
    "theta": {"rope_type": "theta", "rope_theta": 500000}, "DCA": {"attention": "dca"},
    "DCA on PI": {"attention": "dca", **LINEAR, "pretraining_length": 128},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "ids.bin"
    np.random.default_rng(0).integers(4, 320, 2000).astype("<u2").tofile(path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer):
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", tiny_tokenizer, tiny_config(head_dim=16))


def read(base, data, tmp_path, **settings):
    """The comparison in a YAML with these settings; JSON is YAML."""
    values = {"base_model": str(base), "lengths": [64, 160], "data_path": str(data), "sliding_window": 200,
              "max_windows": 4, "dtype": "fp32", "methods": METHODS, **settings}  # fmt: skip
    (tmp_path / "compare.yaml").write_text(json.dumps(values))
    return read_comparison(str(tmp_path / "compare.yaml"), {})


def test_every_cell_equals_evaluate(base, data, tmp_path, evaluate):
    """A context that was changed in place, through the methods in both orders, is that of a fresh load."""
    task = read(base, data, tmp_path)
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
    at_64 = {result["results"][name][64]["loss"] for name in ("none", "PI", "ntk", "dynamic", "yarn", "llama3")}
    assert len(at_64) == 1, "within its own length, a method scaled to that length changes nothing"
    assert len({cells[160]["loss"] for cells in result["results"].values()}) == len(result["results"])


def test_a_comparison_goes_on_with_new_methods(base, data, tmp_path, monkeypatch):
    loads, load = [], module.load_for_inference
    monkeypatch.setattr(module, "load_for_inference", lambda *a, **k: loads.append(1) or load(*a, **k))

    def run(**methods) -> tuple[dict, list[str]]:
        """The record, and the method of each trial that was asked."""
        task, asked = read(base, data, tmp_path, methods=methods), []
        options = {"output_file": tmp_path / "out.json", "fingerprint": task.settings, "desc": ""}

        def ask(trial):
            asked.append(trial["method"])
            return task.ask(trial)

        return task.score(run_trials(task.make_trials()[0], ask, **options)), asked

    first, asked = run(none={}, PI=LINEAR)
    assert asked == ["none"] * 8 + ["PI"] * 8 and len(loads) == 1, "weights are loaded once for all RoPE methods"
    more, asked = run(none={}, PI=LINEAR, NTK={"rope_type": "ntk"})
    assert asked == ["NTK"] * 8 and more["results"].items() > first["results"].items()
    assert run(none={}, PI={"rope_type": "yarn"})[1] == ["PI"] * 8, "another method, whatever its name"


def test_blocks_need_no_mask_in_any_method(base, data, tmp_path):
    task = read(base, data, tmp_path, prefill_chunk_size=32)
    names = {name: task.model(name, 160).model.config._attn_implementation for name in ("none", "DCA", "yarn")}
    assert names["none"] == names["yarn"] == "sdpa_no_mask" and names["DCA"].startswith("dca_")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengthes": [3]}, "lengthes: unknown setting"),
        ({"methods": {"PI": {"rope_type": "spiral"}}}, "methods: PI: rope_type"),
        ({"methods": {"T": {"rope_type": "theta"}}}, "rope_theta"),
        ({"methods": {}}, "methods: give a mapping"),
        ({"methods": {"PI": ["linear"]}}, "methods: PI: give a mapping"),
        ({"methods": {"A": {"peft_model": "nowhere"}}}, "peft_model"),
        ({"lengths": [0]}, "lengths: give"),
        ({"data_path": None}, "data_path: perplexity needs"),
        ({"data_path": "nowhere.bin"}, "data_path: no file"),
        ({"lengths": [5000]}, "5000"),
        ({"measure": "speed"}, "measure: 'speed'"),
        ({"measure": "passkey", "num_trials": 0}, "num_trials: must be at least 1"),
        ({"methods": {"D": {"attention": "dca", "pretraining_length": 4096}}}, "methods: D: pretraining_length"),
        ({"base_model": "./nowhere"}, "nowhere"),
    ],
)
def test_bad_settings_are_one_line(settings, message, base, data, tmp_path):
    """Everything that the script does before weights are loaded."""
    with pytest.raises(ValueError, match=message):
        read(base, data, tmp_path, **settings).make_trials()


def test_the_first_yaml_runs_on_a_fresh_clone(repo, monkeypatch):
    """Every path in it is a file of the repository, and its first windows are read by its first method."""
    monkeypatch.chdir(repo)
    task = read_comparison("script/evaluate/compare.yaml", {"max_windows": "1"})
    paths = [task.base_model, *(str(path) for path in task.inputs["data_path"])]
    assert all(path.startswith("data/") for path in paths), "output/ is not in the repository"
    assert not any(method.peft_model for method in task.methods.values())
    (trials,) = task.make_trials()
    assert 2 < task.score([task.ask(trial) for trial in trials[:1]])["results"]["none"][256]["perplexity"] < 30


@pytest.mark.parametrize("name", ["compare", "compare-books", "compare-passkey", "compare-demo"])
def test_the_shipped_yamls_are_valid(repo, monkeypatch, name):
    monkeypatch.setattr("longqlora.evaluation.comparison.input_path", lambda key, value: value)
    monkeypatch.setattr("longqlora.evaluation.comparison.require_folder", lambda path, flag: path)
    settings = read_comparison(str(repo / "script" / "evaluate" / f"{name}.yaml"), {})
    names = {method.removeprefix("base + ") for method in settings.methods}
    assert {"PI", "NTK", "dynamic NTK", "YaRN", "DCA"} <= names and names & {"none", "base"}
