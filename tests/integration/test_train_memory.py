"""train.py under the memory policies: the losses of the plain run, and what the run says and records."""

import json

import pytest
from training_process import history_of, losses_of
from training_process import train as train_yaml


@pytest.fixture
def train(write_yaml):
    def run(name: str, **values) -> tuple[list[float], str, dict]:
        path, out = write_yaml(
            name, model_max_length=256, max_seq_length=256, lora_dropout=0.0, max_steps=4, save_strategy="no", **values
        )
        log = train_yaml(path)
        record, results = (json.loads((out / file).read_text()) for file in ("run_record.json", "train_results.json"))
        return list(losses_of(history_of(out)).values()), log, {**record, **results}

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
