"""train.py from start to end on a tiny model: what a run leaves, resuming, several processes, upstream's YAML."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import upstream
import yaml
from conftest import NUM_STEPS, sentences
from peft import PeftModel
from safetensors.torch import load_file
from training_process import finish, finish_world, start
from transformers import AutoConfig, AutoModelForCausalLM

from longqlora.training.checkpoint import list_checkpoints

REPO = Path(__file__).resolve().parents[2]
ZERO2 = str(REPO / "train_args" / "deepspeed" / "zero2.json")


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
    assert 0 < result["data_share"] < 1 and result["start_up_seconds"] > 0


@pytest.mark.parametrize(
    ("values", "rows"), [(upstream.PRETRAIN, "pretrain"), (upstream.SFT, "sft")], ids=["pre", "sft"]
)
def test_upstream_yaml_runs_as_it_is(values, rows, tmp_path, tiny_model_dir, monkeypatch):
    """Both YAMLs as upstream wrote them, for two steps; only the places of model, data and output are ours."""
    monkeypatch.chdir(REPO)
    path, out = tmp_path / "upstream.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(values))
    places = {"model_name_or_path": tiny_model_dir, "train_file": f"data/dummy_{rows}.jsonl", "output_dir": out}
    words = [word for key, value in places.items() for word in (f"--{key}", value)]
    train(path, *words, "--max_steps", 2, "--logging_steps", 1, "--data_cache_dir", tmp_path / "cache")
    assert len(losses(out)) == 2 and (out / "final" / "adapter_model.safetensors").is_file()
    log = (out / "train.log").read_text()
    for notice in ("fp16 becomes false", "paged_adamw_32bit becomes adamw_torch", "S2-Attn, groups of 2048 tokens"):
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
