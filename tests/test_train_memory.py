"""train.py under the memory policies: the losses of the plain run, and what the run says and records."""

import json

import pytest
import yaml
from conftest import sentences
from training_process import finish, start


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("memory")
    data = folder / "train.jsonl"
    data.write_text("\n".join(json.dumps({"text": sentences(300, seed=i)}) for i in range(8)))

    def run(name: str, **values) -> tuple[list[float], str, dict]:
        output = folder / name
        base = {
            "model_name_or_path": str(tiny_model_dir), "train_file": str(data), "output_dir": str(output),
            "data_cache_dir": str(folder / "cache"), "model_max_length": 256, "max_seq_length": 256, "lora_rank": 4,
            "lora_dropout": 0.0, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
            "report_to": "none", "save_strategy": "no", "logging_steps": 1, "train_norm": True,
        }  # fmt: skip
        settings = folder / f"{name}.yaml"
        settings.write_text(yaml.safe_dump({**base, **values}))
        log = folder / f"{name}.log"
        finish(start("--train_args_file", settings, log=log), log)
        results = json.loads((output / "train_results.json").read_text())
        record = json.loads((output / "run_record.json").read_text())
        losses = [entry["loss"] for entry in results["log_history"] if "loss" in entry]
        return losses, (output / "train.log").read_text(), {**record, **results}

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
