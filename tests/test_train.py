"""train.py from start to end on a tiny model: what a run leaves, resuming, several processes, upstream's YAML."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import sentences
from peft import PeftModel
from safetensors.torch import load_file
from training_process import finish, finish_world, start
from transformers import AutoConfig, AutoModelForCausalLM

from component.checkpoint import list_checkpoints

REPO = Path(__file__).resolve().parents[1]
NUM_STEPS = 6
SETTINGS = {
    "model_max_length": 128, "max_seq_length": 128, "attention": "s2", "lora_rank": 4, "train_embedding": True,
    "train_norm": True, "max_steps": NUM_STEPS, "per_device_train_batch_size": 2, "learning_rate": "1e-2",
    "logging_steps": 1, "save_steps": 2, "save_total_limit": 2, "gradient_checkpointing": True, "pack": True,
    "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3, "seed": 7, "report_to": "none",
    "dataloader_pin_memory": False,
}  # fmt: skip
ZERO2 = str(REPO / "train_args" / "deepspeed" / "zero2.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"text": sentences(20 + 37 * i % 160, seed=i)} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def write_yaml(tmp_path, tiny_model_dir, data):
    """Write a YAML of SETTINGS with changes (None leaves a key out); returns its path and the output_dir."""

    def write(name="run", **changes) -> tuple[Path, Path]:
        output_dir = tmp_path / name
        values = {
            "model_name_or_path": str(tiny_model_dir), "train_file": str(data), "output_dir": str(output_dir),
            "data_cache_dir": str(tmp_path / "cache"), **SETTINGS, **changes,
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path, output_dir

    return write


def train(path: Path, *arguments, log: Path | None = None) -> None:
    log = log or path.with_suffix(".out")
    finish(start("--train_args_file", path, *arguments, log=log), log)


def losses(output_dir: Path) -> dict[int, float]:
    history = json.loads((output_dir / "train_results.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def epochs(output_dir: Path) -> list[float]:
    history = json.loads((output_dir / "train_results.json").read_text())["log_history"]
    return [round(entry["epoch"], 6) for entry in history if "loss" in entry]


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "final" / "adapter_model.safetensors")


def test_what_a_run_leaves(write_yaml, tiny_model_dir):
    path, out = write_yaml(deepspeed=ZERO2, report_to="tensorboard")
    train(path)
    run = losses(out)
    assert len(run) == NUM_STEPS and run[NUM_STEPS] < run[1]
    names = {item.name for item in out.iterdir()}
    assert {"final", "run_record.json", "train.log", "train_results.json", "loss.png", "tensorboard"} <= names
    assert any((out / "tensorboard").glob("events*")) and ".saving" not in names
    assert [item.name for item in list_checkpoints(out)] == ["checkpoint-4", "checkpoint-6"]
    record = json.loads((out / "final" / "run_record.json").read_text())
    assert record["arguments"]["adapter"]["lora_rank"] == 4 and record["versions"]["torch"] == torch.__version__
    assert record["arguments"]["attention"]["attention"] == "s2" and "commit" in record["versions"]
    for folder in (out / "final", out / "checkpoint-6"):
        files = {item.name for item in folder.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json"} <= files
        assert not {"training_args.bin", "adapter_model.bin", "trainable_params.bin"} & files
    log = (out / "train.log").read_text()
    assert "S2-Attn, groups of 32 tokens" in log and "RoPE linear x2" in log and "rows from 40" in log

    # DeepSpeed really ran: its optimizer state lies in the checkpoint.
    assert any((out / "checkpoint-6" / "global_step6").glob("*optim_states.pt"))

    config = AutoConfig.from_pretrained(out / "final")
    assert config.rope_parameters["factor"] == 2 and config.max_position_embeddings == 128
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, config=config), out / "final"
    )
    assert any("modules_to_save" in name for name, _ in stock.named_parameters())


def test_same_seed_same_run_other_seed_other_run(write_yaml):
    runs = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        path, out = write_yaml(name, seed=seed, max_steps=3, save_strategy="no")
        train(path)
        runs.append(losses(out))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("epochs", [None, 1], ids=["steps", "epochs"])
def test_resuming_a_finished_run_adds_no_step(write_yaml, epochs):
    """As after a kill between the last checkpoint and the final save."""
    path, out = write_yaml(num_train_epochs=epochs, max_steps=None if epochs else NUM_STEPS)
    train(path)
    expected, final = losses(out), weights(out)
    shutil.rmtree(out / "final")
    train(path, "--resume_from_checkpoint", "true")
    assert losses(out) == expected
    assert all(torch.equal(final[name], tensor) for name, tensor in weights(out).items())


@pytest.mark.parametrize("deepspeed,num_kills", [(ZERO2, 5), (None, 2)], ids=["zero2", "plain"])
def test_killed_at_any_moment_resumes_to_the_same_losses(write_yaml, deepspeed, num_kills):
    """Each kill -9 comes at a random moment of a new run; after resuming every loss equals the whole run's bits."""
    path, whole = write_yaml("whole", deepspeed=deepspeed)
    started = time.monotonic()
    train(path)
    duration = time.monotonic() - started
    expected = losses(whole)

    generator = random.Random(11)
    for attempt in range(num_kills):
        path, out = write_yaml(f"killed{attempt}", deepspeed=deepspeed)
        log = out.with_suffix(".out")
        process = start("--train_args_file", path, log=log)
        time.sleep(duration * generator.uniform(0.15, 0.95))
        process.kill()
        process.join()
        for checkpoint in list_checkpoints(out):
            load_file(checkpoint / "adapter_model.safetensors")
        train(path, "--resume_from_checkpoint", "true", log=log)
        assert losses(out) == expected, f"attempt {attempt}"
        for name, tensor in weights(out).items():
            assert torch.equal(tensor, weights(whole)[name]), name
        shutil.rmtree(out)


def test_a_half_written_checkpoint_is_never_picked_up(write_yaml):
    path, out = write_yaml(max_steps=4)
    train(path)
    expected = losses(out)
    # What a kill leaves: the staging folder; and what older tools leave: a folder without the trainer's state.
    (out / ".saving" / "checkpoint-9").mkdir(parents=True)
    (out / "checkpoint-9").mkdir()
    (out / "checkpoint-9" / "adapter_model.safetensors").write_bytes(b"cut off")
    train(path, "--resume_from_checkpoint", "true", "--max_steps", 6)
    resumed = losses(out)
    assert len(resumed) == 6 and {step: resumed[step] for step in expected} == expected


def test_an_earlier_run_is_not_overwritten(write_yaml, capfd):
    path, out = write_yaml(max_steps=2)
    train(path)
    before = (out / "checkpoint-2" / "trainer_state.json").read_bytes()
    log = path.with_suffix(".again")
    process = start("--train_args_file", path, log=log)
    process.join(60)
    assert process.exitcode == 2 and "--resume_from_checkpoint true" in log.read_text()
    assert (out / "checkpoint-2" / "trainer_state.json").read_bytes() == before
    train(path, "--overwrite_output_dir", "true", "--max_steps", 1)
    assert [item.name for item in list_checkpoints(out)] == ["checkpoint-1"]


def test_resuming_with_other_settings_says_so(write_yaml):
    path, out = write_yaml(max_steps=2)
    train(path)
    train(path, "--resume_from_checkpoint", "true", "--max_steps", 3, "--learning_rate", "1e-3")
    assert "learning_rate was 0.01 and is now 0.001" in (out / "train.log").read_text()


def test_two_processes_equal_one_with_doubled_accumulation(write_yaml):
    """2 ranks x 1 row against 1 rank x 2 accumulated rows: the same rows in each step, to 1e-5 in loss."""
    shared = {
        "per_device_train_batch_size": 1,
        "lora_dropout": 0,
        "deepspeed": ZERO2,
        "save_strategy": "no",
        "max_steps": 5,
    }
    path, one = write_yaml("one", gradient_accumulation_steps=2, **shared)
    train(path)
    path, two = write_yaml("two", gradient_accumulation_steps=1, **shared)
    finish_world("--train_args_file", path, log=path.with_suffix(".out"), num_processes=2)
    first, second = losses(one), losses(two)
    assert len(first) == len(second) == 5
    # Both saw two rows a step: the processes were one world, not two runs of their own.
    assert epochs(two) == pytest.approx(epochs(one), rel=0.1)
    assert all(abs(first[step] - second[step]) < 1e-5 for step in first)


def test_loss_does_not_depend_on_how_a_batch_is_accumulated(write_yaml):
    """Rows of unequal length: the loss of a step is the mean over its tokens, however they are split."""
    shared = {"pack": False, "lora_dropout": 0, "save_strategy": "no", "max_steps": 3, "learning_rate": "1e-3"}
    path, together = write_yaml("together", per_device_train_batch_size=4, gradient_accumulation_steps=1, **shared)
    train(path)
    path, apart = write_yaml("apart", per_device_train_batch_size=1, gradient_accumulation_steps=4, **shared)
    train(path)
    first, second = losses(together), losses(apart)
    assert all(abs(first[step] - second[step]) < 1e-5 for step in first)


def test_rows_of_like_length_share_a_batch(write_yaml):
    """group_by_length: fewer tokens of padding for the same rows."""
    seen = {}
    for grouped in (False, True):
        path, out = write_yaml(
            f"grouped-{grouped}", pack=False, group_by_length=grouped, max_steps=20, save_strategy="no",
            include_num_input_tokens_seen="all", model_max_length=512, max_seq_length=512,
        )  # fmt: skip
        train(path)
        result = json.loads((out / "train_results.json").read_text())
        seen[grouped] = next(x["num_input_tokens_seen"] for x in result["log_history"][::-1] if "loss" in x)
    assert seen[True] < 0.9 * seen[False], seen
    assert 0 < result["data_share"] < 0.5 and result["start_up_seconds"] > 0


def test_upstream_yaml_runs_as_it_is(write_yaml, tmp_path, tiny_model_dir, data):
    """The keys of upstream's pretraining YAML and its DeepSpeed file, with nothing changed but paths and sizes."""
    deepspeed = tmp_path / "ds_z2.json"
    deepspeed.write_text(json.dumps({
        "gradient_accumulation_steps": "auto", "train_micro_batch_size_per_gpu": "auto", "steps_per_print": 200,
        "wall_clock_breakdown": False, "optimizer": None, "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "min_loss_scale": 1},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
    }).replace('"optimizer": null, ', ""))  # fmt: skip
    out = tmp_path / "out"
    path = tmp_path / "upstream.yaml"
    path.write_text(f"""
output_dir: {out}
model_name_or_path: {tiny_model_dir}
train_file: {data}
deepspeed: {deepspeed}
sft: false
num_train_epochs: 1
max_steps: 2
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
max_seq_length: 128
model_max_length: 128
learning_rate: 2e-4
logging_steps: 1
save_steps: 2
save_total_limit: 1
lr_scheduler_type: constant_with_warmup
warmup_steps: 1
lora_rank: 8
lora_alpha: 16
lora_dropout: 0.05
gradient_checkpointing: true
disable_tqdm: false
optim: paged_adamw_32bit
seed: 42
fp16: true
report_to: "tensorboard"
dataloader_num_workers: 0
save_strategy: "steps"
weight_decay: 0
max_grad_norm: 0.3
remove_unused_columns: false
""")
    train(path)
    assert len(losses(out)) == 2
    log = (out / "train.log").read_text()
    for notice in ("fp16 becomes false", "paged_adamw_32bit becomes adamw_torch", "gradient_clipping"):
        assert notice in log


@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
def test_other_finetuning_types(write_yaml, finetuning_type):
    changes = {"lora_rank": None, "train_embedding": None, "train_norm": None} if finetuning_type == "full" else {}
    path, out = write_yaml(finetuning_type=finetuning_type, max_steps=4, attention="full", **changes)
    train(path)
    expected = losses(out)
    assert expected[4] < expected[1]
    train(path, "--resume_from_checkpoint", str(out / "checkpoint-2"))
    assert losses(out) == expected
    saved = json.loads((out / "final" / "config.json").read_text())
    assert saved["rope_scaling"] == {"rope_type": "linear", "factor": 2.0} and saved["max_seq_len"] == 64
    tokenizer = json.loads((out / "final" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    if finetuning_type == "full":
        model = AutoModelForCausalLM.from_pretrained(out / "final")
        assert model.config.rope_parameters["factor"] == 2


def test_sft_and_evaluation_during_training(write_yaml, tmp_path):
    rows = [{"input": sentences(6, i), "output": sentences(5, i + 50)} for i in range(12)]
    file = tmp_path / "sft.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    path, out = write_yaml(
        sft=True, pack=False, train_file=str(file), eval_file=str(file), evaluation_strategy="steps", eval_steps=2,
        model_max_length=512, max_seq_length=512, max_steps=4, per_device_eval_batch_size=2,
    )  # fmt: skip
    train(path)
    history = json.loads((out / "train_results.json").read_text())["log_history"]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(evaluations) == 2 and evaluations[1] < evaluations[0]


def test_a_full_disk_leaves_the_last_good_checkpoint(write_yaml, tmp_path):
    """A limit on file size stands in for a full disk: the second checkpoint cannot be written."""
    path, out = write_yaml(max_steps=2, deepspeed=ZERO2)
    train(path)
    good = {item.name: item.read_bytes() for item in (out / "checkpoint-2").iterdir() if item.is_file()}
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.path.insert(0, '.');"
        "import train; from component.cli import run_main; run_main(train.main)"
    )
    words = ["--train_args_file", str(path), "--resume_from_checkpoint", "true", "--max_steps", "4"]
    outcome = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=REPO, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert outcome.returncode == 2, outcome.stderr[-3000:]
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "checkpoint-2" in errors[0] and "Traceback" not in outcome.stderr
    assert [item.name for item in list_checkpoints(out)] == ["checkpoint-2"]
    assert {item.name: item.read_bytes() for item in (out / "checkpoint-2").iterdir() if item.is_file()} == good
