"""train.py under ZeRO-3: 16-bit LoRA and full fine-tuning, against the plain run; checkpoints and resuming."""

import json

import pytest
import torch
from conftest import REPO
from training_process import history_of, losses_of, train, weights_of
from transformers import AutoModelForCausalLM


@pytest.fixture
def run(write_yaml):
    """Train with changed settings; returns the losses by step and the folder of what was trained."""

    def run(name: str, *words: object, num_processes: int = 1, **values):
        path, out = write_yaml(
            name, lora_dropout=0.0, max_steps=values.pop("max_steps", 4), per_device_train_batch_size=1,
            gradient_accumulation_steps=2 // num_processes, lr_scheduler_type="constant", warmup_steps=None, **values,
        )  # fmt: skip
        train(path, *words, num_processes=num_processes)
        return losses_of(history_of(out)), out / "final"

    return run


FULL = {
    "finetuning_type": "full", "lora_rank": None, "train_embedding": None, "train_norm": None, "learning_rate": 1e-3
}  # fmt: skip
KINDS = [("lora", {"finetuning_type": "lora"}, "zero3"), ("full", FULL, "zero3_offload")]


@pytest.mark.parametrize("name,settings,deepspeed", KINDS, ids=["lora", "full"])
def test_two_processes_equal_the_plain_run(run, name, settings, deepspeed):
    expected, folder = run(f"{name}-plain", **settings)
    config = json.loads((REPO / "train_args" / "deepspeed" / f"{deepspeed}.json").read_text())
    # So small a model would else stay whole in every process.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    zero3 = {**settings, "deepspeed": config}
    losses, shared_folder = run(f"{name}-zero3", num_processes=2, **zero3)
    assert losses == pytest.approx(expected, abs=1e-5) and len(losses) == 4
    weights, shared_weights = weights_of(folder), weights_of(shared_folder)
    assert weights.keys() == shared_weights.keys()
    for key, weight in weights.items():
        # Adam turns rounding errors of gradients near zero into steps.
        torch.testing.assert_close(shared_weights[key].float(), weight.float(), rtol=0, atol=2e-3)
    if name == "full":
        assert AutoModelForCausalLM.from_pretrained(shared_folder).config.rope_parameters["factor"] == 2
        return
    run(f"{name}-stopped", num_processes=2, max_steps=2, **zero3)
    resumed, resumed_folder = run(f"{name}-stopped", "--resume_from_checkpoint", "true", num_processes=2, **zero3)
    assert resumed == pytest.approx(losses, abs=1e-6)
    for key, weight in weights_of(resumed_folder).items():
        torch.testing.assert_close(weight, shared_weights[key], rtol=0, atol=1e-6)
