"""Base weights that are not what they seem: refused with one line before anything is loaded or written."""

import importlib.util
import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import save_tiny_model, tiny_config
from model_folders import IDS, edit_json, edit_weights, make_adapter, stock_logits
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

import longqlora.model.base
import longqlora.training.run
import train
from longqlora.cli import run_main
from longqlora.files import read_json
from longqlora.inference.load import load_for_inference
from longqlora.model.base import empty_model, load_config, load_model
from longqlora.model.context import ContextRequest
from longqlora.model.merge import merge
from longqlora.model.weight_files import check_base

UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
INDEX = "model.safetensors.index.json"


def edit(change):
    """A change of a folder that changes the weights in its one file; `change` gets and returns all of them."""
    return lambda folder: edit_weights(folder / "model.safetensors", change)


def put(name: str, weight: torch.Tensor):
    return edit(lambda weights: {**weights, name: weight})


def says(**values):
    """A change of a folder: what its config.json says."""
    return lambda folder: edit_json(folder / "config.json", **values)


def cut(name: str, keep: int | None):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def as_bin(folder: Path, change=lambda weights: weights) -> None:
    torch.save(change(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_shards(folder: Path) -> None:
    """Split the weights into two shards with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(weights), {}
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def indexed(change):
    """A change of a folder: shards whose index `change` spoils."""
    return lambda f: (in_shards(f), edit_json(f / INDEX, weight_map=change(read_json(f / INDEX)["weight_map"])))


def with_another_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens("zzz")
    tokenizer.save_pretrained(folder)


def rope(**values):
    return says(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, **values})


NO_NUMBER = "no positive number; correct it"
LENGTH = "original_max_position_embeddings"
# name: (what is done to the folder, words of the error)
FAULTS = {
    "missing": (edit(lambda w: {n: t for n, t in w.items() if n != UP}), [f"lacks {UP!r}"]),
    "shape": (put(UP, torch.ones(96, 64)), [UP, "[96, 64]", "config.json says [128, 64]"]),
    "vocabulary": (put("model.embed_tokens.weight", torch.ones(300, 64)), ["embed_tokens", "[300, 64]", "[320"]),
    "more layers": (put(UP.replace("1", "2"), torch.ones(128, 64)), [UP.replace("1", "2"), "no place"]),
    "a bias": (put(UP.replace("weight", "bias"), torch.ones(128)), ["up_proj.bias", "no place"]),
    "integers": (
        edit(lambda w: {n: (100 * t).to(torch.int8) if "proj" in n else t for n, t in w.items()}),
        ["lacks", "stored as integers", "16-bit model"],
    ),
    "8-bit floats": (put(UP, torch.ones(128, 64).to(torch.float8_e4m3fn)), [f"lacks {UP!r}", "quantised"]),
    "cut off": (cut("model.safetensors", -500), ["model.safetensors", "cannot be read as weights"]),
    "empty": (cut("model.safetensors", 0), ["model.safetensors", "cannot be read as weights"]),
    "text": (lambda f: (f / "model.safetensors").write_text("x" * 99), ["cannot be read as weights"]),
    "empty .bin": (lambda f: (as_bin(f), cut("pytorch_model.bin", 0)(f)), ["pytorch_model.bin", "it is empty"]),
    "cut .bin": (lambda f: (as_bin(f), cut("pytorch_model.bin", -500)(f)), ["pytorch_model.bin", "cannot be read as"]),
    "a list in .bin": (lambda f: as_bin(f, lambda w: list(w.values())), ["pytorch_model.bin", "something else"]),
    "missing in .bin": (lambda f: as_bin(f, lambda w: w.pop(UP) is None or w), [f"lacks {UP!r}"]),
    "expert: one matrix": (edit(lambda w: {n: t for n, t in w.items() if n != EXPERT}), [f"lacks {EXPERT!r}"]),
    "expert: all": (edit(lambda w: {n: t for n, t in w.items() if EXPERT[:-9] not in n}), ["of shape [3, "]),
    "expert: shape": (put(EXPERT, torch.ones(7, 64)), ["do not fit together"]),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), ["has no weights"]),
    "shard gone": (lambda f: (in_shards(f), (f / "b.safetensors").unlink()), ["b.safetensors", "cannot be read"]),
    "weight not where the index says": (
        indexed(lambda index: {**index, UP: ({*index.values()} - {index[UP]}).pop()}), [UP, "the index says"]
    ),
    "absolute shard": (indexed(lambda index: {**index, UP: "/etc/hosts"}), ["/etc/hosts", "no file of"]),
    "shard outside": (indexed(lambda index: {**index, UP: "../x.safetensors"}), ["../x", "no file of"]),
    "shard without name": (indexed(lambda index: {**index, UP: 3}), ["names 3"]),
    "index without metadata": (lambda f: (in_shards(f), edit_json(f / INDEX, metadata=None)), ["or has no metadata"]),
    "index of nothing": (indexed(lambda index: {}), ["lists no weights"]),
    "twice": (
        lambda f: (in_shards(f), shutil.copy(f / "a.safetensors", f / "b.safetensors")), ["is in a.safetensors too"]
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), ["adapter_name_or_path"]),
    "weights by another name": (says(transformers_weights="other.safetensors"), ["transformers_weights"]),
    "a length in quotes": (says(max_position_embeddings="64"), ["config.json of", "max_position_embed"]),
    "an unknown dtype": (says(dtype="float17"), ["config.json of", "cannot be read"]),
    "an empty tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer of", "base", "is it whole"]),
    "tokenizer settings in a list": (
        lambda f: (f / "tokenizer_config.json").write_text("[]"), ["tokenizer of", "base", "is it whole"]
    ),
    "a tokenizer of another model": (with_another_token, ["ids up to 320 ('zzz')", "320 embeddings"]),
    "no length": (says(max_position_embeddings=0), ["max_position_embeddings", NO_NUMBER]),
    "RoPE base below 0": (rope(rope_theta=-1.0), ["rope_parameters.rope_theta", NO_NUMBER]),
    "RoPE base nan": (rope(rope_theta=float("nan")), ["rope_parameters.rope_theta", NO_NUMBER]),
    "RoPE factor in quotes": (rope(factor="2"), ["rope_parameters.factor", NO_NUMBER]),
    "RoPE factor below 0": (rope(factor=-2), ["rope_parameters.factor", NO_NUMBER]),
    "RoPE factor beyond all lengths": (rope(factor=1e18), ["rope_parameters.factor", NO_NUMBER]),
    "original length in quotes": (says(**{LENGTH: "4096"}), [LENGTH, NO_NUMBER]),
    "chunks in a list": (says(dual_chunk_attention_config=[32, 8]), ["dual_chunk_attention_config", "correct it"]),
    "chunks in quotes": (
        says(dual_chunk_attention_config={"chunk_size": 32, "local_size": 8, LENGTH: "64"}),
        [f"dual_chunk_attention_config.{LENGTH}", NO_NUMBER],
    ),
}  # fmt: skip


@pytest.fixture
def spoiled(tmp_path, tiny_tokenizer):
    """Save a tiny model, and spoil it by the change."""

    def spoiled(change, model_type: str = "llama") -> Path:
        base = save_tiny_model(tmp_path / "base", tiny_tokenizer, tiny_config(model_type))
        change(base)
        return base

    return spoiled


@pytest.fixture
def adapter(tmp_path, tiny_model_dir) -> Path:
    """Without a config.json, so that the base's counts."""
    return make_adapter(tiny_model_dir, tmp_path / "adapter", context=None)


@pytest.fixture
def train_words(write_yaml, monkeypatch):
    """train_words(base, *more) sets the command line of a run on `base`."""

    def train_words(base: Path, *more: str) -> None:
        path, _ = write_yaml(model_name_or_path=str(base))
        monkeypatch.setattr(sys, "argv", ["train.py", "--train_args_file", str(path), *more])

    return train_words


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_base_is_refused_by_every_way_in(fault, spoiled, tmp_path, adapter, train_words, monkeypatch, capsys):
    change, words = FAULTS[fault]
    base = spoiled(change, "mixtral" if fault.startswith("expert") else "llama")

    def too_late(*args, **kwargs):
        raise AssertionError("the checks let it pass")

    monkeypatch.setattr(longqlora.model.base.AutoModelForCausalLM, "from_pretrained", too_late)
    monkeypatch.setattr(longqlora.training.run, "start_run", too_late)
    train_words(base)
    before, context = sorted(tmp_path.rglob("*")), ContextRequest(context_size=128)
    for call in (
        lambda: load_for_inference(str(base)),
        lambda: load_for_inference(str(base), adapter_name_or_path=str(adapter), load_in_4bit=True),
        lambda: merge(str(base), str(adapter), tmp_path / "merged", context=context),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert not [word for word in words if word not in str(error.value)], error.value
    for more in ([], ["--dry_run"]) if fault != "nothing" else ([],):
        train_words(base, *more)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(train.main)
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        assert not [word for word in words if word not in lines[0]], lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_without_weights_says_so(spoiled, train_words, capsys):
    train_words(spoiled(FAULTS["nothing"][0]), "--dry_run")
    train.main()
    assert "has no weights: a run would end here" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing", "cut off", "shape"])
def test_what_slips_past_the_headers_is_found_after_loading(name, spoiled):
    """A model from the hub is first looked at when it is loaded."""
    base, device = str(spoiled(FAULTS[name][0])), torch.device("cpu")
    with pytest.raises(ValueError, match="base"):
        load_model(base, load_config(base), dtype=torch.float32, load_in_4bit=False, device=device)


# name: (config, what is done to the folder); sound, whatever its form
TIED = tiny_config(tie_word_embeddings=True)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OLD_NEOX = {
    "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
    "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9, dtype=torch.float16),  # -inf
    "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
}
OLD_LLAMA = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
SOUND = {
    "tied": (TIED, lambda f: None),
    "tied, head saved": (TIED, edit(lambda w: {**w, HEAD: w[EMBEDDING].clone()})),
    "tied, another head saved": (TIED, edit(lambda w: {**w, HEAD: 2 * w[EMBEDDING].flip(0)})),
    "tied, saved as the head": (TIED, edit(lambda w: {HEAD: w.pop(EMBEDDING), **w})),
    "old RoPE frequencies": (tiny_config(), edit(lambda w: {**w, **OLD_LLAMA})),
    "old GPT-NeoX": (tiny_config("gpt_neox"), edit(lambda w: {**w, **OLD_NEOX})),
    ".bin": (tiny_config(), as_bin),
    "shards": (tiny_config(), in_shards),
    "16 bit": (tiny_config(), edit(lambda w: {n: t.half() for n, t in w.items()})),
    "without the decoder's prefix": (
        tiny_config(), edit(lambda w: {name.removeprefix("model."): tensor for name, tensor in w.items()})
    ),
    "experts": (tiny_config("mixtral"), lambda f: None),
    "Qwen3": (tiny_config("qwen3"), lambda f: None),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_base_passes_and_merges(name, tmp_path, tiny_tokenizer):
    config, change = SOUND[name]
    base = save_tiny_model(tmp_path / "base", tiny_tokenizer, config)
    change(base)
    assert next(check_base(str(base), load_config(str(base))).parameters()).is_meta
    load_for_inference(str(base))
    targets = ["query_key_value"] if config.model_type == "gpt_neox" else ["q_proj", "v_proj"]
    # By the name in the model, which is another one in some files.
    alpha = {r"model\.layers\.0\.self_attn\.q_proj": 3}
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets, alpha_pattern=alpha)
    live = load_for_inference(str(base), adapter_name_or_path=str(adapter), dtype=torch.float32).model
    merge(str(base), str(adapter), tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(stock_logits(tmp_path / "merged"), live(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_large_model_is_checked_without_its_values(tmp_path):
    """The headers of a 7B model over 13 GB of nothing, in a sparse file: seconds, and no memory."""
    config, header, end = LlamaConfig(), {}, 0
    for name, tensor in empty_model(config, name="7B").state_dict().items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    config.save_pretrained(tmp_path)
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_base(str(tmp_path), config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6, "a gigabyte, in KiB"


# name: what config.json says
KERNELS = {
    "as saved": {"_attn_implementation": "org/kernel"},
    "as given": {"attn_implementation": "org/kernel@v1:forward"},
    "by part": {"attn_implementation": {"": "org/kernel"}},
    "paged": {"attn_implementation": "paged|org/kernel"},
    "flash": {"attn_implementation": "flash_attention_2"},
    "flash 3": {"_attn_implementation": "flash_attention_3", "use_kernels": True},
    "no text": {"attn_implementation": 7},
    "experts": {"experts_implementation": "org/kernel"},
    "known experts": {"_experts_implementation": "sonicmoe"},
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_named_by_config_json_is_not_fetched(name, spoiled, monkeypatch, capsys, train_words):
    """As if the kernels package were installed: transformers would fetch what config.json names, and run it."""
    from transformers.integrations import hub_kernels

    def fetched(*args, **kwargs):
        raise AssertionError("a kernel is fetched from the hub")

    for place in (hub_kernels, transformers.modeling_utils):
        monkeypatch.setattr(place, "is_kernels_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", fetched)
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", fetched, raising=False)
    base = spoiled(says(**KERNELS[name]))
    loaded = load_for_inference(str(base))
    assert loaded.model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()
    train_words(base, "--dry_run")
    train.main()
    printed = capsys.readouterr()
    assert "all settings are valid" in printed.out
    notices = [line for line in printed.err.splitlines() if line.startswith("notice: ")]
    is_named = "org/kernel" in str(KERNELS[name]) and "experts" not in name
    assert len(notices) == is_named and all("org/kernel" in line and base.name in line for line in notices), notices


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "eetq", "metal", "new", None])
def test_quantised_weights_whose_kernels_may_come_from_the_hub_need_trust(method, spoiled):
    """None: as bitsandbytes wrote it before it had a name."""
    values = {"quant_method": method} if method else {"load_in_4bit": True, "load_in_8bit": False}
    base = str(spoiled(says(quantization_config=values)))
    if method:
        with pytest.raises(ValueError, match=f"quantised as '{method}'.*trust_remote_code"):
            load_config(base)
    assert load_config(base, trust_remote_code=bool(method)).quantization_config == values


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="optimum, which is to be missing, is there")
def test_a_package_that_quantised_weights_lack_is_named(spoiled):
    with pytest.raises(ValueError, match="base.* cannot be read .*optimum"):
        load_for_inference(str(spoiled(says(quantization_config={"quant_method": "gptq", "bits": 4}))))
