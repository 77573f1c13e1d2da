"""Settings from YAML, command line and machine: which value wins, what is read as what, what is replaced or in vain."""

import dataclasses
import json
import logging
import os
import platform
import runpy

import pytest
import torch
import upstream
import yaml
from conftest import REPO
from transformers.integrations import is_deepspeed_zero3_enabled

import longqlora.settings.reader
from longqlora.device import cpu_has_bf16
from longqlora.model.base import is_slow_on_cpu
from longqlora.settings.config import SECTIONS
from longqlora.settings.reader import coerce, read_overrides, rename, resolve_settings
from longqlora.training.arguments import build_arguments
from longqlora.training.checks import check_settings

OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture
def read(tmp_path):
    """read(changes, *words) resolves and checks a valid YAML with `changes`: settings, and the level of each notice."""
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    places = {"train_file": str(tmp_path / "train.jsonl"), "output_dir": str(tmp_path / "out")}

    def read(changes: dict | None = None, *words: str):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"model_name_or_path": "some/model", **places, **(changes or {})}))
        settings, notices = resolve_settings(str(path), list(words))
        return settings, {notice.text: notice.level for notice in notices + check_settings(settings)}

    return read


def test_settings_are_frozen_and_their_record_keeps_no_secret(read):
    settings, _ = read({"deepspeed": OFFLOAD, "hub_token": "hf_secret", "max_steps": 3})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.adapter.lora_rank = 8
    for values in (settings.training, settings.given):
        with pytest.raises(TypeError, match="assignment"):
            values["optim"] = "sgd"
    assert settings.given["deepspeed"] == OFFLOAD != settings.training["deepspeed"], "completed in a copy"
    assert settings.training["hub_token"] == "hf_secret" and settings.as_dict()["training"]["max_steps"] == 3
    assert "hf_secret" not in json.dumps(settings.as_dict()) + repr(settings)


def test_words_of_the_command_line():
    words = "--max_steps -1 --lora_alpha=-2 --sft --pack false --learning-rate 1e-4 --run_name a=b --report_to=a=b "
    assert read_overrides(f"{words} --optim= --seed 1 --seed 2 --train_norm".split()) == {
        "max_steps": "-1", "lora_alpha": "-2", "sft": "true", "pack": "false", "learning_rate": "1e-4",
        "run_name": "a=b", "report_to": "a=b", "optim": "", "seed": "2", "train_norm": "true",
    }  # fmt: skip
    assert read_overrides([]) == {}


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("2e-4", float, 2e-4), (1, float, 1.0), ("1e3", int, 1000), (2**62 + 1, int, 2**62 + 1), ("8192.0", int, 8192),
        ("True", bool, True), ("no", bool, False), (0, bool, False), ("ON", bool, True),
        ("none", str | None, None), (None, int | None, None), ("none", str, "none"), ("7", str, "7"),
        ('{"a": 1}', dict | str | None, {"a": 1}), ("file.json", dict | str | None, "file.json"),
        ("[a, b]", None | str | list[str], ["a", "b"]), ("a", None | str | list[str], "a"),
        ("true", str | bool, True), ("all", str | bool, "all"),
    ],
)  # fmt: skip
def test_values_take_the_type_of_their_field(value, hint, expected):
    result = coerce("key", value, hint)
    assert result == expected and type(result) is type(expected)


def test_no_whole_number():
    for value in ("", "x", "1.5", True, [1], {"a": 1}, "nan", "1e999", "0x10"):
        with pytest.raises(ValueError, match="key: .*whole number"):
            coerce("key", value, int)


def test_words_that_yaml_reads_as_something_else(read):
    settings, _ = read({"eval_strategy": False, "save_strategy": False})
    assert settings.training["eval_strategy"] == settings.training["save_strategy"] == "no"
    for value in (True, False, "true", "false"):
        assert read({"resume_from_checkpoint": value})[0].training["resume_from_checkpoint"] == str(value).lower()
    for word in ("none", None, "None"):
        assert build_arguments(read({"report_to": word})[0]).report_to == []


def test_former_names_become_present_ones(read):
    former = {"warmup_ratio": "0.03", "no_cuda": True, "group_by_length": True, "save_safetensors": True,
              "per_gpu_train_batch_size": 3, "gradient_checkpointing": True, "evaluation_strategy": "no"}  # fmt: skip
    settings, notices = read(former)
    arguments = build_arguments(settings)
    assert arguments.warmup_steps == 0.03 and arguments.use_cpu and arguments.per_device_train_batch_size == 3
    assert arguments.train_sampling_strategy == "group_by_length" and arguments.gradient_checkpointing
    for name in former.keys() - {"gradient_checkpointing", "per_gpu_train_batch_size"}:
        assert sum(name in notice for notice in notices) == 1, notices


@pytest.mark.parametrize(
    ("changes", "words", "expected"),
    [
        ({"lora_rank": 8, "lora_alpha": 32}, "--lora_alpha 4", {"lora_rank": 8, "lora_alpha": 4, "lora_dropout": 0.05}),
        ({"evaluation_strategy": "steps"}, "--eval_strategy no", {"eval_strategy": "no"}),
        ({"eval_strategy": "steps"}, "--evaluation_strategy no", {"eval_strategy": "no"}),
        ({"warmup_ratio": 0.1}, "--warmup_steps 7", {"warmup_steps": 7}),
        ({"logging_steps": 3}, "", {"logging_steps": 3, "per_device_train_batch_size": 1, "report_to": "tensorboard"}),
    ],
)
def test_command_line_over_yaml_over_defaults(changes, words, expected, read):
    """Also where one of them has the former name."""
    settings, _ = read(changes, *words.split())
    values = {**settings.as_dict()["adapter"], **settings.training}
    assert {key: values[key] for key in expected} == expected
    assert "lora_dropout" not in settings.given


CHECKPOINTING = ["gradient_checkpointing", "activation_checkpointing"]


@pytest.mark.parametrize("given", CHECKPOINTING)
@pytest.mark.parametrize("known", [CHECKPOINTING[:1], CHECKPOINTING[1:], CHECKPOINTING])
def test_checkpointing_has_the_name_that_the_installed_transformers_knows(given, known, monkeypatch):
    monkeypatch.setattr(longqlora.settings.reader, "fields_of", lambda cls: dict.fromkeys(known))
    renamed, notices = rename({given: True})
    assert renamed == {known[-1]: True}
    assert len(notices) == (given != known[-1])


def test_a_yaml_of_upstream_runs_with_its_paths_changed_alone(read, tmp_path):
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps(upstream.DEEPSPEED_S2))
    places = {"train_file": str(tmp_path / "train.jsonl"), "output_dir": str(tmp_path / "out"), "deepspeed": str(ds)}
    settings, notices = read({**upstream.PRETRAIN, **places})
    expected = {"learning_rate": 2e-4, "max_grad_norm": 0.3, "max_steps": 1000, "optim": "adamw_torch"}
    assert settings.training.items() >= expected.items() and build_arguments(settings).gradient_checkpointing
    deepspeed = settings.training["deepspeed"]
    assert deepspeed["gradient_clipping"] == "auto" and deepspeed["zero_force_ds_cpu_optimizer"] is False
    said = ["num_train_epochs has no effect with max_steps", "optim: paged_adamw_32bit becomes adamw_torch",
            "deepspeed: added gradient_clipping"]  # fmt: skip
    if not torch.cuda.is_available():
        said.append("fp16 becomes false")
        assert settings.training["fp16"] is False
    assert [text for text in said if any(notice.startswith(text) for notice in notices)] == said


@pytest.mark.parametrize(
    ("gpu", "offload", "optim", "expected"),
    [(True, True, "paged_adamw_32bit", "adamw_torch"), (True, True, "adamw_bnb_8bit", "adamw_torch"),
     (True, False, "paged_adamw_32bit", "paged_adamw_32bit"), (False, False, "paged_adamw_8bit", "adamw_torch"),
     (False, False, "rmsprop_bnb_8bit", "rmsprop"), (False, True, "adamw_torch_fused", "adamw_torch_fused"),
     (False, False, "sgd", "sgd")],
)  # fmt: skip
def test_an_optimizer_of_the_gpu_without_one(gpu, offload, optim, expected, read, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    settings, notices = read({"optim": optim, **({"deepspeed": OFFLOAD} if offload else {})})
    assert settings.training["optim"] == expected and settings.uses_gpu == gpu
    changed = [text for text, level in notices.items() if level == logging.WARNING]
    assert [text.split(",")[0] for text in changed] == [f"optim: {optim} becomes {expected}"] * (optim != expected)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_on_a_cpu_and_on_an_old_gpu(has_bf16, read, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="bf16.*fp16: true"):
        read({"bf16": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(longqlora.settings.reader, "cpu_has_bf16", lambda: has_bf16)
    settings, notices = read({"bf16": True, "bf16_full_eval": True})
    arguments = build_arguments(settings)
    assert arguments.bf16 == arguments.bf16_full_eval == has_bf16 and not settings.training["dataloader_pin_memory"]
    reason = "becomes false: this CPU has no bf16 instructions; the run computes in fp32"
    named = [notice for notice in notices if "bf16" in notice]
    assert named == ([] if has_bf16 else [f"bf16 {reason}", f"bf16_full_eval {reason}"])


@pytest.mark.parametrize(
    ("machine", "onednn", "avx512_bf16", "expected"),
    [("x86_64", True, True, True), ("x86_64", True, False, False), ("x86_64", False, True, False),
     ("aarch64", True, False, True), ("aarch64", False, False, False)],
)  # fmt: skip
def test_bf16_instructions_of_a_cpu(machine, onednn, avx512_bf16, expected, monkeypatch):
    """On x86 oneDNN also counts emulation; DNNL_MAX_CPU_ISA takes its answer away, ARM has that answer alone."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert cpu_has_bf16() == expected
    assert is_slow_on_cpu(torch.bfloat16) != expected and is_slow_on_cpu(torch.float16)
    assert not is_slow_on_cpu(torch.float32)


def test_arguments_join_other_processes_when_told_to(read):
    zero3 = {"deepspeed": {"zero_optimization": {"stage": 3}}, "finetuning_type": "lora"}
    arguments = build_arguments(read(zero3)[0])
    assert arguments.hf_deepspeed_config.is_zero3() and not is_deepspeed_zero3_enabled(), "a model can be built on meta"
    assert not torch.distributed.is_initialized() and not hasattr(arguments, "distributed_state")
    arguments = build_arguments(read({"use_cpu": True})[0])
    arguments.join()
    assert arguments.distributed_state.num_processes == 1 and arguments.device.type == "cpu"


def test_the_deepspeed_file_agrees_with_the_settings(read, monkeypatch):
    zero = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    words = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", "--max_grad_norm", "0.3"]
    build_arguments(read({"deepspeed": {**zero, "train_batch_size": 8, "gradient_clipping": 0.3}}, *words)[0])
    monkeypatch.setenv("WORLD_SIZE", "2")
    build_arguments(read({"deepspeed": {**zero, "train_batch_size": 16}}, *words)[0])
    with pytest.raises(ValueError, match="train_batch_size=8 but"):
        build_arguments(read({"deepspeed": {**zero, "train_batch_size": 8}}, *words)[0])


def test_a_missing_deepspeed_package(read, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="deepspeed: the package is not installed"):
        read({"deepspeed": OFFLOAD})


@pytest.mark.parametrize(
    ("zero", "gib"),
    [({"stage": 2, "overlap_comm": True}, 1.9), ({"stage": 2}, 0.9), ({"stage": 2, "reduce_bucket_size": 2e7}, None),
     ({"stage": 3}, None), ({"stage": 2, "contiguous_gradients": False}, None)],
)  # fmt: skip
def test_large_gradient_buckets_are_named(read, zero, gib):
    _, notices = read({"deepspeed": {"zero_optimization": zero}, "finetuning_type": "lora"})
    said = [notice for notice in notices if "reduce_bucket_size" in notice]
    assert said == ([] if gib is None else [said[0]]) and (gib is None or f"holds {gib} GiB" in said[0])


@pytest.mark.parametrize(
    ("changes", "key", "cause"),
    [
        ({"attention": "full", "group_size_ratio": 0.5}, "group_size_ratio", "attention: full"),
        ({"attention": "dca", "group_size_ratio": 0.5}, "group_size_ratio", "attention: dca"),
        ({"finetuning_type": "full", "lora_rank": 8}, "lora_rank", "finetuning_type: full"),
        ({"prompt_template": "vicuna_v1.1"}, "prompt_template", "sft: false"),
        ({"rope_type": "linear"}, "rope_type", "model_max_length"),
        ({"eval_steps": 5}, "eval_steps", "eval_strategy"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "warmup_steps", "constant"),
        ({"save_strategy": "no", "save_steps": 5}, "save_steps", "save_strategy"),
        ({"deepspeed": {"optimizer": {"type": "AdamW"}}, "optim": "sgd"}, "optim", "DeepSpeed"),
    ],
)
def test_a_setting_without_effect_is_a_warning(changes, key, cause, read):
    _, notices = read(changes)
    found = [text for text in notices if text.startswith(f"{key} has no effect with") and cause in text]
    assert len(found) == 1 and notices[found[0]] == logging.WARNING, notices


def test_settings_that_have_an_effect_are_not_named(read):
    changes = {"group_size_ratio": 0.5, "lora_rank": 8, "model_max_length": 9000, "rope_type": "yarn", "max_steps": 3}
    assert read(changes)[1] == {}
    assert read({"finetuning_type": "full"}, "--train_norm", "false")[1] == {}


def test_paths_are_found_below_the_repository_and_home(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    places = {"train_file": "data/dummy_pretrain.jsonl", "model_name_or_path": "data/tiny-llama"}
    settings, _ = read(places)
    assert settings.given["train_file"] == settings.data.train_file == str(REPO / places["train_file"])
    assert settings.model.model_name_or_path == str(REPO / places["model_name_or_path"])
    for folder in ("data", "o/c"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "dummy_pretrain.jsonl").write_text("")
    assert read(places)[0].data.train_file == places["train_file"]
    folders = {"output_dir": "~/o", "logging_dir": "~/l", "resume_from_checkpoint": "~/o/c", "data_cache_dir": "~/d"}
    settings, _ = read({**folders, "train_file": "~/train.jsonl"})
    found = {**settings.training, **vars(settings.output), **vars(settings.data)}
    assert {key: found[key] for key in folders} == {k: v.replace("~", str(tmp_path)) for k, v in folders.items()}
    assert found["train_file"] == str(tmp_path / "train.jsonl")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    assert build_arguments(settings).output_dir == found["output_dir"], "one folder, not two"
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "l")


# What is given: train_file, train_file_weights; what becomes of it.
SOURCES = {
    "one": ("a.jsonl", None, "a.jsonl", None),
    "a list": (["b.jsonl", "org/name:train[:9]"], [1, 0.5], ["b.jsonl", "org/name:train[:9]"], [1, 0.5]),
    "a glob": ("*.jsonl", None, ["a.jsonl", "b.jsonl"], None),
    "a glob with a weight": (["s/*.json*", "a.jsonl"], [2, 1], ["s/c.json", "s/d.jsonl", "a.jsonl"], [2, 2, 1]),
    "a glob of one": ("s/*.json", [3], "s/c.json", [3]),
    "below the repository": (["data/dummy_s*.jsonl"], None, [str(REPO / "data/dummy_sft.jsonl")], None),
    "on the command line": ("[a.jsonl, org/name]", "[1, 2]", ["a.jsonl", "org/name"], [1, 2]),
    "a name with brackets": ("[e].jsonl", None, "[e].jsonl", None),
}


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    for name in ("a.jsonl", "b.jsonl", "s/c.json", "s/d.jsonl", "[e].jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "train.jsonl").unlink(missing_ok=True)


@pytest.mark.parametrize("name", SOURCES)
def test_sources(name, read, data_folder):
    given, given_weights, taken, weights = SOURCES[name]
    if name == "a glob":
        taken = ["[e].jsonl", *taken]
    data = read({"train_file": given, "train_file_weights": given_weights})[0].data
    assert (data.train_file, data.train_file_weights) == (taken, weights)
    assert data.files == {"train_file": [taken] if isinstance(taken, str) else taken}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"train_file": ["a.jsonl", "nowhere.jsonl"]}, "train_file: no file at 'nowhere.jsonl'"),
        ({"train_file": ["a.jsonl", 3]}, "train_file: .* is not a list of paths"),
        ({"train_file": []}, "train_file: missing"),
        ({"train_file": "n*.jsonl"}, r"train_file: no file matches 'n\*.jsonl'"),
        ({"eval_file": "org/name.jsonl"}, "eval_file: no file at"),
        ({"train_file_weights": [1, 2]}, r"train_file_weights: 2 numbers for 1 source\(s\)"),
        ({"train_file": "s/*", "train_file_weights": [1, 2, 3]}, "train_file_weights: 3 numbers for 2"),
        *(({"train_file_weights": [bad]}, "train_file_weights: .* is not a list of numbers above 0")
          for bad in (0, -1, 1e18, float("nan"), "1", True)),
        ({"train_file_weights": 2}, "train_file_weights: 2 is not a list"),
        ({"pack": "joined"}, "pack: 'joined' is not true, false or join"),
    ],
)  # fmt: skip
def test_sources_that_are_none(changes, text, read, data_folder):
    with pytest.raises(ValueError, match=f"^{text}"):
        read({"train_file": "a.jsonl", **changes})


def test_the_yaml_may_have_a_byte_order_mark_windows_lines_and_anchors(tmp_path):
    (tmp_path / "t.jsonl").write_text("")
    path = tmp_path / "run.yaml"
    text = f"model_name_or_path: &m a/b\r\noutput_dir: *m\r\ntrain_file: {tmp_path}/t.jsonl\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    settings, notices = resolve_settings(str(path), [])
    assert settings.training["output_dir"] == settings.model.model_name_or_path == "a/b" and notices == []


def test_every_own_key_has_help_one_owner_and_its_place_on_the_page():
    items = [item for section in SECTIONS.values() for item in dataclasses.fields(section)]
    assert len({item.name for item in items}) == len(items) and all(item.metadata["help"] for item in items)
    page = (REPO / "docs" / "settings.md").read_text(encoding="utf-8")
    module = runpy.run_path(str(REPO / "docs" / "list_settings.py"))
    assert page == module["settings_page"](), "run `python docs/list_settings.py`"
