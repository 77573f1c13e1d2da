"""Rows shared by several processes: their batches, what is refused, and train.py against one process."""

import json

import pytest
import torch
from conftest import sentences, tiny_config
from safetensors.torch import load_file
from training_process import losses_of, run_training

from longqlora.data.collator import DataCollator, PartCollator
from longqlora.training.checks import check_sequence_parallel


def test_batches_for_several_processes(tiny_tokenizer):
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = DataCollator(tiny_tokenizer, num_parts=2)(rows)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert batch["labels"].tolist() == [[1, 2, 3, -100], [4, -100, -100, -100]]
    packed = DataCollator(tiny_tokenizer, num_parts=4)([{**rows[0], "position_ids": [0, 1, 0]}])
    assert packed["position_ids"].tolist() == [[0, 1, 0, 0]]


def test_parts_of_a_batch_hold_every_target_once(monkeypatch, tiny_tokenizer):
    rows = [{"input_ids": list(range(10, 17)), "labels": list(range(10, 17))}]
    targets, ids = [], []
    for part in range(2):
        monkeypatch.setattr("longqlora.data.collator.rank", lambda part=part: 2 + part)
        batch = PartCollator(DataCollator(tiny_tokenizer, num_parts=2), 2)(rows)
        assert batch["position_ids"].tolist() == [list(range(4 * part, 4 * part + 4))]
        assert batch["labels"][:, 1:].equal(batch["shift_labels"]) and batch["labels"][0, 0] == -100
        ids += batch["input_ids"][0].tolist()
        targets += batch["shift_labels"][0].tolist()
    assert ids[:7] == list(range(10, 17)) and targets == [*range(11, 17), -100, -100]


@pytest.mark.parametrize(
    "size,settings,shape,message",
    [
        (2, {"attention": "dca"}, {}, "use attention: s2 or full"),
        (2, {"num_processes": 3}, {}, "does not divide the 3 process"),
        (3, {"num_processes": 3}, {}, "does not divide the model's 8 heads"),
        (
            4,
            {"num_processes": 4},
            {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48},
            "6 key/value heads",
        ),
        (2, {}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic RoPE"),
    ],
)
def test_what_cannot_be_shared_is_refused(size, settings, shape, message):
    config = tiny_config(**{"num_attention_heads": 8, "num_key_value_heads": 4, **shape})
    check_sequence_parallel(1, config, **{"attention": "s2", "num_processes": 2, **settings})
    check_sequence_parallel(2, tiny_config(), attention="full", num_processes=4)
    with pytest.raises(ValueError, match=message):
        check_sequence_parallel(size, config, **{"attention": "s2", "num_processes": size, **settings})


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir):
    """Train with changed settings; returns the losses by step and the final adapter."""
    folder = tmp_path_factory.mktemp("sequence_parallel")
    data = folder / "train.jsonl"
    data.write_text("\n".join(json.dumps({"text": sentences(60 + 50 * i % 170, seed=i)}) for i in range(24)))

    def run(name: str, *words: object, num_processes: int = 1, **values):
        base = {
            "model_name_or_path": str(tiny_model_dir), "train_file": str(data), "eval_file": str(data),
            "deepspeed": "train_args/deepspeed/zero2.json", "sequence_parallel_size": num_processes,
            "model_max_length": 128, "max_seq_length": 128, "lora_rank": 4, "lora_dropout": 0.0, "train_norm": True,
            "train_embedding": True, "max_steps": 4, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "optim": "sgd",
            "report_to": "none", "save_steps": 2, "logging_steps": 1,
        }  # fmt: skip
        history = run_training(folder, name, {**base, **values}, *words, num_processes=num_processes)
        return losses_of(history), load_file(folder / name / "final" / "adapter_model.safetensors"), history

    return run


@pytest.mark.parametrize(
    "name,settings",
    [
        ("s2", {"attention": "s2", "pack": True}),
        ("full", {"attention": "full", "pack": True, "deepspeed": None, "eval_strategy": "steps", "eval_steps": 2}),
        ("layers", {"attention": "s2", "pack": False, "memory": "balanced", "tile_size": 32}),
    ],
)
def test_two_processes_equal_one(run, name, settings):
    """Losses and trained weights, in fp32, to 1e-6."""
    one, weights, history = run(f"{name}-one", **settings)
    two, shared_weights, shared_history = run(f"{name}-two", num_processes=2, **settings)
    assert len(one) == len(two) == 4
    assert all(abs(one[step] - two[step]) < 1e-6 for step in one)
    for key, weight in weights.items():
        torch.testing.assert_close(shared_weights[key], weight, rtol=0, atol=1e-6)
    evaluated, shared_evaluated = (
        [entry["eval_loss"] for entry in entries if "eval_loss" in entry] for entries in (history, shared_history)
    )
    assert shared_evaluated == pytest.approx(evaluated, abs=1e-5) and len(evaluated) == (2 if name == "full" else 0)
    if name == "s2":
        run("stopped", num_processes=2, max_steps=2, **settings)
        losses, resumed, _ = run("stopped", "--resume_from_checkpoint", "true", num_processes=2, **settings)
        assert losses == two and all(torch.equal(resumed[key], weight) for key, weight in shared_weights.items())


@pytest.mark.slow
def test_two_rows_shared_by_two_processes_each(run):
    one, weights, _ = run("four-one", per_device_train_batch_size=2, pack=True)
    four, shared_weights, _ = run("four", num_processes=4, sequence_parallel_size=2, per_device_train_batch_size=1,
                                  pack=True)  # fmt: skip
    assert four == pytest.approx(one, abs=1e-6)
    for key, weight in weights.items():
        torch.testing.assert_close(shared_weights[key], weight, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_more_processes_than_key_value_heads(run):
    """4 processes, 4 query heads, 2 key/value heads: each head is a process's only one, and evaluation is as before."""
    settings = {"pack": True, "eval_strategy": "steps", "eval_steps": 4, "gradient_accumulation_steps": 4}
    one, weights, history = run("wide-one", **settings)
    four, shared_weights, shared_history = run("wide", num_processes=4, **settings)
    assert four == pytest.approx(one, abs=1e-6)
    for key, weight in weights.items():
        torch.testing.assert_close(shared_weights[key], weight, rtol=0, atol=1e-6)
    losses = [next(x["eval_loss"] for x in entries if "eval_loss" in x) for entries in (history, shared_history)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
