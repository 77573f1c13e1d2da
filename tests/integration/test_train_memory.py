"""train.py under the memory policies: the losses of the plain run, and what the run says and records."""

import json

import pytest
from conftest import sentences
from training_process import losses_of, run_training


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("memory")
    data = folder / "train.jsonl"
    data.write_text("\n".join(json.dumps({"text": sentences(300, seed=i)}) for i in range(8)))

    def run(name: str, **values) -> tuple[list[float], str, dict]:
        base = {
            "model_name_or_path": str(tiny_model_dir), "train_file": str(data), "model_max_length": 256,
            "max_seq_length": 256, "lora_rank": 4, "lora_dropout": 0.0, "max_steps": 4, "train_norm": True,
            "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no",
            "logging_steps": 1,
        }  # fmt: skip
        losses = list(losses_of(run_training(folder, name, {**base, **values})).values())
        record, results = (
            json.loads((folder / name / file).read_text()) for file in ("run_record.json", "train_results.json")
        )
        return losses, (folder / name / "train.log").read_text(), {**record, **results}

    return run


def test_policies_train_as_the_plain_path_does(train):
    expected, log, record = train("plain", gradient_checkpointing=True)
    assert "memory: gradient checkpointing on, layers as in transformers; predicted peak" in log
    assert record["mechanisms"]["gradient_checkpointing"] and not record["mechanisms"]["layer_function"]
    for policy, said in (("max_length", "4 head chunks, in host memory"), ("auto", "all kept")):
        losses, log, record = train(policy, memory=policy, gradient_checkpointing=True, tile_size=64)
        assert losses == pytest.approx(expected, abs=1e-5)
        assert f"memory: layer function, tiles of 64 tokens, {'attention' if policy != 'auto' else 'all'} kept" in log
        assert said in log and "activation_checkpointing has no effect" in log.replace("gradient_", "activation_")
        assert record["mechanisms"]["layer_function"] and record["predicted_memory_gib"] >= 0
    assert len(expected) == 4 and expected[-1] < expected[0]
