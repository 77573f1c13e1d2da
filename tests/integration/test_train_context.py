"""train.py with each way to a longer context: what the adapter carries, and what later tools read from it."""

import pytest
import torch
from training_process import train
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


@pytest.mark.parametrize("name", RUNS)
def test_the_adapter_carries_its_context(name, write_yaml, tmp_path):
    path, output = write_yaml(
        model_max_length=256, max_seq_length=256, finetuning_type="lora", lora_dropout=0.0, max_steps=2,
        per_device_train_batch_size=1, train_embedding=None, train_norm=None, save_strategy="no", **RUNS[name],
    )  # fmt: skip
    log = train(path)
    final = output / "final"
    loaded = load_for_inference(None, adapter_name_or_path=str(final), dtype=torch.float32)
    assert loaded.context_size == loaded.tokenizer.model_max_length == 256
    assert ("dual chunk" in loaded.attention) == name.startswith("dca")
    expected = {"yarn": "yarn", "ntk": "default", "dynamic": "dynamic", "dca": "default", "dca on PI": "linear"}[name]
    rope = AutoConfig.from_pretrained(final).rope_parameters
    assert rope["rope_type"] == expected
    assert rope.get("factor", 1.0) == {"yarn": 4.0, "dynamic": 4.0, "dca on PI": 2.0}.get(name, 1.0)
    assert ("context of 256" if name.startswith("dca") else "context 64 -> 256") in log

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
