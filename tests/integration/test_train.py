"""train.py from start to end on a tiny model: what a run leaves, resuming, several processes, upstream's YAML."""

import json
import shutil

import pytest
import torch
import upstream
import yaml
from conftest import NUM_STEPS, REPO, sentences
from peft import PeftModel
from training_process import contents, history_of, losses_of, same_weights, train
from transformers import AutoConfig, AutoModelForCausalLM

from longqlora.training.checkpoint import list_checkpoints

ZERO2 = str(REPO / "train_args" / "deepspeed" / "zero2.json")


def losses(output_dir) -> dict[int, float]:
    return losses_of(history_of(output_dir))


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


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_train_epochs": 1, "max_steps": None}, {"save_strategy": "epoch", "eval_strategy": "epoch"}],
    ids=["steps", "epochs", "saved in mid-epoch"],
)
def test_resuming_a_finished_run_adds_no_step(write_yaml, train_file, changes):
    """As after a kill between the last checkpoint and the final save."""
    eval_file = str(train_file) if "eval_strategy" in changes else None
    path, out = write_yaml(**changes, eval_file=eval_file)
    train(path)
    expected, checkpoint, final = losses(out), list_checkpoints(out)[-1], out.parent / "final"
    before, inode = contents(checkpoint), checkpoint.stat().st_ino
    shutil.move(out / "final", final)
    train(path, "--resume_from_checkpoint", "true")
    assert losses(out) == expected and same_weights(out / "final", final)
    assert contents(checkpoint) == before and checkpoint.stat().st_ino == inode
    assert sum("eval_loss" in entry for entry in history_of(out)) == bool(eval_file)


# (rows, accumulated batches, processes) of one step and of another. Unpacked rows are of unequal length.
SPLITS = {
    "two processes": ([(1, 2, 1), (1, 1, 2)], {"deepspeed": ZERO2}),
    "accumulated": ([(4, 1, 1), (1, 4, 1)], {"pack": False, "learning_rate": "1e-3"}),
}


@pytest.mark.parametrize("splits,settings", SPLITS.values(), ids=SPLITS)
def test_loss_does_not_depend_on_how_a_batch_is_split(write_yaml, splits, settings):
    """It is the mean over the tokens of a step. By the epoch, two processes are one world, not runs of their own."""
    histories = []
    for num_rows, num_accumulated, num_processes in splits:
        path, out = write_yaml(
            f"run{len(histories)}", lora_dropout=0, save_strategy="no", max_steps=5, **settings,
            per_device_train_batch_size=num_rows, gradient_accumulation_steps=num_accumulated,
        )  # fmt: skip
        train(path, num_processes=num_processes)
        histories.append([entry for entry in history_of(out) if "loss" in entry])
    assert len(histories[0]) == 5
    for key, error in (("loss", {"abs": 1e-5}), ("epoch", {"rel": 0.1})):
        one, other = ([entry[key] for entry in history] for history in histories)
        assert one == pytest.approx(other, **error)


def test_rows_of_like_length_share_a_batch(write_yaml):
    """group_by_length: fewer tokens of padding for the same rows."""
    seen = {}
    for grouped in (False, True):
        path, out = write_yaml(
            f"grouped-{grouped}", pack=False, group_by_length=grouped, max_steps=20, save_strategy="no",
            include_num_input_tokens_seen="all", model_max_length=512, max_seq_length=512,
        )  # fmt: skip
        train(path)
        seen[grouped] = next(x["num_input_tokens_seen"] for x in history_of(out)[::-1] if "loss" in x)
    result = json.loads((out / "train_results.json").read_text())
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
    evaluations = [entry["eval_loss"] for entry in history_of(out) if "eval_loss" in entry]
    assert len(evaluations) == 2 and evaluations[1] < evaluations[0]
