"""Merging an adapter: equal to PEFT's own merge, strict about every weight, safe for what is on disk."""

import json
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model, tiny_config
from model_folders import CONTEXT, IDS, edit_json, edit_weights, extended, make_adapter, stock_logits
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from longqlora.device import parse_size
from longqlora.inference.load import load_for_inference
from longqlora.model.merge import merge, through_nf4


@torch.no_grad()
def peft_logits(base: Path, adapter: Path, *, merged: bool = True) -> torch.Tensor:
    """Logits by PEFT's own merge (or live adapter) with the extended RoPE."""
    config = extended(AutoConfig.from_pretrained(base), CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    return (model.merge_and_unload() if merged else model)(IDS).logits


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"modules_to_save": ["embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"]},
    ],
    ids=["plain", "rslora", "patterns", "modules_to_save"],
)
def test_equals_pefts_own_merge_shard_by_shard(tiny_model_dir, tmp_path, lora):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter", **lora)
    merge(str(tiny_model_dir), str(adapter), tmp_path / "out", max_shard_size=150_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(shard.stat().st_size < 155_000 for shard in shards)
    found, expected = stock_logits(tmp_path / "out"), peft_logits(tiny_model_dir, adapter)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert (found - stock_logits(tiny_model_dir)).abs().max() > 1e-2, "the adapter of this test changes nothing"


@pytest.mark.parametrize(
    ("lora", "tied"),
    [
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"modules_to_save": ["norm"]}, True),
    ],
    ids=["embedding-ensured", "embedding", "head", "both", "lora-on-head", "neither"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_tied_embeddings_give_the_logits_of_the_live_adapter(tiny_tokenizer, tmp_path, lora, tied):
    base = save_tiny_model(tmp_path / "base", tiny_tokenizer, tiny_config(tie_word_embeddings=True))
    adapter = make_adapter(base, tmp_path / "adapter", **lora)
    record = merge(str(base), str(adapter), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is record["tie_word_embeddings"] is tied
    expected = peft_logits(base, adapter, merged=False)
    torch.testing.assert_close(stock_logits(tmp_path / "out"), expected, atol=1e-6, rtol=1e-5)
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_weights_are_those_of_the_loaded_4bit_model(tiny_model_dir, dtype):
    from bitsandbytes.functional import dequantize_4bit

    live = load_for_inference(str(tiny_model_dir), load_in_4bit=True, dtype=dtype).model
    stored = load_file(tiny_model_dir / "model.safetensors")
    layers = {name: x for name, x in live.named_modules() if type(x).__name__ == "Linear4bit"}
    assert len(layers) == 14
    for name, module in layers.items():
        expected = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(through_nf4(stored[f"{name}.weight"].to(dtype)).to(expected.device), expected), name


def test_result_is_complete_and_keeps_rope(tiny_model_dir, tiny_tokenizer, tmp_path):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter", tiny_tokenizer)
    (adapter / "run_record.json").write_text('{"arguments": {}}')
    record = merge(str(tiny_model_dir), str(adapter), tmp_path / "out", dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("linear", 4.0)
    assert config.max_position_embeddings == CONTEXT and config.dtype == torch.bfloat16
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "merge.json", "run_record.json"} <= names
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == CONTEXT
    assert record["num_lora_weights"] == 6 and record["versions"]["torch"]
    loaded = load_for_inference(str(tmp_path / "out"), dtype=torch.float32)
    assert loaded.context_size == CONTEXT and loaded.tokenizer("the")["input_ids"][0] == 1


def test_rounds_once_to_16_bit(tiny_model_dir, tmp_path):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    for dtype in (torch.float32, torch.bfloat16):
        merge(str(tiny_model_dir), str(adapter), tmp_path / str(dtype), dtype=dtype)
    exact, rounded = (load_file(tmp_path / f"torch.{x}" / "model.safetensors") for x in ("float32", "bfloat16"))
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


BASE = "base_model.model.model"
Q = f"{BASE}.layers.0.self_attn.q_proj"
STRANGE_LORA = {f"{Q}x.lora_A.weight": torch.zeros(4, 64), f"{Q}x.lora_B.weight": torch.zeros(64, 4)}
# name: (weights to put into the adapter, None to take one out, or values of adapter_config.json; words of the error)
FAULTS = {
    "unmatched lora": (STRANGE_LORA, "q_projx.weight"),
    "unmatched whole weight": ({f"{BASE}.nrm.weight": torch.ones(64)}, "model.nrm.weight"),
    "half a pair": ({f"{Q}.lora_B.weight": None}, "no lora_B"),
    "embedding lora": ({f"{BASE}.embed_tokens.lora_embedding_A": torch.ones(4, 320)}, "lora_embedding_A"),
    "dora vector": ({f"{Q}.lora_magnitude_vector": torch.ones(64)}, "lora_magnitude_vector"),
    "shape": ({f"{Q}.lora_B.weight": torch.ones(32, 4)}, "do not fit"),
    "smaller vocabulary": ({f"{BASE}.embed_tokens.weight": torch.ones(319, 64)}, "vocabulary of 319"),
    "larger vocabulary": ({f"{BASE}.embed_tokens.weight": torch.ones(325, 64)}, "vocabulary of 325"),
    "not finite": ({f"{Q}.lora_B.weight": torch.full((64, 4), float("nan"))}, "q_proj.weight' holds .* not finite"),
    "beyond fp16": ({f"{Q}.lora_B.weight": torch.full((64, 4), 1e6)}, "q_proj.weight' overflows in float16"),
    "dora": ({"use_dora": True}, "use_dora"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "bias": ({"bias": "all"}, "bias"),
    "another method": ({"peft_type": "IA3"}, "peft_type"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "no weights": (lambda file: edit_weights(file, lambda _: {}), "holds no weights"),
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:999]), "cannot be read"),
}
# Those that loading refuses in words of its own.
LOADING = {"unmatched lora": "has no place", "half a pair": "is missing from it", "shape": "size mismatch"}


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_is_refused_and_leaves_the_old_result(tiny_model_dir, tmp_path, fault):
    adapter, (changes, message) = make_adapter(tiny_model_dir, tmp_path / "adapter"), FAULTS[fault]
    file, out = adapter / "adapter_model.safetensors", tmp_path / "out"
    if callable(changes):
        changes(file)
    elif any(name.startswith(BASE) for name in changes):
        edit_weights(file, lambda w: {n: x for n, x in {**w, **changes}.items() if x is not None})
    else:
        edit_json(adapter / "adapter_config.json", **changes)
    if fault in LOADING:
        with pytest.raises(ValueError, match=LOADING[fault]):
            load_for_inference(None, adapter_name_or_path=str(adapter))
    out.mkdir()
    (out / "merge.json").write_text("kept")
    with pytest.raises(ValueError, match=message):
        merge(str(tiny_model_dir), str(adapter), out, dtype=torch.float16, overwrite=True)
    assert (out / "merge.json").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_sizes():
    for text, size in (("4GB", 4 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1234567", 1234567)):
        assert parse_size(text, "--max_shard_size") == size
    for text in ("", "GB", "-1GB", "0", "4TB", "four", "32"):
        with pytest.raises(ValueError, match="--max_shard_size"):
            parse_size(text, "--max_shard_size")


def test_script(tiny_model_dir, tmp_path, run_script):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    arguments = ["--adapter_name_or_path", adapter, "--save_path", tmp_path / "out", "--dtype", "fp16"]
    outcome = run_script("script/merge_lora.py", *arguments, cwd=tmp_path, check=True)
    assert "merged 6 LoRA weights" in outcome.stdout and "float16" in outcome.stdout
    again = run_script("script/merge_lora.py", *arguments, cwd=tmp_path)
    assert again.returncode == 2 and "--overwrite" in again.stderr and "Traceback" not in again.stderr
