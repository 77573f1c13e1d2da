"""train.py where processes share rows, weights (ZeRO-3) or batches: the losses and weights of one process."""

import json
from pathlib import Path

import pytest
import torch
from conftest import REPO, ZERO2, tiny_config
from training_process import history_of, losses_of, train, weights_of
from transformers import AutoModelForCausalLM

from longqlora.training.checks import check_sequence_parallel

MORE_HEADS = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}


# Processes of a row and in all, attention, shape of the model, what the error says.
NOT_SHARED = [
    (2, 2, "dca", {}, "use attention: s2 or full"), (2, 3, "s2", {}, "does not divide the 3 process"),
    (3, 3, "s2", {}, "does not divide the model's 8 heads"), (4, 4, "s2", MORE_HEADS, "6 key/value heads"),
    (2, 2, "s2", DYNAMIC, "dynamic RoPE"),
]  # fmt: skip


@pytest.mark.parametrize("size,num_processes,attention,shape,message", NOT_SHARED)
def test_what_cannot_be_shared_is_refused(size, num_processes, attention, shape, message):
    config = tiny_config(**{"num_attention_heads": 8, "num_key_value_heads": 4, **shape})
    check_sequence_parallel(1, config, attention=attention, num_processes=num_processes)
    check_sequence_parallel(2, tiny_config(), attention="full", num_processes=4)
    with pytest.raises(ValueError, match=message):
        check_sequence_parallel(size, config, attention=attention, num_processes=num_processes)


def zero3(name: str) -> dict:
    config = json.loads((REPO / "train_args" / "deepspeed" / f"{name}.json").read_text())
    # So small a model would else stay whole in every process.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


ROWS = {"deepspeed": ZERO2, "optim": "sgd", "gradient_checkpointing": None}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
FULL = {
    "finetuning_type": "full", "lora_rank": None, "train_embedding": None, "train_norm": None, "learning_rate": 1e-3
}  # fmt: skip
slow = pytest.mark.slow
# Settings of both runs, what one process has of its own, and the number of the others with what they have.
CASES = {
    "rows": (ROWS, {}, 2, {"sequence_parallel_size": 2}),
    "rows, dense": ({**ROWS, **EVALUATED, "attention": "full", "deepspeed": None}, {}, 2,
                    {"sequence_parallel_size": 2}),
    "rows, layers": ({**ROWS, "pack": False, "memory": "balanced", "tile_size": 32}, {}, 2,
                     {"sequence_parallel_size": 2}),
    "two rows": (ROWS, {"per_device_train_batch_size": 2}, 4, {"sequence_parallel_size": 2}),
    # 4 query heads and 2 key/value heads: each head is a process's only one.
    "a head each": ({**ROWS, **EVALUATED, "gradient_accumulation_steps": 4}, {}, 4, {"sequence_parallel_size": 4}),
    "ZeRO-3, lora": ({"finetuning_type": "lora"}, {}, 2,
                     {"deepspeed": zero3("zero3"), "gradient_accumulation_steps": 1}),
    "ZeRO-3, full": (FULL, {}, 2, {"deepspeed": zero3("zero3_offload"), "gradient_accumulation_steps": 1}),
    "batches": ({"deepspeed": ZERO2, "max_steps": 5}, {}, 2, {"gradient_accumulation_steps": 1}),
    # Rows of unequal length: the loss is the mean over the tokens of a step.
    "accumulated": ({"pack": False, "learning_rate": 1e-3},
                    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}, 1, {}),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow if name in ("two rows", "a head each") else ()) for name in CASES]
)
def test_several_processes_equal_one(write_yaml, train_file, name):
    both, one, num_processes, others = CASES[name]
    base = {
        "lora_dropout": 0.0, "max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "constant", "warmup_steps": None, "eval_file": str(train_file), **both,
    }  # fmt: skip

    def run(run_name: str, *words: object, num_processes: int = 1, **values) -> tuple[Path, dict, dict]:
        path, out = write_yaml(run_name, **{**base, **values})
        train(path, *words, num_processes=num_processes)
        return out, losses_of(out), weights_of(out / "final")

    folder, losses, weights = run("one", **one)
    shared_folder, shared_losses, shared_weights = run("several", num_processes=num_processes, **others)
    is_exact = name.startswith(("rows", "two", "a head"))
    assert shared_losses == pytest.approx(losses, abs=1e-6 if is_exact else 1e-5) and len(losses) == base["max_steps"]
    assert weights.keys() == shared_weights.keys()
    for key, weight in weights.items():
        # Adam turns rounding errors of gradients near zero into steps.
        torch.testing.assert_close(shared_weights[key].float(), weight.float(), rtol=0, atol=1e-6 if is_exact else 2e-3)
    # By the epoch, two processes are one world, not runs of their own.
    history, shared_history = history_of(folder), history_of(shared_folder)
    assert shared_history[0]["epoch"] == pytest.approx(history[0]["epoch"], rel=0.1)
    evaluated, shared_evaluated = ([x["eval_loss"] for x in y if "eval_loss" in x] for y in (history, shared_history))
    assert shared_evaluated == pytest.approx(evaluated, abs=1e-5)
    assert len(evaluated) == (2 if "eval_steps" in both else 0)
    if name == "ZeRO-3, full":
        assert AutoModelForCausalLM.from_pretrained(shared_folder / "final").config.rope_parameters["factor"] == 2
    if name in ("rows", "ZeRO-3, lora"):
        run("stopped", num_processes=num_processes, max_steps=2, **others)
        words = ("--resume_from_checkpoint", "true")
        _, resumed_losses, resumed = run("stopped", *words, num_processes=num_processes, **others)
        tolerance = 0 if is_exact else 1e-6
        assert resumed_losses == pytest.approx(shared_losses, rel=0, abs=tolerance)
        for key, weight in shared_weights.items():
            torch.testing.assert_close(resumed[key], weight, rtol=0, atol=tolerance)
