"""The memory plan: which policy the settings get, refusal with advice, and the script that prints it all."""

import json
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
def write(tmp_path):
    """Write a YAML for a model of which config.json is all there is; the file's path."""
    tiny_config(**LLAMA_7B).save_pretrained(tmp_path / "7b")

    def write(**values) -> str:
        base = {"model_name_or_path": str(tmp_path / "7b"), "train_file": "no.jsonl",
                "output_dir": str(tmp_path / "out"), "use_cpu": True}  # fmt: skip
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**base, **values}))
        return str(tmp_path / "run.yaml")

    return write


@pytest.fixture
def planned(write):
    """planned(model type, settings): the plan, the changed settings and the texts of the notices, for a 7B shape.

    For a machine without a GPU, or with one of `gpu_memory`.
    """

    def planned(model_type="llama", uses_gpu=False, attention_dropout=0.0, **values):
        config = tiny_config(model_type, **LLAMA_7B, attention_dropout=attention_dropout)
        settings, _ = resolve_settings(write(**values), [], for_this_machine=False)
        plan, settings, notices = plan_memory(replace(settings, uses_gpu=uses_gpu), config)
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
        ({"memory": "max_length", "num_head_chunks": 2}, replace(MAX_LENGTH, num_head_chunks=2)),
        *((asked(candidate.as_settings()), candidate) for candidate in CANDIDATES),
    ],
)
def test_a_word_chooses_the_policy_and_own_keys_overrule_it(planned, values, expected):
    plan, settings, notices = planned(**values)
    # No GPU to page an optimizer from.
    assert plan.policy == replace(expected, optim=None) and plan.capacity == math.inf
    assert settings.training[CHECKPOINTING_KEY] == expected.gradient_checkpointing and "optim" not in settings.training
    is_overruled = bool(values.get("gradient_checkpointing") and expected.layer_function)
    assert any(text.startswith(f"{CHECKPOINTING_KEY} has no effect") for text in notices) == is_overruled


def test_a_policy_brings_its_optimizer_to_a_gpu_where_the_user_names_none(planned):
    for values, optim in (({}, "paged_adamw_8bit"), ({"optim": "sgd"}, "sgd")):
        plan, settings, _ = planned(memory="max_length", gpu_memory="32GiB", uses_gpu=True, **values)
        assert settings.training["optim"] == optim and (plan.policy.optim is None) == bool(values)


REFUSED = [
    ({"memory": "auto", "gpu_memory": "2GiB"}, "do not fit at any length; use a smaller model, or a larger GPU"),
    ({"layer_function": True, "model_type": "mixtral"}, "layer_function: not available, since mixtral layers"),
    ({"layer_function": True, "attention_dropout": 0.1}, "layer_function: not available, since .*attention weig"),
]


@pytest.mark.parametrize("values,message", REFUSED)
def test_what_cannot_be_planned_names_its_key(planned, values, message):
    with pytest.raises(ValueError, match=message):
        planned(**values)


def test_other_models_fall_back_to_checkpointing_and_say_so(planned):
    words = {"fast": STOCK, "balanced": CHECKPOINTED, "max_length": CHECKPOINTED, "auto": STOCK}
    for word, expected in words.items():
        plan, _, notices = planned("gpt_neox", memory=word)
        assert plan.policy == expected and "the layer function is not used, since gpt_neox layers" in notices[0], word


def test_auto_takes_the_fastest_that_fits_a_named_gpu(planned):
    chosen = []
    for length in (4096, 16384, 30000, 131072, 310000):
        plan, settings, notices = planned(memory="auto", gpu_memory="32GiB", max_seq_length=length, fp16=True)
        assert "of 32.0 GiB" in plan.describe() and plan.estimate.peak < plan.capacity
        offered = [notice for notice in notices if notice.startswith("memory: auto can take ")]
        assert len(offered) == len(CANDIDATES)
        assert f"{plan.policy.describe()}: {plan.estimate.peak / 2**30:.2f} GiB" in "\n".join(offered)
        chosen.append(CANDIDATES.index(plan.policy))
    assert chosen == sorted(set(chosen)), "longer texts, leaner policies, each time another"
    assert settings.training.get("optim") is None, "a plan for another machine's GPU sets no optimizer here"


def test_auto_leaves_room_where_a_named_policy_does_not(planned):
    peak = planned(memory="fast", gpu_memory="999GiB", fp16=True)[0].estimate.peak
    roomy, tight = f"{round(peak / 0.91)}", f"{round(peak / 0.95)}"
    for word, size, expected in (
        ("fast", tight, FAST), ("auto", roomy, FAST), ("auto", tight, replace(FAST, keep_activations="projections"))
    ):  # fmt: skip
        assert planned(memory=word, gpu_memory=size, fp16=True)[0].policy == expected


TOO_LONG = [({"gradient_checkpointing": True}, 65536), ({"memory": "fast"}, 65536), ({"memory": "max_length"}, 400_000)]


@pytest.mark.parametrize("values,length", TOO_LONG)
def test_what_cannot_fit_is_refused_with_advice_that_fits(planned, values, length):
    values = {"gpu_memory": "16GiB", "max_seq_length": length, "fp16": True, **values}
    refusal = r"is predicted to take [\d.]+ GiB of the 16.0 GiB available; [^\n]*$"
    with pytest.raises(ValueError, match=refusal) as refused:
        planned(**values)
    advice = str(refused.value).split("available; ")[1]
    if advice.startswith("add "):
        values |= asked(advice.removeprefix("add ").split(" (")[0].split("; "))
    else:
        longest = int(advice.split("max_seq_length: ")[1].split(";")[0])
        values |= {"max_seq_length": longest, **asked(CANDIDATES[-1].as_settings())}
        assert longest > 50_000
    planned(**values)


def test_a_row_that_processes_share_may_be_longer(planned):
    """The advice is in tokens of the whole row."""
    options = {"gpu_memory": "32GiB", "fp16": True, "max_seq_length": 1000}
    alone, shared = (planned(sequence_parallel_size=size, **options)[0] for size in (1, 4))
    lengths = [plan.longest(CHECKPOINTED, plan.capacity) for plan in (alone, shared)]
    assert lengths[1] == pytest.approx(4 * lengths[0], rel=0.01)


def test_parts_that_cannot_do_what_they_say_are_named(planned):
    values = {"memory": "balanced", "offload_activations": True}
    notices = planned(num_head_chunks=64, **values)[2]
    assert "offload_activations has no effect without a GPU: activations are in host memory as it is" in notices
    assert "num_head_chunks: 64 acts as 32, the key/value heads" in notices
    named = planned(num_head_chunks=32, gpu_memory="80GiB", **values)[2]
    assert not any("offload_" in notice or "num_head_chunks" in notice for notice in named)
    assert planned(layer_function=False, tile_size=512)[2][0] == "tile_size has no effect with layer_function: false"


def test_running_out_of_memory_ends_with_advice(planned):
    plan, _, _ = planned(memory="fast")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")):
        with pytest.raises(ValueError, match="out of memory with layer function.*; add memory: fast; keep"):
            with plan.advice_on_out_of_memory():
                raise error
    with pytest.raises(RuntimeError, match="shapes"), plan.advice_on_out_of_memory():
        raise RuntimeError("shapes do not match")


def test_host_memory_counts(planned, monkeypatch):
    monkeypatch.setattr(memory_plan, "free_host_memory", lambda: 2**30)
    values = {"gpu_memory": "32GiB", "max_seq_length": 65536, "fp16": True, "uses_gpu": True}
    assert not planned(memory="auto", **values)[0].policy.offload_activations
    with pytest.raises(ValueError, match="GiB of host memory, 1.0 GiB are free"):
        planned(memory="max_length", **values)


def test_what_each_zero_stage_splits_among_eight():
    on_cpu, on_device = {"device": "cpu"}, {"device": "none"}
    for zero, expected in (
        ({}, (1, 1)), ({"stage": 1}, (1, 8)), ({"stage": 2, "offload_optimizer": on_cpu}, (1, 8)),
        ({"stage": 3}, (8, 8)), ({"stage": 3, "offload_param": on_device}, (8, 8)),
        ({"stage": 3, "offload_param": on_cpu}, (math.inf, 8)),
    ):  # fmt: skip
        assert shards({"zero_optimization": zero}, 8) == expected, zero
    assert shards(None, 8) == (1, 1)


@pytest.fixture
def plan_script(write, tmp_path, monkeypatch, capsys):
    """Run plan_memory.py on a 7B model: exit code, stdout, stderr, and the table that it wrote."""
    file = tmp_path / "plan.json"
    monkeypatch.setenv("WORLD_SIZE", "1")
    module = load_script("script/plan_memory.py")

    def run(*words):
        arguments = ["--train_args_file", write(use_cpu=False, fp16=True), "--output_file", file, *words]
        outcome = run_main_of(module, arguments, monkeypatch, capsys)
        return (*outcome, json.loads(file.read_text()) if file.exists() else None)

    return run


def test_script_prints_the_table_from_config_and_yaml_alone(plan_script, tmp_path):
    code, out, _, table = plan_script(*"--gpu_memory 32GiB --seq 8192 100000 --attention full".split())
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
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 120


def test_script_prints_what_a_dense_finish_costs(plan_script):
    words = "--gpu_memory 80GiB --seq 8192 100000 --tflops 50".split()
    _, out, _, table = plan_script(*words, "--dense_finish", 0.2)
    finish, (short, long) = table["dense_finish"], table["dense_finish"]["lengths"].values()
    assert finish["part"] == 0.2 and f"{finish['part']:g} costs {long['cost']:.1%} of the time" in out
    assert long["cost"] == pytest.approx(0.2 * (long["dense_seconds"] / long["sparse_seconds"] - 1))
    assert long["cost"] > short["cost"] > 0
    # Attention at 100,000 tokens, counted by hand: forward, and 2.5 times that backward, in 32 layers of 4096.
    flops = 3.5 * 4 * (100_000**2 / 2) * 4096 * 32
    gained = (long["dense_seconds"] - long["sparse_seconds"]) * 50e12
    assert gained == pytest.approx(flops * 0.75, rel=0.01)
    assert plan_script(*words, "--attention", "full")[3].keys() == table.keys() - {"dense_finish"}


def test_zero_3_is_planned_for_the_gpus_that_share_the_weights(plan_script):
    peaks = []
    for num_gpus in (1, 8):
        words = ["--finetuning_type", "lora", "--deepspeed", REPO / "train_args/deepspeed/zero3.json"]
        _, out, _, table = plan_script("--seq", 8192, "--num_gpus", num_gpus, *words)
        assert "the layer function is not available, since DeepSpeed ZeRO-3" in out
        peaks.append(table["sets"][1]["peak_gib"]["8192"])
    assert peaks[0] > 17 > 10 > peaks[1]


REFUSED_WORDS = {
    "--num_gpus 0": "--num_gpus: must be at least 1", "--gpu_memory big": "gpu_memory: 'big' is not a size",
    "--tflops 0": "--tflops: must be a positive number",
    "--seq 1": "--seq: must be at least 2", "--output_file /proc/no/plan.json": "/proc/no",
    "--model_name_or_path /no/model": "model_name_or_path",
}  # fmt: skip


@pytest.mark.parametrize("words,message", REFUSED_WORDS.items())
def test_script_refuses_in_one_line(plan_script, words, message):
    code, _, error, table = plan_script(*words.split())
    assert code == 2 and message in error and error.count("\n") == 1 and table is None, error
