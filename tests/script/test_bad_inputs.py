"""Bad input to train.py: one line that names the key, the value and the fix, exit code 2, nothing written."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from conftest import REPO, sentences, tiny_config
from model_folders import edit_json

from longqlora.distributed import free_port

ZERO2 = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}


class REMOVE:
    """In place of a value: the key is left out."""


# A key, a bad value for it, and what the error says beside the two. "!x" is the file x of the fixture `folder`.
VALUES = [
    # No key of ours.
    ("lora_rnk", 8, "did you mean 'lora_rank'"), ("qqq", 1, "unknown setting", "docs/settings.md"),
    # Of another type.
    ("lora_rank", "many", "whole number"), ("fp16", "maybe", "true or false"), ("learning_rate", "fast", "number"),
    ("train_file", 5, "quotes"), ("target_modules", ["q_proj"], "text"), ("max_steps", None, "no value"),
    ("run_name", "!date", "2024", "quotes"), ("activation_checkpointing_kwargs", "x", "mapping"),
    ("deepspeed", True, "deepspeed"),
    # Beyond its limits.
    ("lora_rank", 0, "at least 1"), ("lora_alpha", -1, "positive"), ("lora_dropout", 1, "[0, 1)"),
    ("adam_beta2", 1, "[0, 1)"), ("learning_rate", ".nan", "finite"), ("learning_rate", -1e-4, "0 or more"),
    ("max_steps", 0, "-1"), ("max_steps", -5, "positive"), ("gradient_accumulation_steps", 0, "at least 1"),
    ("seed", -1, "2**32"), ("seed", 2**70, "2**32"), ("warmup_ratio", 3, "[0, 1)"), ("max_seq_length", 1, "at least 2"),
    ("lora_rank", 10**18, "at most 65,536"), ("max_steps", 10**30, "up to 1,000,000,000"),
    ("num_train_epochs", 10**12, "at most 1,000,000"), ("dataloader_num_workers", 10_000, "at most 512"),
    ("preprocessing_num_workers", 10_000, "at most 512"), ("gradient_accumulation_steps", 10**9, "at most"),
    ("per_device_train_batch_size", 10**9, "at most 1,048,576"), ("max_seq_length", 10**18, "at most"),
    ("tile_size", 10**400, "at most"), ("group_size_ratio", 0, "(0, 1]"), ("group_size_ratio", 2, "(0, 1]"),
    ("sequence_parallel_size", 0, "at least 1"), ("tile_size", 0, "at least 1"), ("num_head_chunks", -1, "at least 1"),
    # None of the choices.
    ("finetuning_type", "dora", "qlora"), ("attention", "none-such", "s2, full"), ("rope_type", "spiral", "linear"),
    ("train_embedding", "output", "true, false or input"), ("memory", "small", "balanced"), ("debug", "everything"),
    ("keep_activations", "some", "attention"), ("gpu_memory", "big", "size"), ("log_level", "loud", "warning"),
    ("prompt_template", "alpaca", "vicuna_v1.1"), ("eval_strategy", "sometimes", "steps"),
    ("lr_scheduler_type", "bumpy", "cosine"), ("lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler_kwargs"),
    ("lr_scheduler_kwargs", {"oops": 1}, "oops"), ("optim", "adamm", "adamw_torch"), ("optim", "galore_adamw"),
    ("optim", "paged_lion_32bit", "adamw_torch"), ("optim_args", "a", "optim"), ("report_to", "paper", "tensorboard"),
    ("metric_for_best_model", "bleu", "eval_loss"),
    ("target_modules", ",", "names no layer"), ("fsdp", "full_shard", "deepspeed"),
    ("use_liger_kernel", True, "leave it out"),
    # Missing, or not there.
    ("train_file", REMOVE, "missing"), ("model_name_or_path", REMOVE, "missing"), ("output_dir", REMOVE, "missing"),
    ("model_name_or_path", "", "missing"), ("train_file", "nowhere.jsonl"), ("train_file", "data"),
    ("train_file", "~no-such-user/a.jsonl", "no file at '~no-such-user"), ("eval_file", "nowhere.jsonl"),
    ("model_name_or_path", "./no/such"), ("data_cache_dir", "/dev/null/x", "is a file"), ("deepspeed", "zero9.json"),
    ("resume_from_checkpoint", "no-folder", "trainer_state"), ("resume_from_checkpoint", "!odd", "trainer_state"),
    # Without another key that it needs, or against the model.
    ("eval_strategy", "steps", "eval_file"), ("save_strategy", "best", "eval_file"),
    ("max_seq_length", 256, "128", "model_max_length"),
    ("model_max_length", REMOVE, "max_seq_length", "128", "model_max_length: 128"),
    ("rope_type", "theta", "rope_theta", "500000"),
    ("sequence_parallel_size", 2, "1 process", "--num_gpus 2"),
    # Files of another form.
    ("train_file", "!empty.jsonl", "is empty"), ("train_file", "!number.jsonl", "line 2", "int"),
    ("train_file", "!sft.jsonl", "line 1", "sft: true"), ("train_file", "!word.jsonl", "line 2", "not valid JSON"),
    ("deepspeed", "!cut.json", "not valid JSON"), ("deepspeed", "!list.json", "JSON object"),
    ("deepspeed", "!empty.jsonl", "not valid JSON"), ("deepspeed", {"zero_optimization": 2}, "zero_optimization", "2"),
    ("deepspeed", {"zero_optimization": {"stage": 7}}, "stage", "7"),
    ("deepspeed", {"zero_optimization": {"stage": 3}}, "ZeRO-3", "finetuning_type: lora"),
    ("deepspeed", {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "offload_optimizer", "'cpu'"),
    ("deepspeed", {**ZERO2, "train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4",
     "per_device_train_batch_size=1", "auto"),
]  # fmt: skip

# A model folder of the fixture `folder`, and words that the error must have.
MODELS = {
    "sliding": ["mistral", "of 32 tokens", "attention: full"], "odd": ["3", "heads"], "alien": ["alien"],
    "padless": ["config.json", "Padding_idx"], "nameless": ["nameless"],
    "quantised": ["model_name_or_path", "already quantised"], "broken": ["config"], "t5": ["model_max_length", "t5"],
    "bare": ["model_name_or_path", "no config.json"], "endless": ["EOS", "eos_token"],
    "small": ["tokenizer", "ids up to 319", "3 embeddings"],
}  # fmt: skip

# Several changes to a valid YAML, or one whose value is not said, and words that the error must have.
CHANGES = [
    ({"num_train_epochs": 0, "max_steps": REMOVE}, "num_train_epochs", "0"),
    ({"fp16": True, "bf16": True}, "fp16 and bf16"), ({"logging_steps": 0}, "logging_steps"),
    ({"target_modules": "q_proj,x_proj"}, "target_modules", "x_proj", "q_proj"), ({"group_size_ratio": 1e-3}, "group"),
    ({"accelerator_config": {"oops": 1}}, "oops"), ({"accelerator_config": "no.json"}, "settings", "no.json"),
    ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end"),
    ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_file": "!train.jsonl", "eval_steps": 3,
      "save_steps": 4}, "load_best_model_at_end", "3", "4"),
    ({"rope_theta": 5e5}, "rope_theta", "rope_type: theta"),
    ({"model_name_or_path": "!scaled", "rope_type": "linear"}, "longrope", "leave rope_type out"),
    ({"rope_type": "theta", "rope_theta": 0}, "rope_theta", "above 1"),
    ({"dca_chunk_size": 32}, "dca_chunk_size", "attention: dca"),
    ({"attention": "full", "pretraining_length": 32}, "pretraining_length", "attention: dca"),
    ({"attention": "dca", "pretraining_length": 128}, "pretraining_length", "64", "rope_type"),
    ({"attention": "dca", "rope_type": "yarn"}, "pretraining_length", "rope_type"),
    ({"attention": "dca", "dca_chunk_size": 65}, "dca_chunk_size", "64", "65"),
    ({"attention": "dca", "dca_local_window": 48}, "dca_local_window", "48"),
    ({"attention": "dca", "dca_local_window": 0}, "dca_local_window", "at least 1"),
    ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio", "warmup_steps"),
    ({"evaluation_strategy": "no", "eval_strategy": "no"}, "evaluation_strategy", "eval_strategy"),
    ({"memory": "auto", "gpu_memory": "1MiB"}, "memory", "of the 0.0 GiB available"),
    ({"deepspeed": {**ZERO2, "gradient_clipping": 1.0}, "max_grad_norm": 0.3}, "gradient_clipping=1.0", "0.3"),
    ({"model_name_or_path": "!t5", "model_max_length": REMOVE}, "model_name_or_path", "no causal language model"),
    ({"sft": True, "train_file": "!sft.jsonl", "prompt_template": "chat_template"}, "prompt_template", "vicuna_v1.1"),
    *(({"model_name_or_path": f"!{name}"}, *words) for name, words in MODELS.items()),
]  # fmt: skip

# Each list holds the one before it twice.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
# Text of the YAML, and words that the error must have.
TEXTS = [
    ("", "is empty"), ("# nothing\n", "is empty"), ("- a: 1\n", "list", "key: value"),
    ("hello\n", "text", "key: value"),
    ("a: 1\n\tb: 2\n", "line 2"), ("max_steps: 1\nseed: 1\nmax_steps: 2\n", "line 3", "'max_steps'", "twice"),
    ("deepspeed: {a: 1, a: 2}\n", "'a'", "twice"), ("output_dir: caf\xe9\n".encode("latin-1"), "UTF-8"),
    ("a: 1\n---\nb: 2\n", "line 2"), ("a: [1, 2\n", "line"), ("8192: 1\n", "8192", "no name"),
    ("on: 1\n", "True", "no name"), ("a: !!python/object:os.system {}\n", "line 1"),
    (BOMB, "aliases stand for", "100,000"), ("a: &a [*a]\n", "not valid YAML"), ("#" * 2**21, "1,048,576 bytes"),
    ("a: \x00\n", "not valid YAML"), ("run_name: 2024-13-45\n", "not valid YAML"), ("a: " + "[" * 5000, "YAML"),
]  # fmt: skip

# Words after the YAML, and words that the error must have.
WORDS = [
    ("--lora_rnk 8", "lora_rnk", "'8'", "lora_rank"), ("stray", "'stray'", "--key value"), ("-x 3", "'-x'"),
    ("--learning_rate", "learning_rate", "'true'"), ("--train_file", "train_file", "'true'"), ("--", "--key value"),
    ("--output_dir=", "output_dir", "missing"), ("--=3", "--=3"), ("--deepspeed {broken", "deepspeed", "{broken"),
]  # fmt: skip


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
        "broken": "{", "nameless": "{}", "alien": '{"model_type": "alien"}', "endless": None,
        "t5": '{"model_type": "t5", "max_position_embeddings": 512}',
    }  # fmt: skip
    for name, config in models.items():
        shutil.copytree(tiny_model_dir, root / name, ignore=shutil.ignore_patterns("*.safetensors"))
        if isinstance(config, str):
            (root / name / "config.json").write_text(config)
        elif config:
            config.save_pretrained(root / name)
    edit_json(root / "endless" / "tokenizer_config.json", eos_token=None)
    files = {
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
def dry_run(run_in_process):
    """Run train.py --dry_run in this process: exit code, stdout, stderr."""
    return functools.partial(run_in_process, "train.py", "--dry_run", "--train_args_file")


@pytest.fixture
def refused(tmp_path, dry_run, monkeypatch):
    """Check the error line of a dry run, that nothing was written, and that the checks before it found the fault."""

    def refused(*words, words_of_error, may_start=False) -> None:
        if not may_start:
            monkeypatch.setattr("longqlora.training.dry_run.dry_run", Mock(side_effect=AssertionError("not found")))
        before = sorted(tmp_path.rglob("*"))
        code, out, error = dry_run(*words)
        assert (code, out, error.count("\n")) == (2, "", 1) and error.startswith("error: "), error
        assert not [word for word in words_of_error if word not in error], error
        assert len(error) < 800, "longer than anyone reads"
        assert sorted(tmp_path.rglob("*")) == before

    return refused


VALID = [{}, {"model_name_or_path": "!sliding", "attention": "full"}, {"model_name_or_path": "!scaled"}]


@pytest.mark.parametrize("changes", VALID, ids=str)
def test_the_settings_that_are_changed_below_and_a_fix_are_valid(changes, write, dry_run):
    assert "all settings are valid" in dry_run(write(changes))[1]


@pytest.mark.parametrize("case", [*VALUES, *CHANGES], ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_bad_value(case, write, refused):
    if isinstance(case[0], dict):
        changes, *words = case
    else:
        key, value, *words = case
        is_said = isinstance(value, (str, int, float)) and not str(value).startswith(("!", "."))
        changes, words = {key: value}, [key, *([str(value)] if is_said else []), *words]
    refused(write(changes), words_of_error=words, may_start="resume_from_checkpoint" in changes)


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: str(case[0])[:20])
def test_a_bad_yaml(case, tmp_path, refused):
    text, *words = case
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(path, words_of_error=["run.yaml", *words])


@pytest.mark.parametrize("case", WORDS, ids=lambda case: case[0])
def test_a_bad_word_on_the_command_line(case, write, refused):
    words, *expected = case
    refused(write({}), *words.split(), words_of_error=expected)


@pytest.mark.parametrize("path", ["nowhere.yaml", str(REPO)])
def test_a_yaml_that_is_not_there(path, refused):
    refused(path, words_of_error=["--train_args_file", path])


@pytest.mark.parametrize("place", ["taken", "taken/below"])
def test_a_file_in_the_way_of_the_output(place, write, tmp_path, refused):
    (tmp_path / "taken").write_text("mine")
    refused(write({"output_dir": str(tmp_path / place)}), words_of_error=["output_dir", "taken", "is a file"])
    assert (tmp_path / "taken").read_text() == "mine"


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
def test_data_beside_what_a_run_replaces_is_read(place, write, tmp_path, dry_run):
    rows = tmp_path / "out" / place / "final.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text('{"text": "a b c d"}\n')
    (tmp_path / "out" / "final").mkdir()
    assert dry_run(write({"train_file": str(rows), "overwrite_output_dir": True}))[0] == 0


def test_processes_end_with_code_2(write, tmp_path):
    """The same from outside, with and without the launcher."""
    words = [REPO / "train.py", "--train_args_file", write({"lora_rnk": 8})]
    launcher = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert launcher, "the deepspeed command belongs to the requirements"
    launch = [launcher, "--num_gpus", "1", "--master_port", str(free_port())]
    options = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    for process in [
        subprocess.Popen([*start, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        for start in ([sys.executable], launch)
    ]:
        output, _ = process.communicate(timeout=120)
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2 and len(errors) == 1 and "lora_rnk" in errors[0], output
        assert "Traceback" not in output
    assert not (tmp_path / "out").exists()
