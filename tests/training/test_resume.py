"""What a checkpoint must be before a run resumes from it, and what has changed since: each said in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ZERO2
from training_process import contents, fail, losses_of, same_weights, train

from longqlora.training.resume import check_contents, check_file, check_resumable, load_without_code

DEEPSPEED = {"plain": None, "zero2": ZERO2}
OPTIM = "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL = "global_step2/mp_rank_00_model_states.pt"
RESUME = ("--resume_from_checkpoint", "true")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_yaml_in) -> dict[str, Path]:
    """The folder of a run of 4 steps with two checkpoints, plain and under ZeRO-2, its YAML beside it."""
    folder = tmp_path_factory.mktemp("resume")
    runs = {name: write_yaml_in(folder, name, max_steps=4, deepspeed=DEEPSPEED[name]) for name in DEEPSPEED}
    for path, _ in runs.values():
        train(path)
    return {name: output for name, (_, output) in runs.items()}


@pytest.fixture
def interrupted(whole, tmp_path):
    """Copies a run as if it had stopped after checkpoint-2; returns its YAML and its output folder."""

    def copy(kind: str) -> tuple[Path, Path]:
        path, output = tmp_path / f"{kind}.yaml", tmp_path / kind
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(whole[kind] / "checkpoint-2", output / "checkpoint-2")
        values = yaml.safe_load(whole[kind].with_suffix(".yaml").read_text())
        path.write_text(yaml.safe_dump({**values, "output_dir": str(output)}))
        return path, output

    return copy


def check(checkpoint: Path, *, world_size: int = 1, changes: dict | None = None, **hashes) -> list[str]:
    """Compare a checkpoint with a run of the same settings but `changes`, and data of other hashes."""
    record = json.loads((checkpoint / "run_record.json").read_text())
    arguments = {"changes": changes or {}, **record["arguments"]}
    data = {**record["data_sha256"], **hashes}
    return check_resumable(checkpoint, arguments, world_size=world_size, data_sha256=data)


TRACE = Path("trace-of-evil")


class Evil:
    """Makes a file when it is read as a pickle."""

    def __reduce__(self):
        return os.system, (f"touch {TRACE}",)


def poison(file: Path, **how) -> None:
    state = torch.load(file, weights_only=False) if file.is_file() else {}
    torch.save({**state, "evil": Evil()}, file, **how)


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "code": poison,
    "code, old format": lambda file: poison(file, _use_new_zipfile_serialization=False),
    "code, protocol 4": lambda file: poison(file, pickle_protocol=4),
}
FILES = {
    "plain": ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json"],
    "zero2": [OPTIM, MODEL, "scheduler.pt", "rng_state.pth", "latest"],
}


@pytest.mark.parametrize("kind", DEEPSPEED)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_missing_damaged_or_would_run_code_is_named(interrupted, tmp_path, monkeypatch, kind, damage):
    monkeypatch.chdir(tmp_path)
    # fp16's scaler.pt is one more that is read.
    pickles = [name for name in FILES[kind] if name.endswith((".pt", ".pth"))] + ["scaler.pt"]
    for name in pickles if "code" in damage else FILES[kind]:
        if (damage, name) == ("missing", "trainer_state.json"):
            continue  # No complete checkpoint: found by no one.
        checkpoint = interrupted(kind)[1] / "checkpoint-2"
        assert check(checkpoint) == []
        DAMAGES[damage](checkpoint / name)
        with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*{Path(name).name}"):
            check(checkpoint)
    assert not TRACE.exists()


@pytest.mark.parametrize("kind,name,word", [("plain", "optimizer.pt", "lacks"), ("zero2", OPTIM, "posix.system")])
def test_a_run_with_a_checkpoint_that_is_refused_writes_and_reads_nothing(
    interrupted, tmp_path, monkeypatch, kind, name, word
):
    monkeypatch.chdir(tmp_path)
    path, output = interrupted(kind)
    DAMAGES["missing" if word == "lacks" else "code"](output / "checkpoint-2" / name)
    for words in ((), ("--dry_run",)):
        error = fail(path, *RESUME, *words)
        assert name in error and word in error
    assert not TRACE.exists() and [item.name for item in output.iterdir()] == ["checkpoint-2"]


def test_deepspeed_itself_runs_no_code_from_a_file(whole, tmp_path, monkeypatch):
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    load_without_code(uses_deepspeed=True)
    state = TorchCheckpointEngine().load(str(whole["zero2"] / "checkpoint-2" / OPTIM))
    assert state["optimizer_state_dict"]["zero_stage"] == 2
    poison(tmp_path / "evil.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        TorchCheckpointEngine().load(str(tmp_path / "evil.pt"))
    assert not TRACE.exists()
    # No run on the CPU writes the loss scale of 16 bit.
    torch.save({"loss_scaler": DynamicLossScaler(2**16, 2.0, 1000, 1, 1, False, dtype=torch.half)}, tmp_path / "x.pt")
    check_file(tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=False)["loss_scaler"].cur_scale == 2**16


NEEDED = [
    ({}, ["rng_state_1.pth", "optimizer.pt"]), ({"fp16": True}, ["scaler.pt"]),
    ({"finetuning_type": "full"}, ["model.safetensors"]),
    ({"deepspeed": {"zero_optimization": {"stage": 3}}}, ["zero_pp_rank_1_mp_rank_00_model_states.pt"]),
    ({"deepspeed": {"zero_optimization": {"stage": 1}}}, ["zero_pp_rank_1_mp_rank_00_optim_states.pt"]),
]  # fmt: skip


@pytest.mark.parametrize("settings,files", NEEDED)
def test_what_each_kind_of_run_needs(tmp_path, settings, files):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2, "log_history": []}')
    (tmp_path / "latest").write_text("global_step2")
    (tmp_path / "global_step2").mkdir()
    with pytest.raises(ValueError) as error:
        check_contents(tmp_path, {"finetuning_type": "lora", **settings}, num_processes=2)
    assert all(name in str(error.value) for name in files)


INVALID = {
    "run_record.json": ["[]", '"x"', "{}", '{"arguments": []}', '{"arguments": {"data": 1}}', "{"],
    "trainer_state.json": ["[]", "1", "{}x", '{"global_step": "2"}', '{"log_history": [1]}', '{"other": 1}'],
}


@pytest.mark.parametrize("name,text", [(name, text) for name, texts in INVALID.items() for text in texts])
def test_json_of_another_form_is_named(interrupted, name, text):
    checkpoint = interrupted("plain")[1] / "checkpoint-2"
    (checkpoint / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        check_resumable(checkpoint, {"adapter": {"finetuning_type": "qlora"}}, world_size=1, data_sha256={})


OTHER_STATES = [
    ("optimizer.pt", [1]), ("optimizer.pt", {"state": {}, "param_groups": []}), ("scheduler.pt", {"last_epoch": "2"}),
    ("scheduler.pt", {"last_epoch": 2, "base_lrs": ["x"]}), ("rng_state.pth", {"python": 1}), ("rng_state.pth", {}),
]  # fmt: skip


@pytest.mark.parametrize("name,state", OTHER_STATES)
def test_a_whole_file_that_holds_something_else_is_named(interrupted, name, state):
    checkpoint = interrupted("plain")[1] / "checkpoint-2"
    torch.save(state, checkpoint / name)
    with pytest.raises(ValueError, match=f"^resume_from_checkpoint: .*{name}"):
        check(checkpoint)


CHANGED = {
    "nothing": ({}, []),
    "data": ({"train_file": "0" * 64}, ["train.jsonl", "the losses will differ"]),
    "data moved": ({"changes": {"train_file": "elsewhere.jsonl"}}, []),
    "processes": ({"world_size": 2}, ["number of processes was 1 and is now 2: the losses will differ"]),
    "a setting": ({"changes": {"learning_rate": 1e-3}}, ["learning_rate was 0.01 and is now 0.001"]),
}


@pytest.mark.parametrize("changed,texts", CHANGED.values(), ids=CHANGED)
def test_what_changed_is_said(whole, changed, texts):
    warnings = check(whole["plain"] / "checkpoint-2", **changed)
    assert len(warnings) == bool(texts) and all(text in warnings[0] for text in texts)


@pytest.mark.parametrize("kind", DEEPSPEED)
def test_a_resumed_run_ends_with_the_same_weights_and_then_stays_as_it_is(interrupted, whole, tmp_path, kind):
    path, output = interrupted(kind)
    # What a kill leaves: the staging folder; and what older tools leave: a folder without the trainer's state.
    (output / ".saving" / "checkpoint-9").mkdir(parents=True)
    (output / "checkpoint-9").mkdir()
    (output / "checkpoint-9" / "adapter_model.safetensors").write_bytes(b"cut off")
    assert f"resuming from {output / 'checkpoint-2'}" in train(path, *RESUME)
    assert same_weights(output / "final", whole[kind] / "final")
    assert losses_of(output) == losses_of(whole[kind])
    before = contents(output)
    (tmp_path / "other.jsonl").write_text('{"text": "the quick brown fox"}')
    log = train(path, *RESUME, "--train_file", tmp_path / "other.jsonl")
    assert "nothing left to train" in log and "step 4 of 4" in log
    assert "WARNING train_file was" in log and "the losses will differ" in log
    after = contents(output)
    assert {name for name in before if after.get(name) != before[name]} <= {"train.log", "run_record.json"}
    # A kill between the last two files that a run writes.
    (output / "train_results.json").unlink()
    train(path, *RESUME)
    assert losses_of(output) == losses_of(whole[kind]) and same_weights(output / "final", whole[kind] / "final")
