"""The result of an earlier run survives a second run into its folder that is refused, fails or is killed."""

import shutil
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from conftest import REPO, ZERO2, save_tiny_model, tiny_config
from model_folders import edit_json
from script_process import start_script
from training_process import contents, fail, train

RESUME, OVERWRITE = ("--resume_from_checkpoint", "true"), ("--overwrite_output_dir", "true")
GO_ON, DIVERGE = (*RESUME, "--max_steps", 6), ("--learning_rate", "1e30", "--warmup_steps", 0)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove_checkpoints(output: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(output / name)


# Base models: the tiny one, spoiled.
MODELS = {
    "cut-weights": lambda model: cut(model / "model.safetensors"),
    "no-weights": lambda model: (model / "model.safetensors").unlink(),
    "cut-config": lambda model: cut(model / "config.json"),
    "odd-config": lambda model: edit_json(model / "config.json", num_attention_heads=0),
    "no-tokenizer": lambda model: [file.unlink() for file in model.glob("tokenizer*")],
    "no-eos": lambda model: edit_json(model / "tokenizer_config.json", eos_token=None),
}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, write_yaml_in, tiny_model_dir, tiny_tokenizer, train_file) -> Path:
    """A folder with a finished run of 4 steps, its YAML, and what second runs are given."""
    folder = tmp_path_factory.mktemp("earlier")
    train(write_yaml_in(folder, max_steps=4)[0])
    shutil.copytree(folder / "run" / "checkpoint-2", folder / "elsewhere" / "checkpoint-2")
    for name, spoil in MODELS.items():
        spoil(shutil.copytree(tiny_model_dir, folder / name))
    save_tiny_model(folder / "wider", tiny_tokenizer, tiny_config(hidden_size=128))
    lines = train_file.read_text().splitlines()
    (folder / "damaged.jsonl").write_text("\n".join([*lines[:20], lines[20][:30], *lines[21:]]))
    (folder / "empty.jsonl").touch()
    (folder / "bad.yaml").write_text("max_steps: [1\n")
    return folder


@pytest.fixture
def run(earlier, tmp_path) -> tuple[Path, Path]:
    """A copy of the earlier run: its YAML and its output_dir."""
    path, output = tmp_path / "run.yaml", tmp_path / "run"
    shutil.copytree(earlier / "run", output)
    path.write_text(yaml.safe_dump({**yaml.safe_load((earlier / "run.yaml").read_text()), "output_dir": str(output)}))
    return path, output


# Words of the second run, where !x is the file x of `earlier`, words of its one line, and what is spoiled before it.
REFUSED = {
    "no permission": ((), "holds checkpoint-4 and final"),
    "no permission, from a checkpoint of another run": (
        ("--resume_from_checkpoint", "!elsewhere/checkpoint-2"), "holds checkpoint-4 and final"
    ),
    "no permission, final alone": ((), "holds final of an earlier run; add --overwrite", remove_checkpoints),
    "no permission, nothing to resume": (RESUME, "holds final of an earlier run; add --overwrite", remove_checkpoints),
    "unknown key": ((*OVERWRITE, "--lora_rnk", 8), "did you mean 'lora_rank'"),
    "bad YAML": ((*OVERWRITE, "--train_args_file", "!bad.yaml"), "bad.yaml line"),
    "no data": ((*OVERWRITE, "--train_file", "!deleted.jsonl"), "deleted.jsonl"),
    "no data, resumed": ((*GO_ON, "--train_file", "!deleted.jsonl"), "deleted.jsonl"),
    "empty data": ((*OVERWRITE, "--train_file", "!empty.jsonl"), "is empty"),
    "a damaged row in the middle": ((*OVERWRITE, "--train_file", "!damaged.jsonl"), "damaged.jsonl line 21"),
    "rows of another form": ((*OVERWRITE, "--sft", "true"), "line 1"),
    **{name: ((*OVERWRITE, "--model_name_or_path", f"!{name}"), name) for name in MODELS},
    "wrong DeepSpeed file": ((*OVERWRITE, "--deepspeed", "!bad.yaml"), "deepspeed"),
    "too little memory": ((*OVERWRITE, "--memory", "auto", "--gpu_memory", "1MiB"), "GiB available"),
    "no checkpoint": ((*OVERWRITE, "--resume_from_checkpoint", "!nowhere"), "nowhere"),
    "a damaged checkpoint": (GO_ON, "optimizer.pt", lambda out: cut(out / "checkpoint-4" / "optimizer.pt")),
    "a checkpoint without DeepSpeed": ((*GO_ON, "--deepspeed", ZERO2), "no folder of DeepSpeed's states"),
    "another rank, resumed": ((*GO_ON, "--lora_rank", 8), "lora_rank"),
    "another model, resumed": ((*GO_ON, "--model_name_or_path", "!wider"), "model_name_or_path"),
    "a rank beyond all memory": ((*OVERWRITE, "--lora_rank", 10**18), "lora_rank"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_run_that_is_refused_leaves_all_as_it_was(earlier, run, run_in_process, monkeypatch, case):
    (path, output), (words, text, *spoil) = run, case
    monkeypatch.setattr("longqlora.training.run.lock_output_dir", Mock(side_effect=AssertionError("went on")))
    for change in spoil:
        change(output)
    before = contents(output)
    words = [str(earlier / word[1:]) if str(word).startswith("!") else word for word in words]
    code, _, error = run_in_process("train.py", "--train_args_file", path, *words)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and text in lines[0], error
    assert contents(output) == before


FULL_DISK = {"max_file_bytes": 100_000}
FAILING = {
    "a folder that cannot be written to": (("--data_cache_dir", "/proc/cache"), "/proc/cache", {}),
    "diverges": (DIVERGE, "diverged", {}),
    "diverges before final": ((*DIVERGE, "--save_strategy", "no"), "diverged", {}),
    "a full disk": ((), "could not write checkpoint-2", FULL_DISK),
    "a full disk at final": (("--save_strategy", "no"), "could not write final", FULL_DISK),
}


@pytest.mark.parametrize("words,text,options", FAILING.values(), ids=FAILING)
def test_a_run_that_fails_leaves_all_as_it_was(run, words, text, options):
    path, output = run
    before = contents(output)
    assert text in fail(path, *OVERWRITE, *words, **options)
    assert contents(output) == before


# train.py, which gets a signal where it would call one function.
KILLED = """
import os, pkgutil, runpy, signal, sys, time
_, owner, name, signum, *sys.argv = sys.argv

def die(*args, **kwargs):
    os.kill(os.getpid(), int(signum))
    time.sleep(60)

# A shell's background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
setattr(pkgutil.resolve_name(owner), name, die)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TRAINER = "longqlora.training.trainer"
MOMENTS = {
    "training": (f"{TRAINER}:LongContextTrainer", "training_step"),
    "saving a checkpoint": (TRAINER, "save_tokenizer"),
    "renaming a checkpoint": ("longqlora.training.run_folder", "replace_folder"),
    "having a checkpoint": (f"{TRAINER}:LongContextTrainer", "save_final"),
    "saving final": (TRAINER, "save_tokenizer", "--save_strategy", "no"),
}
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
KILLS = [(signal.SIGKILL, moment) for moment in MOMENTS]
KILLS += [(signal.SIGTERM, "training"), (signal.SIGTERM, "saving final"), (signal.SIGINT, "saving a checkpoint")]


@pytest.mark.parametrize("signum,moment", KILLS, ids=lambda value: getattr(value, "name", value))
def test_a_run_that_is_killed_leaves_the_earlier_final(earlier, run, tmp_path, signum, moment):
    (path, output), (owner, name, *words) = run, MOMENTS[moment]
    script, log = tmp_path / "killed.py", tmp_path / "log"
    script.write_text(KILLED)
    command = [script, owner, name, int(signum), REPO / "train.py", "--train_args_file", path, *OVERWRITE, *words]
    process = start_script(command, ["/dev/null", log, log], {})
    process.join(120)
    text = log.read_text(errors="replace")
    assert process.exitcode == CODES[signum] and "Traceback" not in text, text[-4000:]
    assert contents(output / "final") == contents(earlier / "run" / "final")
