"""train.py with each way to a longer context: what the adapter carries, and what later tools read from it."""

import json

import pytest
import torch
import yaml
from conftest import sentences
from training_process import finish, start
from transformers import AutoConfig, AutoModelForCausalLM

from longqlora.inference.load import load_for_inference
from longqlora.model.merge import merge

RUNS = {
    "yarn": {"rope_type": "yarn", "attention": "s2"},
    "ntk": {"rope_type": "ntk", "attention": "full"},
    "dynamic": {"rope_type": "dynamic", "attention": "s2"},
    "dca": {"attention": "dca"},
    "dca on PI": {"attention": "dca", "rope_type": "linear", "pretraining_length": 128},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("\n".join(json.dumps({"text": sentences(300, seed=i)}) for i in range(8)))
    return path


@pytest.mark.parametrize("name", RUNS)
def test_the_adapter_carries_its_context(name, tmp_path, tiny_model_dir, data):
    output, settings = tmp_path / "run", tmp_path / "run.yaml"
    values = {
        "model_name_or_path": str(tiny_model_dir), "train_file": str(data), "output_dir": str(output),
        "data_cache_dir": str(tmp_path / "cache"), "model_max_length": 256, "max_seq_length": 256, "lora_rank": 4,
        "finetuning_type": "lora", "lora_dropout": 0.0, "max_steps": 2, "per_device_train_batch_size": 1,
        "pack": True, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no",
        "gradient_checkpointing": True, **RUNS[name],
    }  # fmt: skip
    settings.write_text(yaml.safe_dump(values))
    log = tmp_path / "log"
    finish(start("--train_args_file", settings, log=log), log)
    final = output / "final"
    loaded = load_for_inference(None, adapter_name_or_path=str(final), dtype=torch.float32)
    assert loaded.context_size == loaded.tokenizer.model_max_length == 256
    assert ("dual chunk" in loaded.attention) == name.startswith("dca")
    expected = {"yarn": "yarn", "ntk": "default", "dynamic": "dynamic", "dca": "default", "dca on PI": "linear"}[name]
    rope = AutoConfig.from_pretrained(final).rope_parameters
    assert rope["rope_type"] == expected
    assert rope.get("factor", 1.0) == {"yarn": 4.0, "dynamic": 4.0, "dca on PI": 2.0}.get(name, 1.0)
    assert ("context of 256" if name.startswith("dca") else "context 64 -> 256") in (output / "train.log").read_text()

    merge(None, str(final), tmp_path / "merged")
    ids = torch.randint(4, 320, (1, 200), generator=torch.Generator().manual_seed(0))
    merged = load_for_inference(str(tmp_path / "merged"), dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        adapter_logits = loaded.model(input_ids=ids).logits
        assert torch.allclose(merged.model(input_ids=ids).logits, adapter_logits, atol=1e-4)
        # Stock transformers reads every RoPE method, and no dual chunk attention.
        assert torch.allclose(stock(input_ids=ids).logits, adapter_logits, atol=1e-4) != name.startswith("dca")
    assert merged.context_size == 256 and merged.attention == loaded.attention
