"""Merging an adapter: equal to PEFT's own merge, strict about every weight, safe for what is on disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longqlora.device import parse_size
from longqlora.inference.load import load_for_inference
from longqlora.model.adapter_updates import through_nf4
from longqlora.model.context import ContextRequest, extend_rope
from longqlora.model.merge import merge

CONTEXT = 256  # four times the 64 tokens of the tiny model
IDS = torch.arange(4, 52)[None]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_adapter(base: Path, folder: Path, tokenizer=None, *, context=CONTEXT, **lora) -> Path:
    """Save an adapter with random weights for the model in `base`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], **lora}
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and "original_module" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    peft_model.save_pretrained(folder)
    if context:
        config = AutoModelForCausalLM.from_pretrained(base).config
        extend_rope(config, context)
        config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def peft_logits(base: Path, adapter: Path, *, merged: bool = True) -> torch.Tensor:
    """Logits by PEFT's own merge (or live adapter) with the extended RoPE."""
    config = AutoModelForCausalLM.from_pretrained(base).config
    extend_rope(config, CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return (model.merge_and_unload() if merged else model)(IDS).logits


def stock_logits(folder: Path, dtype=torch.float32) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(IDS).logits


ALL_NORMS = ["embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"]


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"modules_to_save": ALL_NORMS},
    ],
    ids=["plain", "rslora", "patterns", "modules_to_save"],
)
def test_equals_pefts_own_merge(tiny_model_dir, tmp_path, lora):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter", **lora)
    merge(str(tiny_model_dir), str(adapter), tmp_path / "out")
    found, expected = stock_logits(tmp_path / "out"), peft_logits(tiny_model_dir, adapter)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    bare = stock_logits(tiny_model_dir)
    assert (found - bare).abs().max() > 1e-2, "the adapter of this test changes nothing"


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_sharded_base_and_sharded_output(tiny_model_dir, tmp_path, safe):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.save_pretrained(base, max_shard_size="100KB")
    if not safe:
        to_bin(base)
    adapter = make_adapter(base, tmp_path / "adapter")
    expected = peft_logits(base, adapter)
    merge(None, str(adapter), tmp_path / "out", max_shard_size=150_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(shard.stat().st_size < 155_000 for shard in shards)
    torch.testing.assert_close(stock_logits(tmp_path / "out"), expected, atol=1e-6, rtol=1e-5)


def to_bin(folder: Path) -> None:
    """Turn the safetensors shards of `folder` into .bin shards."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v.replace("safetensors", "bin") for k, v in index["weight_map"].items()}
    for shard in folder.glob("model-*.safetensors"):
        torch.save(load_file(shard), shard.with_suffix(".bin"))
        shard.unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors.index.json").unlink()


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
def test_tied_embeddings_give_the_logits_of_the_live_adapter(tiny_tokenizer, tmp_path, lora, tied):
    base = save_tiny_model(tmp_path / "base", tiny_tokenizer, tiny_config(tie_word_embeddings=True))
    adapter = make_adapter(base, tmp_path / "adapter", **lora)
    merge(str(base), str(adapter), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    expected = peft_logits(base, adapter, merged=False)
    torch.testing.assert_close(stock_logits(tmp_path / "out"), expected, atol=1e-6, rtol=1e-5)
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tied


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("tied", [False, True])
def test_upstream_folder_with_trainable_params(tiny_tokenizer, tmp_path, prefix, tied):
    base = save_tiny_model(tmp_path / "base", tiny_tokenizer, tiny_config(tie_word_embeddings=tied))
    adapter = make_adapter(base, tmp_path / "adapter", context=None)
    weights = load_file(base / "model.safetensors")
    extra = {n: w * 1.5 for n, w in weights.items() if "norm" in n or "embed" in n}
    torch.save({prefix + name: weight for name, weight in extra.items()}, adapter / "trainable_params.bin")
    with pytest.raises(ValueError, match="context_size"):
        merge(str(base), str(adapter), tmp_path / "out")
    merge(str(base), str(adapter), tmp_path / "out", context=ContextRequest(context_size=CONTEXT))
    live = load_for_inference(
        str(base), adapter_name_or_path=str(adapter), context=ContextRequest(context_size=CONTEXT), dtype=torch.float32
    ).model
    with torch.no_grad():
        expected = live(IDS.to(live.device)).logits.cpu()
    torch.testing.assert_close(stock_logits(tmp_path / "out"), expected, atol=1e-6, rtol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_weights_are_those_of_the_loaded_4bit_model(tiny_model_dir, dtype):
    from bitsandbytes.functional import dequantize_4bit

    live = load_for_inference(str(tiny_model_dir), load_in_4bit=True, dtype=dtype).model
    stored = load_file(tiny_model_dir / "model.safetensors")
    count = 0
    for name, module in live.named_modules():
        if type(module).__name__ == "Linear4bit":
            expected = dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(through_nf4(stored[f"{name}.weight"].to(dtype)).to(expected.device), expected), name
            count += 1
    assert count == 14


def test_merge_into_nf4_equals_the_live_4bit_model(tiny_model_dir, tmp_path):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter", modules_to_save=["norm", "embed_tokens"])
    merge(str(tiny_model_dir), str(adapter), tmp_path / "out", load_in_4bit=True)
    live = load_for_inference(
        str(tiny_model_dir), adapter_name_or_path=str(adapter), load_in_4bit=True, dtype=torch.float32
    ).model  # fmt: skip
    with torch.no_grad():
        expected = live(IDS.to(live.device)).logits.cpu()
    found = stock_logits(tmp_path / "out")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    merge(str(tiny_model_dir), str(adapter), tmp_path / "plain")
    assert (stock_logits(tmp_path / "plain") - expected).abs().max() > 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_result_is_complete_and_keeps_rope(tiny_model_dir, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "unused")
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter", tiny_tokenizer)
    (adapter / "run_record.json").write_text('{"arguments": {}}')
    record = merge(str(tiny_model_dir), str(adapter), tmp_path / "out", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.rope_parameters["rope_type"] == "linear" and model.config.rope_parameters["factor"] == 4.0
    assert model.config.max_position_embeddings == CONTEXT and model.dtype == torch.bfloat16
    positions = torch.arange(CONTEXT)[None]
    hidden = torch.zeros(1, CONTEXT, 64)
    bare = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for found, expected in zip(
        model.model.rotary_emb(hidden, positions), bare.model.rotary_emb(hidden, positions / 4), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "merge.json", "run_record.json"} <= names
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == CONTEXT
    assert record["num_lora_weights"] == 6 and record["versions"]["torch"]
    loaded = load_for_inference(str(tmp_path / "out"), dtype=torch.float32)
    assert loaded.context_size == CONTEXT and loaded.tokenizer("the")["input_ids"][0] == 1


def test_rounds_once_to_16_bit(tiny_model_dir, tmp_path):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    merge(str(tiny_model_dir), str(adapter), tmp_path / "fp32", dtype=torch.float32)
    merge(str(tiny_model_dir), str(adapter), tmp_path / "bf16", dtype=torch.bfloat16)
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16"))
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def edit_adapter(folder: Path, change) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
FAULTS = {
    "unmatched lora": (
        lambda f: edit_adapter(
            f,
            lambda w: w.update(
                {f"{Q}x.lora_A.weight": w[f"{Q}.lora_A.weight"].clone(), f"{Q}x.lora_B.weight": torch.zeros(64, 4)}
            ),
        ),
        "q_projx.weight",
    ),
    "unmatched whole weight": (
        lambda f: edit_adapter(f, lambda w: w.update({"base_model.model.model.nrm.weight": torch.ones(64)})),
        "model.nrm.weight",
    ),
    "half a pair": (lambda f: edit_adapter(f, lambda w: w.pop(f"{Q}.lora_B.weight")), "no lora_B"),
    "embedding lora": (
        lambda f: edit_adapter(
            f, lambda w: w.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 320)})
        ),
        "lora_embedding_A",
    ),
    "dora vector": (
        lambda f: edit_adapter(f, lambda w: w.update({f"{Q}.lora_magnitude_vector": torch.ones(64)})),
        "lora_magnitude_vector",
    ),
    "shape": (lambda f: edit_adapter(f, lambda w: w.update({f"{Q}.lora_B.weight": torch.ones(32, 4)})), "do not fit"),
    "smaller vocabulary": (
        lambda f: edit_adapter(
            f, lambda w: w.update({"base_model.model.model.embed_tokens.weight": torch.ones(319, 64)})
        ),
        "vocabulary of 319",
    ),
    "larger vocabulary": (
        lambda f: edit_adapter(
            f, lambda w: w.update({"base_model.model.model.embed_tokens.weight": torch.ones(325, 64)})
        ),
        "vocabulary of 325",
    ),
    "no weights": (lambda f: edit_adapter(f, lambda w: w.clear()), "holds no weights"),
    "not finite": (
        lambda f: edit_adapter(f, lambda w: w.update({f"{Q}.lora_B.weight": torch.full((64, 4), float("nan"))})),
        "not finite",
    ),
    "dora": (lambda f: edit_config(f, use_dora=True), "use_dora"),
    "fan_in_fan_out": (lambda f: edit_config(f, fan_in_fan_out=True), "fan_in_fan_out"),
    "bias": (lambda f: edit_config(f, bias="all"), "bias"),
    "another method": (lambda f: edit_config(f, peft_type="IA3"), "peft_type"),
    "pissa": (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:999]),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_is_refused_and_leaves_the_old_result(tiny_model_dir, tmp_path, fault):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    spoil, message = FAULTS[fault]
    spoil(adapter)
    out = tmp_path / "out"
    out.mkdir()
    (out / "merge.json").write_text("kept")
    with pytest.raises(ValueError, match=message):
        merge(str(tiny_model_dir), str(adapter), out, overwrite=True)
    assert (out / "merge.json").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_a_faulty_base_is_refused(tiny_model_dir, tmp_path):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    weights = load_file(base / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 'model.norm.weight'"):
        merge(str(base), str(adapter), tmp_path / "out")
    (base / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        merge(str(base), str(adapter), tmp_path / "out")
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        merge(str(base), str(adapter), tmp_path / "out")
    (base / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match="lacks model-1.safetensors"):
        merge(str(base), str(adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fp16_overflow_is_named(tiny_model_dir, tmp_path):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    edit_adapter(adapter, lambda w: w.update({f"{Q}.lora_B.weight": torch.full((64, 4), 1e6)}))
    with pytest.raises(ValueError, match="q_proj.weight' overflows in float16"):
        merge(str(tiny_model_dir), str(adapter), tmp_path / "out", dtype=torch.float16)


def test_save_path_must_not_lose_anything(tiny_model_dir, tmp_path, monkeypatch):
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "models" / "base"))
    adapter = make_adapter(base, tmp_path / "adapter")
    foreign, merged = tmp_path / "foreign", tmp_path / "merged"
    for folder, name in ((foreign, "thesis.txt"), (merged, "merge.json")):
        folder.mkdir()
        (folder / name).write_text("x")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("longqlora.model.merge.read_updates", lambda *_: pytest.fail("the checks let it pass"))
    for target, overwrite, message in (
        (base, True, "overlaps"),
        (base / "merged", True, "overlaps"),
        (tmp_path / "models", True, "overlaps"),
        (adapter, True, "overlaps"),
        (foreign, True, "merge.json is missing"),
        (foreign / "thesis.txt", True, "is a file"),
        (merged, False, "pass --overwrite"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(str(base), str(adapter), target, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1234567", 1234567)]
)
def test_sizes(text, size):
    assert parse_size(text, "--max_shard_size") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "4TB", "four", "32"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="--max_shard_size"):
        parse_size(text, "--max_shard_size")


def test_script(tiny_model_dir, tmp_path, run_script):
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    arguments = ["--adapter_name_or_path", adapter, "--save_path", tmp_path / "out", "--dtype", "fp16"]
    outcome = run_script("script/merge_lora.py", *arguments, cwd=tmp_path, check=True)
    assert "merged 6 LoRA weights" in outcome.stdout and "float16" in outcome.stdout
    again = run_script("script/merge_lora.py", *arguments, cwd=tmp_path)
    assert again.returncode == 2 and "--overwrite" in again.stderr and "Traceback" not in again.stderr
