"""The memory plan: which mechanisms the settings get, refusal with advice, and the script that prints it all."""

import json
import math
import runpy
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import REPO, tiny_config

from longqlora.memory import plan as memory_plan
from longqlora.memory.layer_call import LayerOptions
from longqlora.memory.plan import CHECKPOINTING_KEY, advice_on_out_of_memory, plan_memory, yaml_lines
from longqlora.memory.policy import BALANCED, CANDIDATES, CHECKPOINTED, FAST, MAX_LENGTH, STOCK, own_settings
from longqlora.settings.config import MemoryConfig
from longqlora.settings.deepspeed import shards
from longqlora.settings.reader import read_settings

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip


@pytest.fixture
def settings_of(tmp_path):
    def make(**values):
        path = tmp_path / "run.yaml"
        base = {"model_name_or_path": str(tmp_path), "train_file": "no.jsonl", "output_dir": str(tmp_path / "out"),
                "max_seq_length": 8192, "lora_rank": 64}  # fmt: skip
        path.write_text(yaml.safe_dump({**base, **values}))
        return read_settings(str(path), [], needs_data=False)[0]

    return make


def planned(settings, model_type="llama", **sizes):
    return plan_memory(settings, tiny_config(model_type, **sizes))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, STOCK),
        ({"gradient_checkpointing": True}, CHECKPOINTED),
        ({"memory": "fast"}, FAST),
        ({"memory": "balanced", "gradient_checkpointing": True}, BALANCED),
        ({"memory": "auto"}, FAST),
        ({"layer_function": True}, BALANCED),
        ({"layer_function": False, "gradient_checkpointing": True}, CHECKPOINTED),
    ],
)
def test_a_word_chooses_the_mechanisms(settings_of, values, expected):
    settings = settings_of(**values)
    plan = planned(settings)
    assert plan.policy == expected and plan.fits and plan.capacity is None
    assert settings.training[CHECKPOINTING_KEY] == expected.gradient_checkpointing
    is_overruled = values.get("gradient_checkpointing") and expected.layer_function
    assert any("has no effect" in notice for notice in plan.notices) == bool(is_overruled)


def test_own_keys_overrule_the_policy(settings_of):
    plan = planned(settings_of(memory="max_length", num_head_chunks=2, offload_activations=False, tile_size=512))
    assert plan.policy.num_head_chunks == 2 and plan.policy.tile_size == 512
    assert plan.policy.keep_activations == MAX_LENGTH.keep_activations
    assert not plan.policy.offload_activations and plan.policy.optim is None, "no GPU to page from"
    plan = planned(settings_of(layer_function=False, tile_size=512))
    assert plan.policy == STOCK and plan.notices == ["tile_size has no effect with layer_function: false"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory": "lots"}, "memory: 'lots'"),
        ({"keep_activations": "some"}, "keep_activations: 'some'"),
        ({"tile_size": 0}, "tile_size: must be at least 1, got 0"),
        ({"num_head_chunks": -1}, "num_head_chunks: must be at least 1"),
        ({"gpu_memory": "much"}, "gpu_memory: 'much' is not a size"),
        ({"gpu_memory": "32"}, "gpu_memory: '32' is a size without a unit; write one such as 32GB"),
        ({"memory": "auto", "gpu_memory": "0GiB"}, "gpu_memory"),
    ],
)
def test_bad_values_name_their_key(settings_of, values, message):
    with pytest.raises(ValueError, match=message):
        planned(settings_of(**values))


def test_other_models_fall_back_to_checkpointing_and_say_so(settings_of):
    for policy, expected in (("fast", STOCK), ("balanced", CHECKPOINTED), ("max_length", CHECKPOINTED)):
        plan = planned(settings_of(memory=policy), "gpt_neox")
        assert plan.policy == expected
        assert "the layer function is not used, since gpt_neox layers" in plan.notices[0]
    with pytest.raises(ValueError, match="layer_function: not available, since mixtral layers"):
        planned(settings_of(layer_function=True), "mixtral")
    with pytest.raises(ValueError, match="attention_dropout"):
        planned(settings_of(layer_function=True), attention_dropout=0.1)
    settings = settings_of(memory="fast")
    settings.training["deepspeed"] = {"zero_optimization": {"stage": 3}}
    assert "ZeRO-3" in planned(settings).notices[0]


def test_auto_takes_the_fastest_that_fits_a_named_gpu(settings_of):
    chosen = []
    for length in (4096, 16384, 30000, 131072, 310000):
        settings = settings_of(memory="auto", gpu_memory="32GiB", max_seq_length=length, fp16=True)
        plan = planned(settings, **LLAMA_7B)
        assert plan.fits and "of 32.0 GiB" in plan.describe()
        offered = [notice for notice in plan.notices if notice.startswith("memory: auto can take ")]
        assert len(offered) == len(CANDIDATES)
        assert f"{plan.policy.describe()}: {plan.estimate.peak / 2**30:.2f} GiB" in "\n".join(offered)
        chosen.append([candidate.describe() for candidate in CANDIDATES].index(plan.policy.describe()))
    assert chosen == sorted(set(chosen)), "longer texts, leaner sets, each time another"
    assert settings.training.get("optim") is None, "a plan for another machine's GPU sets no optimizer here"


def test_auto_leaves_room_where_a_named_policy_does_not(settings_of):
    values = {"max_seq_length": 8192, "fp16": True}
    peak = planned(settings_of(memory="fast", gpu_memory="999GiB", **values), **LLAMA_7B).estimate.peak
    roomy, tight = f"{round(peak / 0.91)}", f"{round(peak / 0.95)}"
    for policy, size, expected in (
        ("fast", tight, FAST), ("auto", roomy, FAST), ("auto", tight, replace(FAST, keep_activations="projections"))
    ):  # fmt: skip
        plan = planned(settings_of(memory=policy, gpu_memory=size, **values), **LLAMA_7B)
        assert plan.fits and plan.policy == expected


@pytest.mark.parametrize("policy", [{"gradient_checkpointing": True}, {"memory": "fast"}, {"memory": "max_length"}])
def test_what_cannot_fit_is_refused_with_advice_that_fits(settings_of, policy):
    values = {"gpu_memory": "16GiB", "max_seq_length": 65536, "fp16": True}
    if policy == {"memory": "max_length"}:
        values["max_seq_length"] = 400_000
    with pytest.raises(ValueError, match=r"is predicted to take [\d.]+ GiB of the 16.0 GiB at hand; ") as refusal:
        planned(settings_of(**values, **policy), **LLAMA_7B)
    advice = str(refusal.value).split("at hand; ")[1]
    assert "\n" not in advice
    if advice.startswith("add "):
        lines = dict(pair.split(": ") for pair in advice.removeprefix("add ").split(" (")[0].split("; "))
        mended = yaml.safe_load(json.dumps({**values, **policy}))
        assert planned(settings_of(**{**mended, **{k: yaml.safe_load(v) for k, v in lines.items()}}), **LLAMA_7B).fits
    else:
        longest = int(advice.split("max_seq_length: ")[1].split(";")[0])
        values["max_seq_length"] = longest
        lean = dict(line.split(": ") for line in yaml_lines(CANDIDATES[-1]).splitlines())
        lean = {key: yaml.safe_load(value) for key, value in lean.items()}
        assert planned(settings_of(**values, **lean), **LLAMA_7B).fits and longest > 50_000


def test_a_card_that_holds_no_length_at_all(settings_of):
    with pytest.raises(ValueError, match="do not fit at any length; use a smaller model, or a larger GPU"):
        planned(settings_of(memory="auto", gpu_memory="2GiB", fp16=True), **LLAMA_7B)


def test_mechanisms_that_cannot_do_what_they_say_are_named(settings_of):
    values = {"memory": "balanced", "offload_activations": True, "num_head_chunks": 64}
    notices = planned(settings_of(**values), **LLAMA_7B).notices
    assert "offload_activations has no effect without a GPU: activations are in host memory as it is" in notices
    assert "num_head_chunks: 64 acts as 32, the key/value heads" in notices
    named = planned(settings_of(**values | {"num_head_chunks": 32, "gpu_memory": "80GiB"}), **LLAMA_7B).notices
    assert not any("offload" in notice or "num_head_chunks" in notice for notice in named)


def test_running_out_of_memory_ends_with_advice(settings_of):
    plan = planned(settings_of(memory="fast", max_seq_length=64))
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")):
        with pytest.raises(ValueError, match="out of memory with layer function.*; add memory: fast; keep"):
            with advice_on_out_of_memory(plan):
                raise error
    with pytest.raises(RuntimeError, match="shapes"), advice_on_out_of_memory(plan):
        raise RuntimeError("shapes do not match")


def test_defaults_of_the_layer_function_are_those_of_balanced():
    assert own_settings(MemoryConfig()) == {}
    options = LayerOptions()
    assert options.keep == BALANCED.keep_activations and options.num_head_chunks == BALANCED.num_head_chunks


@pytest.fixture
def seven_b(tmp_path):
    tiny_config(**LLAMA_7B).save_pretrained(tmp_path / "seven")
    settings = tmp_path / "plan.yaml"
    values = {"model_name_or_path": str(tmp_path / "seven"), "train_file": "nowhere.jsonl", "output_dir": "nowhere",
              "max_seq_length": 8192, "fp16": True, "gradient_checkpointing": True}  # fmt: skip
    settings.write_text(yaml.safe_dump(values))
    return settings


def test_script_prints_the_table_from_config_and_yaml_alone(seven_b, tmp_path, run_script):
    arguments = ["--train_args_file", seven_b, "--gpu_memory", "32GiB", "--seq", 8192, 100000]
    outcome = run_script(
        "script/plan_memory.py", *arguments, "--output_file", tmp_path / "plan.json", "--attention", "full",
        cwd=tmp_path, check=True,
    )  # fmt: skip
    table = json.loads((tmp_path / "plan.json").read_text())
    assert len(table["sets"]) == 2 + len(CANDIDATES) and table["fastest"]["8192"] == [
        "memory: fast",
        "keep_activations: projections",
    ]
    assert table["fastest"]["100000"] == ["memory: balanced", "offload_activations: true"]
    by_settings = {"; ".join(row["settings"]): row for row in table["sets"]}
    longest = [row["longest"] for row in table["sets"][2:]]
    assert longest == sorted(longest) and longest[-1] > 262_144
    assert by_settings["memory: balanced; offload_activations: true"]["host_gib"] > 10
    assert "100000 tokens: memory: balanced; offload_activations: true" in outcome.stdout
    for row in table["sets"]:
        assert f"{row['peak_gib']['8192']:.1f}" in outcome.stdout and row["mechanisms"] in outcome.stdout


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({}, (1, 1)),
        ({"stage": 1}, (1, 8)),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, (1, 8)),
        ({"stage": 3}, (8, 8)),
        ({"stage": 3, "offload_param": {"device": "none"}}, (8, 8)),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, (math.inf, 8)),
    ],
)
def test_what_each_zero_stage_splits_among_eight(zero, expected):
    assert shards({"zero_optimization": zero}, 8) == expected
    assert shards(None, 8) == (1, 1)


def test_zero_3_is_planned_for_the_gpus_that_share_the_weights(seven_b, tmp_path, run_script):
    words = ["--train_args_file", seven_b, "--seq", 8192, "--finetuning_type", "lora"]
    words += ["--deepspeed", "train_args/deepspeed/zero3.json"]
    peaks = []
    for num_gpus in (1, 8):
        file = tmp_path / f"{num_gpus}.json"
        outcome = run_script("script/plan_memory.py", *words, "--num_gpus", num_gpus, "--output_file", file, check=True)
        assert "the layer function is not available, since DeepSpeed ZeRO-3" in outcome.stdout
        peaks.append(json.loads(file.read_text())["sets"][1]["peak_gib"]["8192"])
    assert peaks[0] > 17 > 10 > peaks[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_gpus", "0"], "--num_gpus: must be at least 1"),
        (["--gpu_memory", "big"], "--gpu_memory: 'big' is not a size"),
        (["--seq", "1"], "--seq: must be at least 2"),
        (["--memory", "lots"], "memory: 'lots'"),
        (["--output_file", "/proc/no/plan.json"], "/proc/no"),
        (["--model_name_or_path", "/no/model"], "model_name_or_path"),
    ],
)
def test_script_refuses_in_one_line(seven_b, monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", "--train_args_file", str(seven_b), *words])
    with pytest.raises(SystemExit) as outcome:
        runpy.run_path(str(REPO / "script/plan_memory.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert outcome.value.code == 2 and message in error and error.count("\n") == 1, error


def test_candidates_are_named_by_settings_that_ask_for_it(settings_of):
    for candidate in CANDIDATES:
        values = dict(line.split(": ") for line in yaml_lines(candidate).splitlines())
        plan = planned(settings_of(**{key: yaml.safe_load(value) for key, value in values.items()}))
        names = ("keep_activations", "tile_size", "num_head_chunks", "offload_activations")
        assert [getattr(plan.policy, name) for name in names] == [getattr(candidate, name) for name in names]


def test_host_memory_counts(settings_of, monkeypatch):
    monkeypatch.setattr(memory_plan, "has_gpu", lambda settings: True)
    monkeypatch.setattr(memory_plan, "free_host_memory", lambda: 2**30)
    values = {"gpu_memory": "32GiB", "max_seq_length": 65536, "fp16": True}
    plan = planned(settings_of(memory="auto", **values), **LLAMA_7B)
    assert not plan.policy.offload_activations
    with pytest.raises(ValueError, match="GiB of host memory, 1.0 GiB are free"):
        planned(settings_of(memory="max_length", **values), **LLAMA_7B)
