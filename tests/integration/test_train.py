"""train.py from start to end on a tiny model: what a run leaves, resuming, memory policies."""

import json
import shutil

import pytest
import torch
import upstream
import yaml
from conftest import NUM_STEPS, REPO, ZERO2, sentences
from peft import PeftModel
from training_process import contents, history_of, losses_of, same_weights, train
from transformers import AutoConfig, AutoModelForCausalLM

from longqlora.training.resume import list_checkpoints

RESUME = ("--resume_from_checkpoint", "true")


def test_what_a_run_leaves(write_yaml, tiny_model_dir):
    path, out = write_yaml(deepspeed=ZERO2, report_to="tensorboard")
    train(path)
    run = losses_of(out)
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
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, config=config)
    stock = PeftModel.from_pretrained(base, out / "final")
    assert any("modules_to_save" in name for name, _ in stock.named_parameters())


def test_same_seed_same_run_other_seed_other_run(write_yaml):
    runs = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        path, out = write_yaml(name, seed=seed, max_steps=3, save_strategy="no")
        train(path)
        runs.append(losses_of(out))
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
    expected, checkpoint, final = losses_of(out), list_checkpoints(out)[-1], out.parent / "final"
    before, inode = contents(checkpoint), checkpoint.stat().st_ino
    shutil.move(out / "final", final)
    train(path, *RESUME)
    assert losses_of(out) == expected and same_weights(out / "final", final)
    assert contents(checkpoint) == before and checkpoint.stat().st_ino == inode
    assert sum("eval_loss" in entry for entry in history_of(out)) == bool(eval_file)


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


@pytest.mark.parametrize("rows", ["pretrain", "sft"])
def test_upstream_yaml_runs_as_it_is(rows, tmp_path, tiny_model_dir, monkeypatch):
    """Both YAMLs as upstream wrote them, for two steps; only the places of model, data and output are ours."""
    monkeypatch.chdir(REPO)
    path, out = tmp_path / "upstream.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(getattr(upstream, rows.upper())))
    places = {"model_name_or_path": tiny_model_dir, "train_file": f"data/dummy_{rows}.jsonl", "output_dir": out}
    words = [word for key, value in places.items() for word in (f"--{key}", value)]
    train(path, *words, "--max_steps", 2, "--logging_steps", 1, "--data_cache_dir", tmp_path / "cache")
    assert len(losses_of(out)) == 2 and (out / "final" / "adapter_model.safetensors").is_file()
    log = (out / "train.log").read_text()
    assert "fp16 becomes false" in log and "paged_adamw_32bit becomes adamw_torch" in log
    assert "S2-Attn, groups of 2048 tokens" in log


@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
def test_other_finetuning_types(write_yaml, finetuning_type):
    changes = {"lora_rank": None, "train_embedding": None, "train_norm": None} if finetuning_type == "full" else {}
    path, out = write_yaml(finetuning_type=finetuning_type, max_steps=4, attention="full", **changes)
    train(path)
    expected = losses_of(out)
    assert expected[4] < expected[1]
    train(path, "--resume_from_checkpoint", out / "checkpoint-2")
    assert losses_of(out) == expected
    saved, tokenizer = (json.loads((out / "final" / x).read_text()) for x in ("config.json", "tokenizer_config.json"))
    assert saved["rope_scaling"] == {"rope_type": "linear", "factor": 2.0} and saved["max_seq_len"] == 64
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    if finetuning_type == "full":
        assert AutoModelForCausalLM.from_pretrained(out / "final").config.rope_parameters["factor"] == 2


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
    log = (out / "train.log").read_text()
    assert "prompt_template: vicuna_v1.1 (the tokenizer has no chat template" in log
    assert log.count(" learned, between ") == 2 and "form input/output" in log
    record = json.loads((out / "final" / "run_record.json").read_text())
    assert record["arguments"]["data"]["prompt_template"] == "vicuna_v1.1"


def test_memory_policies_train_as_the_plain_path_does(write_yaml):
    def run(name: str, **values) -> tuple[dict[int, float], str, dict]:
        path, out = write_yaml(
            name, lora_dropout=0.0, max_steps=4, save_strategy="no", model_max_length=256, max_seq_length=256, **values
        )
        log = train(path)
        results = [json.loads((out / file).read_text()) for file in ("run_record.json", "train_results.json")]
        return losses_of(out), log, results[0] | results[1]

    expected, log, record = run("plain")
    assert "memory: gradient checkpointing on, layers as in transformers; predicted peak" in log
    assert record["mechanisms"]["gradient_checkpointing"] and not record["mechanisms"]["layer_function"]
    assert len(expected) == 4 and expected[4] < expected[1]
    for policy, kept, said in (
        ("max_length", "attention", "4 head chunks, in host memory"),
        ("auto", "all", "all kept"),
    ):
        run_losses, log, record = run(policy, memory=policy, tile_size=64)
        assert run_losses == pytest.approx(expected, abs=1e-5)
        assert f"memory: layer function, tiles of 64 tokens, {kept}" in log
        assert said in log and "activation_checkpointing has no effect" in log.replace("gradient_", "activation_")
        assert record["mechanisms"]["layer_function"] and record["predicted_memory_gib"] >= 0
