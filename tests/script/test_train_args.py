"""Every YAML in train_args/ is valid for the model it names: a dry run on a folder without weights."""

import json
import platform
import re
import sys
from pathlib import Path

import pytest
import upstream
import yaml
from conftest import REPO
from random_nf4_model import shape_config
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import train
from longqlora.device import cpu_has_bf16

YAMLS = sorted((REPO / "train_args").glob("*.yaml"))
SHAPES = {
    "meta-llama/Llama-2-7b-hf": shape_config("llama2-7b"), "meta-llama/Llama-2-13b-hf": shape_config("llama2-13b"),
    "lmsys/vicuna-13b-v1.5": shape_config("llama2-13b"),
    "mistralai/Mistral-7B-v0.3": MistralConfig(
        vocab_size=32768, max_position_embeddings=32768, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "Qwen/Qwen2.5-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=131072, use_sliding_window=False, sliding_window=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "Qwen/Qwen3-8B-Base": Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=32768, use_sliding_window=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ),
}  # fmt: skip
# The recommended YAMLs, and the RoPE that the dry run names.
RECOMMENDED = {
    "llama2-7b-32k-yarn": "context 4096 -> 32768 tokens, RoPE yarn x8",
    "mistral-7b-128k-yarn": "context 32768 -> 131072 tokens, RoPE yarn x4",
    "qwen3-8b-128k-yarn": "context 32768 -> 131072 tokens, RoPE yarn x4",
    "llama3.1-8b-256k": "context 8192 -> 262144 tokens, RoPE llama3 x32",
}
KNOWN_TO_LOSE = "trains no distance beyond a group"
# LoRA r64 on all linear layers: rank * (inputs + outputs) of each, times the layers.
NUM_LORA = {"llama2-7b-pretrain": 159_907_840, "llama2-13b-pretrain": 250_347_520}
NUM_LINEAR = {"llama2-7b-pretrain": 6_476_005_376, "llama2-13b-pretrain": 12_687_769_600}


@pytest.fixture
def dry(tmp_path, tiny_tokenizer, capsys, monkeypatch):
    """dry(path, *words) runs train.py --dry_run on a folder with the config of the YAML's model alone."""

    def dry(path: Path, *words: str) -> str:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        name = values["model_name_or_path"]
        model = tmp_path / "model" if name in SHAPES else REPO / name
        if name in SHAPES:
            SHAPES[name].save_pretrained(model)
            tiny_tokenizer.save_pretrained(model)
        train_file = tmp_path / "train.jsonl"
        train_file.write_text('{"input": "a", "output": "b"}\n' if values["sft"] else '{"text": "a"}\n')
        places = {"model_name_or_path": model, "train_file": train_file, "output_dir": tmp_path / "out"}
        given = [str(word) for key, value in places.items() for word in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["train.py", "--train_args_file", str(path), "--dry_run", *given, *words])
        train.main()
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().out

    return dry


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_dry_run(path, dry, caplog):
    out = dry(path)
    if path.stem in RECOMMENDED:
        assert RECOMMENDED[path.stem] in out + caplog.text and KNOWN_TO_LOSE not in out + caplog.text
    assert "dry run: all settings are valid" in out and "S2-Attn" in out
    assert "train_file: 1 rows, " in out and " steps of " in out and "row 1: " in out
    table = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("LoRA", "linear", "embed"))}
    values = yaml.safe_load(path.read_text())
    # Frozen embeddings stay in 16 bit; without a GPU fp16 becomes fp32, and on many CPUs bf16 too.
    is_16_bit = values.get("bf16") and cpu_has_bf16()
    frozen = "bfloat16" if is_16_bit and not values.get("train_embedding") else "float32"
    assert table["linear"][1:3] == ["nf4", "0"] and table["LoRA"][1] == "float32" and table["embedding"][1] == frozen
    if path.stem in NUM_LORA:
        assert table["LoRA"][2] == f"{NUM_LORA[path.stem]:,}" and table["linear"][3] == f"{NUM_LINEAR[path.stem]:,}"


@pytest.mark.parametrize(
    ("stem", "words", "count"),
    [
        ("llama2-7b-pretrain", "", 1),
        ("llama2-7b-pretrain", "--dense_finish 0.1", 0),
        ("llama2-7b-pretrain", "--rope_type yarn", 0),
        ("llama2-7b-pretrain", "--attention full", 0),
        ("llama2-7b-pretrain", "--model_max_length 4096 --max_seq_length 4096", 0),
        ("qwen2.5-7b-pretrain", "", 0),
    ],
)
def test_settings_that_are_known_to_lose_are_named_once(stem, words, count, dry, caplog):
    """Where RoPE is really interpolated and no step is dense: not where the model's own context is enough."""
    out = dry(REPO / "train_args" / f"{stem}.yaml", *words.split())
    assert (out + caplog.text).count(KNOWN_TO_LOSE) == count


@pytest.mark.parametrize("stem", RECOMMENDED)
def test_the_recommended_yamls_are_one_recipe(stem):
    text = (REPO / "train_args" / f"{stem}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    expected = {"attention": "s2", "dense_finish": 0.1, "memory": "auto", "finetuning_type": "qlora"}
    assert {key: values[key] for key in expected} == expected
    assert values["rope_type"] in RECOMMENDED[stem] and "docs/results/recipe.md" in text


def test_yarn_on_llama_3_1_is_refused(dry):
    with pytest.raises(ValueError, match="already scaled by 'llama3' to 131072 tokens, and 'yarn' does not go"):
        dry(REPO / "train_args" / "llama3.1-8b-256k.yaml", "--rope_type", "yarn")


def test_the_table_names_the_dtype_of_the_run(dry):
    bf16 = "bfloat16" if cpu_has_bf16() else "float32"
    for words, dtype, trained in (("lora --use_cpu --bf16", bf16, "0"), ("lora", "float32", "0"),
                                  ("full", "float32", "1,572,864")):  # fmt: skip
        out = dry(REPO / "train_args" / "tiny-llama-sft.yaml", "--finetuning_type", *words.split())
        assert next(line for line in out.splitlines() if line.startswith("linear")).split()[1:3] == [dtype, trained]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN limits instruction sets on x86 only")
def test_onednns_limit_of_instructions_counts(run_script, tmp_path, monkeypatch):
    """How a CPU without bf16 instructions is imitated, from the environment to the dtype of the weights."""
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    words = ["--train_args_file", "train_args/tiny-llama-sft.yaml", "--finetuning_type", "lora", "--bf16", "--use_cpu"]
    words += ["--output_dir", tmp_path / "out", "--train_file", "data/dummy_sft.jsonl", "--dry_run"]
    out = run_script("train.py", *words, cwd=REPO, check=True).stdout
    assert "bf16 becomes false: this CPU has no bf16 instructions" in out
    assert next(line for line in out.splitlines() if line.startswith("linear")).split()[1] == "float32"


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_yaml_is_flat_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    head, values = text.split("\n\n")[0], yaml.safe_load(text)
    assert f"train_args/{path.name}" in head
    shape = SHAPES.get(values["model_name_or_path"])
    lengths = [str(shape.max_position_embeddings if shape else 256), str(values["model_max_length"])]
    for label in ("command:", "hardware:", "expected:", *lengths):
        assert label in head, label
    assert not [key for key, value in values.items() if isinstance(value, (dict, list))]
    for title in ("model and context", "adapter", "data", "optimisation", "logging and saving"):
        assert f"\n# {title}\n" in text
    assert (REPO / values["deepspeed"]).is_file()
    assert values["train_file"].startswith("output/") or (REPO / values["train_file"]).is_file()
    assert "/work" not in text and len(max(text.splitlines(), key=len)) <= 120


@pytest.mark.parametrize("path", sorted((REPO / "train_args" / "deepspeed").glob("*.json")), ids=lambda p: p.stem)
def test_a_deepspeed_file_leaves_to_the_yaml_what_the_yaml_decides(path):
    config, stem = json.loads(path.read_text()), path.resolve().stem
    assert config["gradient_clipping"] == config["train_micro_batch_size_per_gpu"] == "auto"
    assert config["fp16"]["enabled"] == config["bf16"]["enabled"] == "auto"
    assert re.fullmatch(r"zero[123](_offload)?", stem)
    assert config["zero_optimization"]["stage"] == int(stem[4])
    assert ("offload_optimizer" in config["zero_optimization"]) == stem.endswith("_offload")
    if stem.endswith("_offload"):
        assert config["zero_force_ds_cpu_optimizer"] is False


def test_upstreams_names_are_links():
    """Two names for one file cannot drift apart. Upstream's file for ZeRO-2 offloads the optimizer too."""
    folder = REPO / "train_args" / "deepspeed"
    for name, target in (("s2", "zero2_offload"), ("s3", "zero3_offload")):
        path = folder / f"deepspeed_config_{name}.json"
        assert path.is_symlink() and path.resolve().name == f"{target}.json"
    ours = json.loads((folder / "deepspeed_config_s2.json").read_text())["zero_optimization"]
    theirs = upstream.DEEPSPEED_S2["zero_optimization"]
    assert ours == {**ours, **theirs, "offload_optimizer": {"device": "cpu", "pin_memory": True}}


def test_upstreams_yaml_with_zero_3_is_refused_in_one_line(dry, tmp_path):
    """4-bit weights, which upstream always trains on, do not go with ZeRO-3."""
    path = tmp_path / "upstream.yaml"
    path.write_text(yaml.safe_dump({**upstream.PRETRAIN, "model_name_or_path": "meta-llama/Llama-2-7b-hf"}))
    words = ["--deepspeed", str(REPO / "train_args" / "deepspeed" / "deepspeed_config_s3.json")]
    with pytest.raises(ValueError, match="deepspeed: ZeRO-3 cannot shard 4-bit .*zero2_offload.json.*type: lora"):
        dry(path, *words)
    assert "dry run: all settings are valid" in dry(path, *words, "--finetuning_type", "lora")


def test_the_papers_values():
    """LongQLoRA (arXiv 2311.04879), section 4."""
    values = yaml.safe_load((REPO / "train_args" / "llama2-7b-pretrain.yaml").read_text())
    sft = yaml.safe_load((REPO / "train_args" / "vicuna-13b-sft.yaml").read_text())
    assert float(values["learning_rate"]) == 2e-4 and float(sft["learning_rate"]) == 1e-4
    assert values["max_steps"] == 1000 and sft["max_steps"] == 1700 and sft["sft"] and not values["sft"]
    shared = {
        "lora_rank": 64, "lora_alpha": 16, "lora_dropout": 0.05, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20,
        "optim": "paged_adamw_32bit", "max_grad_norm": 0.3, "weight_decay": 0, "group_size_ratio": 0.25,
        "model_max_length": 8192, "max_seq_length": 8192, "train_embedding": False, "train_norm": False,
    }  # fmt: skip
    for run in (values, sft):
        assert {key: run[key] for key in shared} == shared
