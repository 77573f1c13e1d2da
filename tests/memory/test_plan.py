"""The memory plan: which policy the settings get, refusal with advice, and the script that prints it all."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import REPO, tiny_config
from rigged_model import load_script, run_main_of

from longqlora.memory import plan as memory_plan
from longqlora.memory.plan import plan_memory
from longqlora.memory.policy import BALANCED, CANDIDATES, CHECKPOINTED, CHECKPOINTING_KEY, FAST, MAX_LENGTH, STOCK
from longqlora.settings.deepspeed import shards
from longqlora.settings.reader import resolve_settings

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip


@pytest.fixture
def settings_of(tmp_path):
    """Settings for a machine without a GPU, or with one of `gpu_memory`."""

    def make(**values):
        path = tmp_path / "run.yaml"
        base = {"model_name_or_path": str(tmp_path), "train_file": "no.jsonl", "output_dir": str(tmp_path / "out"),
                "max_seq_length": 8192, "lora_rank": 64, "use_cpu": True}  # fmt: skip
        path.write_text(yaml.safe_dump({**base, **values}))
        return resolve_settings(str(path), [], for_this_machine=False)[0]

    return make


@pytest.fixture
def planned(settings_of):
    """planned(model type, shape, settings): the plan, the changed settings and the texts of the notices."""

    def planned(model_type="llama", shape=(), **values):
        plan, settings, notices = plan_memory(settings_of(**values), tiny_config(model_type, **dict(shape)))
        return plan, settings, [notice.text for notice in notices]

    return planned


def asked(lines: list[str]) -> dict:
    """Lines of a YAML as values."""
    return yaml.safe_load("\n".join(lines))


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
        ({"layer_function": False, "memory": "fast"}, STOCK),
        # No GPU to page an optimizer from.
        (
            {"memory": "max_length", "num_head_chunks": 2, "tile_size": 512},
            replace(MAX_LENGTH, num_head_chunks=2, tile_size=512, optim=None),
        ),
    ],
)
def test_a_word_chooses_the_policy_and_own_keys_overrule_it(settings_of, values, expected):
    before = settings_of(**values)
    plan, settings, notices = plan_memory(before, tiny_config())
    assert plan.policy == expected and plan.capacity == math.inf
    assert settings.training == {**before.training, CHECKPOINTING_KEY: expected.gradient_checkpointing}
    assert before.training.get(CHECKPOINTING_KEY) == values.get("gradient_checkpointing"), "nothing is written there"
    is_overruled = bool(values.get("gradient_checkpointing") and expected.layer_function)
    assert [notice.level for notice in notices if "has no effect" in notice.text] == [logging.WARNING] * is_overruled


def test_a_policy_brings_its_optimizer_to_a_gpu_where_the_user_names_none(settings_of, monkeypatch):
    for values, optim in (({}, "paged_adamw_8bit"), ({"optim": "sgd"}, "sgd")):
        settings = replace(settings_of(memory="max_length", gpu_memory="32GiB", **values), uses_gpu=True)
        plan, settings, _ = plan_memory(settings, tiny_config())
        assert settings.training["optim"] == optim and (plan.policy.optim is None) == bool(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory": "lots"}, "memory: 'lots'"),
        ({"keep_activations": "some"}, "keep_activations: 'some'"),
        ({"tile_size": 0}, "tile_size: 0 is not a whole number of at least 1"),
        ({"num_head_chunks": -1}, "num_head_chunks: -1 is not .* at least 1"),
        ({"gpu_memory": "much"}, "gpu_memory: 'much' is not a size"),
        ({"gpu_memory": "32"}, "gpu_memory: '32' is a size without a unit; write one such as 32GB"),
        ({"memory": "auto", "gpu_memory": "0GiB"}, "gpu_memory"),
        ({"memory": "auto", "gpu_memory": "2GiB"}, "do not fit at any length; use a smaller model, or a larger GPU"),
    ],
)
def test_bad_values_name_their_key(planned, values, message):
    with pytest.raises(ValueError, match=message):
        planned(shape=LLAMA_7B, **values)


def test_other_models_fall_back_to_checkpointing_and_say_so(planned):
    expected_of = {"fast": STOCK, "balanced": CHECKPOINTED, "max_length": CHECKPOINTED, "auto": STOCK}
    for policy, expected in expected_of.items():
        plan, _, notices = planned("gpt_neox", memory=policy)
        assert plan.policy == expected
        assert "the layer function is not used, since gpt_neox layers" in notices[0]
    zero3 = {"zero_optimization": {"stage": 3}}
    assert "ZeRO-3" in planned(memory="fast", finetuning_type="lora", deepspeed=zero3)[2][0]
    for model_type, shape, reason in (("mixtral", {}, "mixtral layers"), ("llama", {"attention_dropout": 0.1}, "atte")):
        with pytest.raises(ValueError, match=f"layer_function: not available, since .*{reason}"):
            planned(model_type, shape, layer_function=True)


def test_auto_takes_the_fastest_that_fits_a_named_gpu(planned):
    chosen = []
    for length in (4096, 16384, 30000, 131072, 310000):
        plan, settings, notices = planned(
            shape=LLAMA_7B, memory="auto", gpu_memory="32GiB", max_seq_length=length, fp16=True
        )
        assert "of 32.0 GiB" in plan.describe() and plan.estimate.peak < plan.capacity
        offered = [notice for notice in notices if notice.startswith("memory: auto can take ")]
        assert len(offered) == len(CANDIDATES)
        assert f"{plan.policy.describe()}: {plan.estimate.peak / 2**30:.2f} GiB" in "\n".join(offered)
        chosen.append(CANDIDATES.index(plan.policy))
    assert chosen == sorted(set(chosen)), "longer texts, leaner policies, each time another"
    assert settings.training.get("optim") is None, "a plan for another machine's GPU sets no optimizer here"


def test_auto_leaves_room_where_a_named_policy_does_not(planned):
    values = {"shape": LLAMA_7B, "max_seq_length": 8192, "fp16": True}
    peak = planned(memory="fast", gpu_memory="999GiB", **values)[0].estimate.peak
    roomy, tight = f"{round(peak / 0.91)}", f"{round(peak / 0.95)}"
    for word, size, expected in (
        ("fast", tight, FAST), ("auto", roomy, FAST), ("auto", tight, replace(FAST, keep_activations="projections"))
    ):  # fmt: skip
        assert planned(memory=word, gpu_memory=size, **values)[0].policy == expected


@pytest.mark.parametrize(
    ("values", "length"),
    [({"gradient_checkpointing": True}, 65536), ({"memory": "fast"}, 65536), ({"memory": "max_length"}, 400_000)],
)
def test_what_cannot_fit_is_refused_with_advice_that_fits(planned, values, length):
    values = {"gpu_memory": "16GiB", "max_seq_length": length, "fp16": True, **values}
    refusal = r"is predicted to take [\d.]+ GiB of the 16.0 GiB available; [^\n]*$"
    with pytest.raises(ValueError, match=refusal) as refused:
        planned(shape=LLAMA_7B, **values)
    advice = str(refused.value).split("available; ")[1]
    if advice.startswith("add "):
        values |= asked(advice.removeprefix("add ").split(" (")[0].split("; "))
    else:
        longest = int(advice.split("max_seq_length: ")[1].split(";")[0])
        values |= {"max_seq_length": longest, **asked(CANDIDATES[-1].as_settings())}
        assert longest > 50_000
    planned(shape=LLAMA_7B, **values)


def test_a_row_that_processes_share_may_be_longer(settings_of):
    """The advice is in tokens of the whole row."""
    longest = []
    for size in (1, 4):
        settings = settings_of(sequence_parallel_size=size, gpu_memory="32GiB", fp16=True, max_seq_length=1000)
        planner = memory_plan.MemoryPlan.of(settings, tiny_config(**LLAMA_7B))
        longest.append(planner.longest(CHECKPOINTED, planner.capacity))
    assert longest[1] == pytest.approx(4 * longest[0], rel=0.01)


def test_parts_that_cannot_do_what_they_say_are_named(planned):
    values = {"shape": LLAMA_7B, "memory": "balanced", "offload_activations": True}
    notices = planned(num_head_chunks=64, **values)[2]
    assert "offload_activations has no effect without a GPU: activations are in host memory as it is" in notices
    assert "num_head_chunks: 64 acts as 32, the key/value heads" in notices
    named = planned(num_head_chunks=32, gpu_memory="80GiB", **values)[2]
    assert not any("offload_" in notice or "num_head_chunks" in notice for notice in named)
    assert planned(layer_function=False, tile_size=512)[2][0] == "tile_size has no effect with layer_function: false"


def test_running_out_of_memory_ends_with_advice(planned):
    plan, _, _ = planned(memory="fast", max_seq_length=64)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")):
        with pytest.raises(ValueError, match="out of memory with layer function.*; add memory: fast; keep"):
            with plan.advice_on_out_of_memory():
                raise error
    with pytest.raises(RuntimeError, match="shapes"), plan.advice_on_out_of_memory():
        raise RuntimeError("shapes do not match")


def test_host_memory_counts(settings_of, monkeypatch):
    monkeypatch.setattr(memory_plan, "free_host_memory", lambda: 2**30)
    values, config = {"gpu_memory": "32GiB", "max_seq_length": 65536, "fp16": True}, tiny_config(**LLAMA_7B)
    plan, _, _ = plan_memory(replace(settings_of(memory="auto", **values), uses_gpu=True), config)
    assert not plan.policy.offload_activations
    with pytest.raises(ValueError, match="GiB of host memory, 1.0 GiB are free"):
        plan_memory(replace(settings_of(memory="max_length", **values), uses_gpu=True), config)


def test_candidates_are_named_by_settings_that_ask_for_them(planned):
    for candidate in CANDIDATES:
        values = asked(candidate.as_settings())
        assert planned(**values)[0].policy == replace(candidate, optim=None)


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


@pytest.fixture
def plan_script(tmp_path, monkeypatch, capsys):
    """Run plan_memory.py on a 7B model: exit code, stdout, stderr, and the table that it wrote."""
    tiny_config(**LLAMA_7B).save_pretrained(tmp_path / "seven")
    file, yaml_file = tmp_path / "plan.json", tmp_path / "plan.yaml"
    values = {"model_name_or_path": str(tmp_path / "seven"), "train_file": "nowhere.jsonl", "output_dir": "nowhere",
              "max_seq_length": 8192, "fp16": True, "gradient_checkpointing": True}  # fmt: skip
    yaml_file.write_text(yaml.safe_dump(values))
    monkeypatch.setenv("WORLD_SIZE", "1")
    module = load_script("script/plan_memory.py")

    def run(*words):
        arguments = ["--train_args_file", yaml_file, "--output_file", file, *words]
        outcome = run_main_of(module, arguments, monkeypatch, capsys)
        return (*outcome, json.loads(file.read_text()) if file.exists() else None)

    return run


def test_script_prints_the_table_from_config_and_yaml_alone(plan_script):
    code, out, _, table = plan_script("--gpu_memory", "32GiB", "--seq", 8192, 100000, "--attention", "full")
    assert code == 0 and len(table["sets"]) == 2 + len(CANDIDATES)
    assert table["fastest"]["8192"] == ["memory: fast", "keep_activations: projections"]
    assert table["fastest"]["100000"] == ["memory: balanced", "offload_activations: true"]
    longest = [row["longest"] for row in table["sets"][2:]]
    assert longest == sorted(longest) and longest[-1] > 262_144
    offloaded = next(row for row in table["sets"] if row["settings"] == table["fastest"]["100000"])
    assert offloaded["host_gib"] > 10 and "100000 tokens: memory: balanced; offload_activations: true" in out
    for row in table["sets"]:
        shown = [f"{row['peak_gib']['8192']:.1f}", str(row["longest"]), f"{row['relative_time']:.2f}", *row["settings"]]
        assert all(text in out for text in shown), shown
    assert max(map(len, out.splitlines())) <= 120


def test_zero_3_is_planned_for_the_gpus_that_share_the_weights(plan_script):
    peaks = []
    for num_gpus in (1, 8):
        words = ["--finetuning_type", "lora", "--deepspeed", REPO / "train_args/deepspeed/zero3.json"]
        _, out, _, table = plan_script("--seq", 8192, "--num_gpus", num_gpus, *words)
        assert "the layer function is not available, since DeepSpeed ZeRO-3" in out
        peaks.append(table["sets"][1]["peak_gib"]["8192"])
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
def test_script_refuses_in_one_line(plan_script, words, message):
    code, _, error, table = plan_script(*words)
    assert code == 2 and message in error and error.count("\n") == 1 and table is None, error
