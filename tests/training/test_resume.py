"""What a checkpoint must be before a run goes on from it, and runs that train nothing: each said in one line."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import REPO, sentences
from safetensors.torch import load_file
from training_process import run_training, start

from longqlora.training.checkpoint_contents import check_contents, check_pickle, load_without_code
from longqlora.training.checks import check_num_rows
from longqlora.training.resuming import check_resumable
from longqlora.training.trainer import LongContextTrainer

NUM_STEPS = 4
DEEPSPEED = {"plain": None, "zero2": str(REPO / "train_args" / "deepspeed" / "zero2.json")}
OPTIM = "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL = "global_step2/mp_rank_00_model_states.pt"


class Runs:
    """Runs on a tiny model, all with one data file."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.data = folder, folder / "train.jsonl"
        self.write_rows(seed=0)
        self.values = {
            "model_name_or_path": str(model), "train_file": str(self.data), "model_max_length": 128,
            "max_seq_length": 128, "lora_rank": 4, "max_steps": NUM_STEPS, "per_device_train_batch_size": 2,
            "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "report_to": "none", "seed": 7,
        }  # fmt: skip

    def write_rows(self, seed: int, num_rows: int = 24) -> None:
        rows = [{"text": sentences(40 + seed, seed=100 * seed + i)} for i in range(num_rows)]
        self.data.write_text("\n".join(map(json.dumps, rows)))

    def train(self, name: str, *words, num_processes: int = 1, **changes) -> Path:
        """Train to the end; returns the output folder."""
        values = {key: value for key, value in {**self.values, **changes}.items() if value is not None}
        run_training(self.folder, name, values, *words, num_processes=num_processes)
        return self.folder / name

    def resume(self, output: Path, *words) -> tuple[int, str]:
        """Exit code and log of `--resume_from_checkpoint true` with the settings that `output` was written with."""
        log = output.with_suffix(".again")
        log.unlink(missing_ok=True)
        settings = output.parent / f"{output.name}.yaml"
        process = start("--train_args_file", settings, "--resume_from_checkpoint", "true", *words, log=log)
        process.join(120)
        return process.exitcode, log.read_text(errors="replace")

    def interrupted(self, whole: Path, name: str) -> Path:
        """A copy of a whole run that stopped after checkpoint-2."""
        output = self.folder / name
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2")
        values = yaml.safe_load((self.folder / f"{whole.name}.yaml").read_text())
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump({**values, "output_dir": str(output)}))
        return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_dir) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume"), tiny_model_dir)


@pytest.fixture(scope="module")
def whole(runs) -> dict[str, Path]:
    """A run of NUM_STEPS with its checkpoints, plain and under ZeRO-2."""
    return {name: runs.train(name, deepspeed=deepspeed) for name, deepspeed in DEEPSPEED.items()}


class Evil:
    """Makes a file when it is read as a pickle."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def poison(file: Path, trace: Path, **how) -> None:
    state = torch.load(file, weights_only=False) if file.is_file() else {}
    torch.save({**state, "evil": Evil(trace)}, file, **how)


def one_error(log: str) -> str:
    lines = [line for line in log.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in log, log
    return lines[0]


@pytest.mark.parametrize("name", [OPTIM, MODEL])
def test_a_deepspeed_checkpoint_that_would_run_code_is_refused(runs, whole, tmp_path, name):
    output, trace = runs.interrupted(whole["zero2"], "poisoned"), tmp_path / "trace"
    poison(output / "checkpoint-2" / name, trace)
    code, log = runs.resume(output)
    assert code == 2 and not trace.exists() and "posix.system" in one_error(log) and name in one_error(log)
    assert not (output / "train.log").exists()


@pytest.mark.parametrize("kind", DEEPSPEED)
@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_every_file_that_would_run_code_is_refused(runs, whole, tmp_path, kind, how):
    files = {"plain": ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"], "zero2": [OPTIM, MODEL]}
    for name in files[kind]:
        checkpoint = runs.interrupted(whole[kind], "poisoned") / "checkpoint-2"
        check(checkpoint)
        poison(checkpoint / name, tmp_path / "trace", **how)
        with pytest.raises(ValueError, match=name):
            check(checkpoint)
    assert not (tmp_path / "trace").exists()


def check(checkpoint: Path, **changes) -> list[str]:
    record = json.loads((checkpoint / "run_record.json").read_text())
    hashes = {**record["data_sha256"], **changes}
    return check_resumable(checkpoint, record["arguments"], world_size=1, data_sha256=hashes)


def test_deepspeed_itself_runs_no_code_from_a_file(whole, tmp_path, monkeypatch):
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    load_without_code(uses_deepspeed=True)
    state = TorchCheckpointEngine().load(str(whole["zero2"] / "checkpoint-2" / OPTIM))
    assert state["optimizer_state_dict"]["zero_stage"] == 2
    poison(tmp_path / "evil.pt", tmp_path / "trace")
    with pytest.raises(Exception, match="Weights only load failed"):
        TorchCheckpointEngine().load(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "trace").exists()


def test_the_loss_scale_of_16_bit_runs_is_no_foreign_class(tmp_path, monkeypatch):
    """On the CPU no run writes it."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    load_without_code(uses_deepspeed=True)
    torch.save({"loss_scaler": DynamicLossScaler(2**16, 2.0, 1000, 1, 1, False, dtype=torch.half)}, tmp_path / "x.pt")
    check_pickle(tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=False)["loss_scaler"].cur_scale == 2**16


NEEDED = {
    "plain": ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json"],
    "zero2": [OPTIM, MODEL, "scheduler.pt", "rng_state.pth", "latest"],
}


@pytest.mark.parametrize("kind", DEEPSPEED)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off"])
def test_a_missing_or_damaged_file_is_named(runs, whole, kind, damage):
    for name in NEEDED[kind]:
        checkpoint = runs.interrupted(whole[kind], "damaged") / "checkpoint-2"
        file = checkpoint / name
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(b"" if damage == "empty" else file.read_bytes()[: file.stat().st_size // 2])
        if (damage, name) == ("missing", "trainer_state.json"):
            continue  # No complete checkpoint: found by no one.
        with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*{Path(name).name}"):
            check(checkpoint)


def test_a_run_without_its_optimizer_state_does_not_go_on(runs, whole):
    for kind, name in (("plain", "optimizer.pt"), ("zero2", OPTIM)):
        output = runs.interrupted(whole[kind], f"lacking-{kind}")
        (output / "checkpoint-2" / name).unlink()
        for words in ([], ["--dry_run"]):
            code, log = runs.resume(output, *words)
            assert code == 2 and name in one_error(log)


@pytest.mark.parametrize(
    "settings,files",
    [
        ({}, ["rng_state_1.pth", "optimizer.pt"]),
        ({"fp16": True}, ["scaler.pt"]),
        ({"finetuning_type": "full"}, ["model.safetensors"]),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, ["zero_pp_rank_1_mp_rank_00_model_states.pt"]),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, ["zero_pp_rank_1_mp_rank_00_optim_states.pt"]),
    ],
)
def test_what_each_kind_of_run_needs(tmp_path, settings, files):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2, "log_history": []}')
    (tmp_path / "latest").write_text("global_step2")
    (tmp_path / "global_step2").mkdir()
    with pytest.raises(ValueError) as error:
        check_contents(tmp_path, {"finetuning_type": "lora", **settings}, num_processes=2)
    assert all(name in str(error.value) for name in files)


@pytest.mark.parametrize("text", ["[]", '"x"', "{}", '{"arguments": []}', '{"arguments": {"data": 1}}', "{"])
def test_a_damaged_run_record_is_named(runs, whole, text):
    checkpoint = runs.interrupted(whole["plain"], "unreadable") / "checkpoint-2"
    (checkpoint / "run_record.json").write_text(text)
    with pytest.raises(ValueError, match="run record: .*run_record.json"):
        check_resumable(checkpoint, {"adapter": {"finetuning_type": "qlora"}}, world_size=1, data_sha256={})


@pytest.mark.parametrize("text", ["[]", "1", "{}x", '{"global_step": "2"}', '{"log_history": [1]}', '{"other": 1}'])
def test_a_damaged_trainer_state_is_named(runs, whole, text):
    checkpoint = runs.interrupted(whole["plain"], "unreadable") / "checkpoint-2"
    (checkpoint / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match=r"trainer_state.json is damaged"):
        check(checkpoint)


def test_changed_data_is_said_moved_data_is_not(runs, whole, tmp_path):
    checkpoint = whole["plain"] / "checkpoint-2"
    assert check(checkpoint) == []
    (warning,) = check(checkpoint, train_file="0" * 64)
    assert str(runs.data) in warning and "the losses will differ" in warning
    record = json.loads((checkpoint / "run_record.json").read_text())
    record["arguments"]["data"]["train_file"] = "elsewhere.jsonl"
    moved = check_resumable(checkpoint, record["arguments"], world_size=1, data_sha256=record["data_sha256"])
    assert moved == []


def test_a_run_goes_on_with_other_data_but_says_so(runs, whole):
    output = runs.interrupted(whole["plain"], "other-data")
    content = runs.data.read_bytes()
    try:
        runs.write_rows(seed=1)
        code, log = runs.resume(output)
    finally:
        runs.data.write_bytes(content)
    assert code == 0 and "WARNING content of train_file" in log and "the losses will differ" in log


def test_another_number_of_processes_is_said(runs, whole):
    checkpoint = runs.interrupted(whole["plain"], "alone") / "checkpoint-2"
    arguments = json.loads((checkpoint / "run_record.json").read_text())["arguments"]
    (warning,) = check_resumable(checkpoint, arguments, world_size=2, data_sha256={})
    assert "number of processes was 1 and is now 2: the losses will differ" in warning


def test_a_finished_run_stays_as_it_is(runs, whole):
    out = whole["plain"]
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (out / "final").iterdir()}
    results = (out / "train_results.json").read_bytes()
    code, log = runs.resume(out)
    assert code == 0 and "nothing left to train" in log and "step 4 of 4" in log
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (out / "final").iterdir()} == before
    assert (out / "train_results.json").read_bytes() == results


def test_too_few_rows_for_a_step_are_refused_before_the_model_loads(runs, whole):
    runs.interrupted(whole["plain"], "few")
    output = runs.folder / "few"
    words = ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "64", "--overwrite_output_dir", "true"]
    code, log = runs.resume(output, *words, "--resume_from_checkpoint", "false")
    assert code == 2 and "dataloader_drop_last: train_file makes 24 rows" in one_error(log)
    assert "trainable" not in log and not (output / "final").exists()


def test_too_few_rows_for_an_evaluation_are_refused():
    arguments = SimpleNamespace(train_batch_size=1, eval_batch_size=8, world_size=2, dataloader_drop_last=True)
    check_num_rows(arguments, 2, None, processes_per_row=1)
    check_num_rows(arguments, 2, 16, processes_per_row=1)
    with pytest.raises(ValueError, match="eval_file makes 15 rows, a batch of all processes takes 16"):
        check_num_rows(arguments, 2, 15, processes_per_row=1)


def test_a_run_without_a_step_saves_nothing(tmp_path):
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=0), args=SimpleNamespace(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="without a single step"):
        LongContextTrainer.save_final(trainer)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_ends_with_the_same_weights(runs, whole):
    for kind in DEEPSPEED:
        output = runs.interrupted(whole[kind], f"stopped-{kind}")
        code, log = runs.resume(output)
        assert code == 0, log
        resumed = load_file(output / "final" / "adapter_model.safetensors")
        for name, tensor in load_file(whole[kind] / "final" / "adapter_model.safetensors").items():
            assert torch.equal(resumed[name], tensor), name
