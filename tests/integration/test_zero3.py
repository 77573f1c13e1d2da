"""train.py under ZeRO-3: 16-bit LoRA and full fine-tuning, against the plain run; checkpoints and resuming."""

import json

import pytest
import torch
from conftest import REPO, sentences
from safetensors.torch import load_file
from training_process import losses_of, run_training
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir):
    """Train with changed settings; returns the losses by step and the folder of what was trained."""
    folder = tmp_path_factory.mktemp("zero3")
    data = folder / "train.jsonl"
    data.write_text("\n".join(json.dumps({"text": sentences(200, seed=i)}) for i in range(24)))

    def run(name: str, *words: object, num_processes: int = 1, **values):
        base = {
            "model_name_or_path": str(tiny_model_dir), "train_file": str(data), "model_max_length": 128,
            "max_seq_length": 128, "lora_rank": 4, "lora_dropout": 0.0, "max_steps": 4, "learning_rate": 1e-2,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2 // num_processes, "pack": True,
            "lr_scheduler_type": "constant", "report_to": "none", "save_steps": 2, "logging_steps": 1,
        }  # fmt: skip
        history = run_training(folder, name, {**base, **values}, *words, num_processes=num_processes)
        return losses_of(history), folder / name / "final"

    return run


LORA = {"finetuning_type": "lora", "train_embedding": True, "train_norm": True}
KINDS = [("lora", LORA, "zero3"), ("full", {"finetuning_type": "full", "learning_rate": 1e-3}, "zero3_offload")]


@pytest.mark.parametrize("name,settings,deepspeed", KINDS, ids=["lora", "full"])
def test_two_processes_equal_the_plain_run(run, name, settings, deepspeed):
    expected, folder = run(f"{name}-plain", **settings)
    config = json.loads((REPO / "train_args" / "deepspeed" / f"{deepspeed}.json").read_text())
    # So small a model would else stay whole in every process.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    zero3 = {**settings, "deepspeed": config}
    losses, shared_folder = run(f"{name}-zero3", num_processes=2, **zero3)
    assert losses == pytest.approx(expected, abs=1e-5) and len(losses) == 4
    file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    weights, shared_weights = load_file(folder / file), load_file(shared_folder / file)
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
    for key, weight in load_file(resumed_folder / file).items():
        torch.testing.assert_close(weight, shared_weights[key], rtol=0, atol=1e-6)
