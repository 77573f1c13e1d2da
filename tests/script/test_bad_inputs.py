"""Bad input to train.py: one line that names the key, the value and the fix, exit code 2, nothing written."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPO, sentences, tiny_config

import longqlora.training.dry_run
import train
from longqlora.cli import run_main

ZERO2 = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}
REMOVE = object()

# name: (changes to a valid YAML, words the error must have)
CHANGES = {
    "typo": ({"lora_rnk": 8}, ["lora_rnk", "8", "did you mean 'lora_rank'"]),
    "unknown": ({"qqq": 1}, ["unknown setting 'qqq'", "docs/settings.md"]),
    "rank text": ({"lora_rank": "many"}, ["lora_rank", "'many'", "whole number"]),
    "rank zero": ({"lora_rank": 0}, ["lora_rank", "at least 1", "0"]),
    "embedding": ({"train_embedding": "output"}, ["train_embedding", "'output'", "true, false or input"]),
    "dropout one": ({"lora_dropout": 1}, ["lora_dropout", "[0, 1)", "1"]),
    "alpha negative": ({"lora_alpha": -1}, ["lora_alpha", "-1"]),
    "boolean word": ({"fp16": "maybe"}, ["fp16", "'maybe'", "true or false"]),
    "rate text": ({"learning_rate": "fast"}, ["learning_rate", "'fast'"]),
    "rate nan": ({"learning_rate": ".nan"}, ["learning_rate", "nan", "finite"]),
    "rate negative": ({"learning_rate": -1e-4}, ["learning_rate", "-0.0001"]),
    "steps zero": ({"max_steps": 0}, ["max_steps", "0", "-1"]),
    "steps negative": ({"max_steps": -5}, ["max_steps", "-5"]),
    "steps empty": ({"max_steps": None}, ["max_steps", "no value"]),
    "epochs zero": ({"num_train_epochs": 0, "max_steps": REMOVE}, ["num_train_epochs", "0"]),
    "accumulation zero": ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps", "0"]),
    "beta": ({"adam_beta2": 1}, ["adam_beta2", "[0, 1)", "1"]),
    "seed": ({"seed": -1}, ["seed", "-1"]),
    "strategy": ({"eval_strategy": "sometimes"}, ["eval_strategy", "'sometimes'", "steps"]),
    "scheduler": ({"lr_scheduler_type": "bumpy"}, ["lr_scheduler_type", "'bumpy'", "cosine"]),
    "scheduler needs more": ({"lr_scheduler_type": "cosine_with_min_lr"}, ["lr_scheduler_type", "cosine_with_min_lr"]),
    "scheduler keywords": ({"lr_scheduler_kwargs": {"oops": 1}}, ["lr_scheduler_kwargs", "oops"]),
    "optimizer": ({"optim": "adamm"}, ["optim", "'adamm'", "adamw_torch"]),
    "optimizer not installed": ({"optim": "galore_adamw"}, ["optim", "galore_adamw"]),
    "optimizer without plain form": ({"optim": "paged_lion_32bit"}, ["optim", "paged_lion_32bit", "adamw_torch"]),
    "two precisions": ({"fp16": True, "bf16": True}, ["fp16 and bf16"]),
    "no train_file": ({"train_file": REMOVE}, ["train_file", "missing"]),
    "train_file absent": ({"train_file": "nowhere.jsonl"}, ["train_file", "nowhere.jsonl"]),
    "train_file of nobody": ({"train_file": "~no-such-user/a.jsonl"}, ["train_file", "no file at '~no-such-user"]),
    "train_file a folder": ({"train_file": "data"}, ["train_file", "'data'"]),
    "train_file a number": ({"train_file": 5}, ["train_file", "5", "quotes"]),
    "eval_file absent": ({"eval_file": "nowhere.jsonl"}, ["eval_file", "nowhere.jsonl"]),
    "no eval_file": ({"eval_strategy": "steps"}, ["eval_strategy", "steps", "eval_file"]),
    "no model": ({"model_name_or_path": REMOVE}, ["model_name_or_path", "missing"]),
    "empty model": ({"model_name_or_path": ""}, ["model_name_or_path", "missing"]),
    "model absent": ({"model_name_or_path": "./no/such"}, ["model_name_or_path", "./no/such"]),
    "no output_dir": ({"output_dir": REMOVE}, ["output_dir", "missing"]),
    "date": ({"run_name": "!date"}, ["run_name", "2024", "quotes"]),
    "too long": ({"max_seq_length": 256}, ["max_seq_length", "256", "model_max_length 128"]),
    "too long for the model": ({"model_max_length": REMOVE}, ["max_seq_length", "128", "model_max_length: 128"]),
    "one token": ({"max_seq_length": 1}, ["max_seq_length", "1"]),
    "group": ({"group_size_ratio": 0}, ["group_size_ratio", "0"]),
    "group above one": ({"group_size_ratio": 2}, ["group_size_ratio", "2"]),
    "group of nothing": ({"group_size_ratio": 0.001}, ["group"]),
    "fine-tuning": ({"finetuning_type": "dora"}, ["finetuning_type", "'dora'", "qlora"]),
    "attention": ({"attention": "none-such"}, ["attention", "none-such", "s2, full"]),
    "rope": ({"rope_type": "spiral"}, ["rope_type", "spiral", "linear"]),
    "base without its method": ({"rope_theta": 5e5}, ["rope_theta", "rope_type: theta"]),
    "method without its base": ({"rope_type": "theta"}, ["rope_theta", "500000"]),
    "base of nothing": ({"rope_type": "theta", "rope_theta": 0}, ["rope_theta", "above 1"]),
    "chunks without dca": ({"dca_chunk_size": 32}, ["dca_chunk_size", "attention: dca"]),
    "length without dca": ({"attention": "full", "pretraining_length": 32}, ["pretraining_length", "attention: dca"]),
    "dca past RoPE": ({"attention": "dca", "pretraining_length": 128}, ["pretraining_length", "64", "rope_type"]),
    "dca and RoPE": ({"attention": "dca", "rope_type": "yarn"}, ["pretraining_length", "rope_type"]),
    "chunk past RoPE": ({"attention": "dca", "dca_chunk_size": 65}, ["dca_chunk_size", "64", "65"]),
    "window past chunk": ({"attention": "dca", "dca_local_window": 48}, ["dca_local_window", "48"]),
    "no window": ({"attention": "dca", "dca_local_window": 0}, ["dca_local_window", "at least 1"]),
    "target": ({"target_modules": "q_proj,x_proj"}, ["target_modules", "x_proj", "q_proj"]),
    "no target": ({"target_modules": ","}, ["target_modules", "','"]),
    "target list": ({"target_modules": ["q_proj"]}, ["target_modules", "['q_proj']", "text"]),
    "great seed": ({"seed": 2**70}, ["seed", "2**32"]),
    "keywords": ({"gradient_checkpointing_kwargs": "x"}, ["_checkpointing_kwargs", "'x'", "mapping"]),
    "metric": ({"metric_for_best_model": "bleu"}, ["metric_for_best_model", "'bleu'", "eval_loss"]),
    "best without evaluation": ({"save_strategy": "best"}, ["save_strategy", "best", "eval_file"]),
    "cache": ({"data_cache_dir": "/dev/null/x"}, ["data_cache_dir", "/dev/null"]),
    "optimizer arguments": ({"optim_args": "a"}, ["optim", "optim_args 'a'"]),
    "accelerator file": ({"accelerator_config": "no.json"}, ["training settings", "no.json"]),
    "log level": ({"log_level": "loud"}, ["log_level", "'loud'", "warning"]),
    "template": ({"prompt_template": "alpaca", "sft": True}, ["prompt_template", "alpaca", "vicuna_v1.1"]),
    "best": ({"load_best_model_at_end": True}, ["load_best_model_at_end"]),
    "best of steps": (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_file": "!train.jsonl", "eval_steps": 3,
         "save_steps": 4},
        ["load_best_model_at_end", "3", "4"],
    ),
    "log steps": ({"logging_steps": 0}, ["logging_steps"]),
    "reporter": ({"report_to": "paper"}, ["report_to", "'paper'", "tensorboard"]),
    "resume": ({"resume_from_checkpoint": "no-folder"}, ["resume_from_checkpoint", "no-folder"]),
    "resume from no checkpoint": ({"resume_from_checkpoint": "!odd"}, ["resume_from_checkpoint", "trainer_state"]),
    "two warm-ups": ({"warmup_ratio": 0.1, "warmup_steps": 5}, ["warmup_ratio", "warmup_steps"]),
    "warm-up above all": ({"warmup_ratio": 3}, ["warmup_ratio", "3"]),
    "two names": ({"evaluation_strategy": "no", "eval_strategy": "no"}, ["evaluation_strategy", "eval_strategy"]),
    "fsdp": ({"fsdp": "full_shard"}, ["fsdp", "full_shard", "deepspeed"]),
    "nobody shares": ({"sequence_parallel_size": 0}, ["sequence_parallel_size", "at least 1"]),
    "too few to share": ({"sequence_parallel_size": 2}, ["sequence_parallel_size", "1 process", "--num_gpus 2"]),
    "policy": ({"memory": "small"}, ["memory", "'small'", "balanced"]),
    "kept": ({"keep_activations": "some"}, ["keep_activations", "'some'", "attention"]),
    "tile": ({"memory": "fast", "tile_size": 0}, ["tile_size", "at least 1"]),
    "card": ({"memory": "auto", "gpu_memory": "big"}, ["gpu_memory", "'big'", "size"]),
    "small card": ({"memory": "auto", "gpu_memory": "1MiB"}, ["memory", "of the 0.0 GiB available"]),
    "liger": ({"use_liger_kernel": True}, ["use_liger_kernel", "True"]),
    "prefetch": ({"dataloader_prefetch_factor": 2}, ["dataloader_prefetch_factor"]),
    "accelerator": ({"accelerator_config": {"oops": 1}}, ["oops"]),
    "debug": ({"debug": "everything"}, ["everything"]),
    "deepspeed absent": ({"deepspeed": "zero9.json"}, ["deepspeed", "zero9.json"]),
    "deepspeed boolean": ({"deepspeed": True}, ["deepspeed", "True"]),
    "deepspeed sections": ({"deepspeed": {"zero_optimization": 2}}, ["deepspeed", "zero_optimization", "2"]),
    "deepspeed stage": ({"deepspeed": {"zero_optimization": {"stage": 7}}}, ["deepspeed", "stage", "7"]),
    "offload": (
        {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}}, ["offload_optimizer", "'cpu'"]
    ),
    "ZeRO-3": ({"deepspeed": {"zero_optimization": {"stage": 3}}}, ["deepspeed", "ZeRO-3", "finetuning_type: lora"]),
    "deepspeed disagrees": (
        {"deepspeed": {**ZERO2, "train_micro_batch_size_per_gpu": 4}},
        ["deepspeed", "train_micro_batch_size_per_gpu=4", "per_device_train_batch_size=1", "auto"],
    ),
    "deepspeed clips": (
        {"deepspeed": {**ZERO2, "gradient_clipping": 1.0}, "max_grad_norm": 0.3}, ["gradient_clipping=1.0", "0.3"]
    ),
    # Values that begin with "!" are files and folders of the fixture `folder`.
    "sliding": ({"model_name_or_path": "!sliding"}, ["mistral", "sliding_window=32", "attention: full"]),
    "odd heads": ({"model_name_or_path": "!odd"}, ["3", "heads"]),
    "padding": ({"model_name_or_path": "!padless"}, ["config.json", "Padding_idx"]),
    "scaled": ({"model_name_or_path": "!scaled"}, ["longrope", "model_max_length"]),
    "quantised": ({"model_name_or_path": "!quantised"}, ["model_name_or_path", "already quantised"]),
    "broken model": ({"model_name_or_path": "!broken"}, ["config"]),
    "nameless": ({"model_name_or_path": "!nameless"}, ["nameless"]),
    "alien": ({"model_name_or_path": "!alien"}, ["alien"]),
    "t5": ({"model_name_or_path": "!t5"}, ["model_max_length", "t5"]),
    "no causal model": (
        {"model_name_or_path": "!t5", "model_max_length": REMOVE},
        ["model_name_or_path", "t5", "no causal language model"],
    ),
    "bare": ({"model_name_or_path": "!bare"}, ["model_name_or_path", "no config.json"]),
    "no EOS": ({"model_name_or_path": "!endless"}, ["EOS", "eos_token"]),
    "tokenizer of another": ({"model_name_or_path": "!small"}, ["tokenizer", "ids up to 319", "3 embeddings"]),
    "no chat template": (
        {"sft": True, "train_file": "!sft.jsonl", "prompt_template": "chat_template"},
        ["prompt_template", "vicuna_v1.1"],
    ),
    "no rows": ({"train_file": "!empty.jsonl"}, ["train_file", "is empty"]),
    "row of a number": ({"train_file": "!number.jsonl"}, ["train_file", "line 2", "int"]),
    "rows of answers": ({"train_file": "!sft.jsonl"}, ["train_file", "line 1", "sft: true"]),
    "no JSON": ({"train_file": "!word.jsonl"}, ["line 2", "not valid JSON"]),
    "deepspeed cut": ({"deepspeed": "!cut.json"}, ["deepspeed", "cut.json", "not valid JSON"]),
    "deepspeed list": ({"deepspeed": "!list.json"}, ["deepspeed", "list.json", "JSON object"]),
    "deepspeed empty": ({"deepspeed": "!empty.jsonl"}, ["deepspeed", "empty.jsonl", "not valid JSON"]),
}  # fmt: skip

# name: (text of the YAML, words the error must have)
TEXTS = {
    "empty": ("", ["is empty"]),
    "only a comment": ("# nothing\n", ["is empty"]),
    "list": ("- a: 1\n", ["list", "key: value"]),
    "word": ("hello\n", ["text", "key: value"]),
    "tab": ("a: 1\n\tb: 2\n", ["line 2"]),
    "twice": ("max_steps: 1\nseed: 1\nmax_steps: 2\n", ["line 3", "'max_steps'", "twice"]),
    "twice inside": ("deepspeed: {a: 1, a: 2}\n", ["'a'", "twice"]),
    "Latin-1": ("output_dir: caf\xe9\n".encode("latin-1"), ["UTF-8"]),
    "two documents": ("a: 1\n---\nb: 2\n", ["line 2"]),
    "bracket": ("a: [1, 2\n", ["line"]),
    "number as key": ("8192: 1\n", ["8192", "no name"]),
    "boolean as key": ("on: 1\n", ["True", "no name"]),
    "object": ("a: !!python/object:os.system {}\n", ["line 1"]),
    "null byte": (b"a: \x00\n", ["not valid YAML"]),
    "no such day": ("run_name: 2024-13-45\n", ["not valid YAML"]),
    "deep": ("a: " + "[" * 5000, ["YAML"]),
}

# name: (words after the YAML, words the error must have)
WORDS = {
    "unknown flag": (["--lora_rnk", "8"], ["lora_rnk", "'8'", "lora_rank"]),
    "stray word": (["stray"], ["'stray'", "--key value"]),
    "one dash": (["-x", "3"], ["'-x'"]),
    "bare text flag": (["--learning_rate"], ["learning_rate", "'true'"]),
    "bare path flag": (["--train_file"], ["train_file", "'true'"]),
    "two dashes": (["--"], ["--key value"]),
    "no value": (["--output_dir="], ["output_dir", "missing"]),
    "no key": (["--=3"], ["--=3"]),
    "broken JSON": (["--deepspeed", "{broken"], ["deepspeed", "{broken"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir) -> Path:
    """Data and DeepSpeed files, and models without weights that differ from the tiny one in their config.json."""
    root = tmp_path_factory.mktemp("bad")
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
    models = {
        "sliding": tiny_config("mistral", sliding_window=32),
        "odd": tiny_config(hidden_size=48, num_attention_heads=3, num_key_value_heads=3),
        "scaled": tiny_config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors}),
        "quantised": tiny_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "small": tiny_config(vocab_size=3, pad_token_id=None),
        "padless": tiny_config(vocab_size=3),
        "broken": "{",
        "nameless": "{}",
        "alien": '{"model_type": "alien"}',
        "t5": '{"model_type": "t5", "max_position_embeddings": 512}',
        "endless": None,
    }
    for name, config in models.items():
        shutil.copytree(tiny_model_dir, root / name, ignore=shutil.ignore_patterns("*.safetensors"))
        if isinstance(config, str):
            (root / name / "config.json").write_text(config)
        elif config:
            config.save_pretrained(root / name)
    settings = json.loads((root / "endless" / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    files = {
        "endless/tokenizer_config.json": json.dumps(settings),
        "train.jsonl": "\n".join(json.dumps({"text": sentences(60, seed=i)}) for i in range(3)),
        "empty.jsonl": "", "number.jsonl": '{"text": "a"}\n{"text": 3}\n', "word.jsonl": '{"text": "a"}\nhello\n',
        "sft.jsonl": '{"input": "a", "output": "b"}\n', "cut.json": "{", "list.json": "[]", "bare/x": "",
    }  # fmt: skip
    (root / "bare").mkdir()
    for name, text in files.items():
        (root / name).write_text(text)
    return root


@pytest.fixture
def write(tmp_path, folder, tiny_model_dir):
    """Write a valid YAML with changes; returns its path."""

    def write(changes: dict) -> Path:
        values = {
            "model_name_or_path": str(tiny_model_dir), "train_file": "!train.jsonl", "max_steps": 1,
            "output_dir": str(tmp_path / "out"), "model_max_length": 128, "max_seq_length": 128, **changes,
        }  # fmt: skip
        for key, value in values.items():
            if isinstance(value, str) and value.startswith("!") and value != "!date":
                values[key] = str(folder / value[1:])
        text = yaml.safe_dump({key: value for key, value in values.items() if value is not REMOVE})
        path = tmp_path / "run.yaml"
        path.write_text(text.replace("'!date'", "2024-01-02").replace("'.nan'", ".nan"))
        return path

    return write


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Run train.py --dry_run in this process; checks its error line and how it ended."""

    def refused(*words, words_of_error, may_start=False) -> None:
        def started(*args, **kwargs):
            raise AssertionError("the checks let it pass")

        if not may_start:
            monkeypatch.setattr(longqlora.training.dry_run, "dry_run", started)
        monkeypatch.setattr(sys, "argv", ["train.py", "--dry_run", "--train_args_file", *map(str, words)])
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(train.main)
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert ended.value.code == 2 and printed.out == ""
        assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
        assert not [word for word in words_of_error if word not in lines[0]], lines[0]
        assert len(lines[0]) < 800, "longer than anyone reads"
        assert sorted(tmp_path.rglob("*")) == before

    return refused


def test_the_settings_that_are_changed_below_are_valid(write, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--train_args_file", str(write({})), "--dry_run"])
    train.main()
    assert "all settings are valid" in capsys.readouterr().out


@pytest.mark.parametrize("name", CHANGES)
def test_a_bad_setting(name, write, refused):
    changes, words = CHANGES[name]
    refused(write(changes), words_of_error=words, may_start=name == "resume from no checkpoint")


@pytest.mark.parametrize("name", TEXTS)
def test_a_bad_yaml(name, tmp_path, refused):
    text, words = TEXTS[name]
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(path, words_of_error=["run.yaml", *words])


@pytest.mark.parametrize("name", WORDS)
def test_a_bad_word_on_the_command_line(name, write, refused):
    words, expected = WORDS[name]
    refused(write({}), *words, words_of_error=expected)


def test_a_yaml_that_is_not_there(tmp_path, refused):
    for path in ("nowhere.yaml", str(tmp_path)):
        refused(path, words_of_error=["--train_args_file", path])


@pytest.mark.parametrize("place", ["taken", "taken/below"])
def test_a_file_in_the_way_of_the_output(place, write, tmp_path, refused):
    (tmp_path / "taken").write_text("mine")
    refused(write({"output_dir": str(tmp_path / place)}), words_of_error=["output_dir", "taken", "is a file"])
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_earlier_run_is_not_overwritten(write, tmp_path, refused):
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-7" / "trainer_state.json").write_text("{}")
    words = ["output_dir", "checkpoint-7", "--resume_from_checkpoint true"]
    refused(write({}), words_of_error=words, may_start=True)


@pytest.mark.parametrize("place", ["final", "checkpoint-7"])
@pytest.mark.parametrize("key", ["model_name_or_path", "train_file", "eval_file"])
def test_what_a_run_reads_does_not_lie_in_what_it_replaces(key, place, write, tmp_path, tiny_model_dir, refused):
    shutil.copytree(tiny_model_dir, tmp_path / "out" / place)
    (tmp_path / "out" / place / "trainer_state.json").write_text("{}")
    (tmp_path / "linked").symlink_to("out")
    rows = tmp_path / "out" / place / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    read = tmp_path / "linked" / place / ("" if key.startswith("model") else rows.name)
    words = [f"{key}: ", f"{tmp_path / 'out' / place}', which this run replaces", "output_dir"]
    refused(write({key: str(read), "overwrite_output_dir": True}), words_of_error=words)


@pytest.mark.parametrize("place", ["", "data", "final-data", "checkpoint-data"])
def test_data_beside_what_a_run_replaces_is_read(place, write, tmp_path, monkeypatch):
    rows = tmp_path / "out" / place / "final.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text('{"text": "a b c d"}\n')
    (tmp_path / "out" / "final").mkdir()
    path = write({"train_file": str(rows), "overwrite_output_dir": True})
    monkeypatch.setattr(sys, "argv", ["train.py", "--train_args_file", str(path), "--dry_run"])
    train.main()


def test_flash_attention_that_is_not_installed(write, refused, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "longqlora.attention.binding.importlib.util.find_spec",
        lambda name: None if name == "flash_attn" else find_spec(name),
    )
    refused(write({"use_flash_attn": True}), words_of_error=["use_flash_attn", "pip install flash-attn"])


def test_processes_end_with_code_2(write, tmp_path):
    """The same from outside, with and without the launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(REPO / "train.py"), "--train_args_file", str(write({"lora_rnk": 8}))]
    launcher = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert launcher, "the deepspeed command belongs to the requirements"
    commands = [[sys.executable, *words], [launcher, "--num_gpus", "1", "--master_port", str(port), *words]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(c, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for c in commands
    ]
    for process in started:
        out, err = process.communicate(timeout=120)
        errors = [line for line in (out + err).splitlines() if line.startswith("error: ")]
        assert process.returncode == 2 and len(errors) == 1 and "lora_rnk" in errors[0], out + err
        assert "Traceback" not in out + err
    assert not (tmp_path / "out").exists()
