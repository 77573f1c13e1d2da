"""What is trained, that all of it is saved, and that stock PEFT reads it back. fp32, tolerance 1e-5 on logits."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model, tiny_config
from model_folders import extended, make_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from longqlora.inference.load import load_for_inference
from longqlora.model.adapter import attach_adapter, target_module_names, trainable_table
from longqlora.model.adapter_folder import save_adapter
from longqlora.model.base import load_config, load_model
from longqlora.model.context import ContextRequest
from longqlora.model.loss_binding import bind_chunked_loss
from longqlora.model.merge import merge
from longqlora.settings.config import AdapterConfig

CPU = torch.device("cpu")
IDS = torch.randint(4, 320, (2, 24), generator=torch.Generator().manual_seed(0))
PADDED_IDS = torch.cat([IDS, torch.tensor([[320], [320]])], dim=1)  # ends with the first token beyond the vocabulary
close = {"rtol": 0, "atol": 1e-5}


def load_base(folder, *, load_in_4bit=False, context=128):
    config = extended(load_config(str(folder)), context)
    return load_model(str(folder), config, dtype=torch.float32, load_in_4bit=load_in_4bit, device=CPU)


def with_adapter(base, finetuning_type="lora", **settings):
    """The model in the folder `base` as a run trains it, with a random adapter of rank 4."""
    model = load_base(base, load_in_4bit=finetuning_type == "qlora")
    bind_chunked_loss(model)
    return attach_adapter(model, AdapterConfig(finetuning_type, lora_rank=4, **settings))


def train_briefly(model, num_steps=3):
    """A few optimizer steps, so that every trained weight differs from its start."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(num_steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def trained_layers(model, mark: str) -> set[str]:
    """Last name parts of the layers with trained weights whose names hold `mark`."""
    names = [name for name, p in model.named_parameters() if p.requires_grad and mark in name]
    return {name.split(mark)[0].split(".")[-1] for name in names}


@pytest.mark.parametrize("finetuning_type", ["lora", "qlora"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embedding,norm", [(False, False), (True, False), ("input", True), (True, True)])
def test_nothing_that_was_trained_is_lost(tmp_path, tiny_tokenizer, finetuning_type, tied, embedding, norm):
    base = save_tiny_model(tmp_path / "base", tiny_tokenizer, tiny_config(tie_word_embeddings=tied))
    model = with_adapter(base, finetuning_type, train_embedding=embedding, train_norm=norm)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = train_briefly(model)(input_ids=IDS).logits
    for name, parameter in model.named_parameters():
        moved = not torch.equal(before[name], parameter)
        assert moved == parameter.requires_grad == ("lora_" in name or "modules_to_save" in name), name
    save_adapter(model, tmp_path / "adapter")

    in_4bit = finetuning_type == "qlora"
    saved = AutoConfig.from_pretrained(tmp_path / "adapter")
    stock_base = load_model(str(base), saved, dtype=torch.float32, load_in_4bit=in_4bit, device=CPU)
    stock = PeftModel.from_pretrained(stock_base, tmp_path / "adapter").eval()
    assert torch.allclose(stock(input_ids=IDS).logits, expected, **close)
    ours = load_for_inference(None, adapter_name_or_path=str(tmp_path / "adapter"), load_in_4bit=in_4bit)
    assert torch.allclose(ours.model(input_ids=IDS).logits, expected, **close)
    assert ours.context_size == 128 and ours.config.rope_parameters["factor"] == 2
    record = merge(None, str(tmp_path / "adapter"), tmp_path / "merged", load_in_4bit=in_4bit)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=0, atol=1e-4 if in_4bit else 1e-5)
    assert record["tie_word_embeddings"] is tied

    untrained = load_base(base, load_in_4bit=in_4bit)
    assert not torch.allclose(untrained.eval()(input_ids=IDS).logits, expected, rtol=0, atol=1e-2)
    names = " ".join(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert ("embed_tokens" in names) == bool(embedding) and ("input_layernorm" in names) == norm
    assert ("lm_head" in names) == (embedding is True or bool(tied and embedding))
    assert ("model.norm" in names) == norm


def test_what_is_trained(tmp_path, tiny_tokenizer, tiny_model_dir):
    qwen = save_tiny_model(tmp_path / "base", tiny_tokenizer, tiny_config("qwen3"))
    norms = {"q_norm", "k_norm", "norm", "input_layernorm", "post_attention_layernorm"}
    assert trained_layers(with_adapter(qwen, train_norm=True), ".modules_to_save") == norms
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    qlora = with_adapter(tiny_model_dir, "qlora")
    assert trained_layers(qlora, ".lora_") == linear
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in qlora.modules()), "repacks"
    assert trained_layers(with_adapter(tiny_model_dir, target_modules=" q_proj, v_proj "), ".lora_") == {
        "q_proj", "v_proj",
    }  # fmt: skip
    with pytest.raises(ValueError, match="target_modules: no linear layer named qq_proj"):
        with_adapter(tiny_model_dir, target_modules="q_proj,qq_proj")
    with pytest.raises(ValueError, match="finetuning_type: gpt2 has no torch.nn.Linear layers, which LoRA adapts"):
        target_module_names(AutoModelForCausalLM.from_config(tiny_config("gpt2")), None)


def test_trainable_table_counts_numbers_not_bytes(tiny_model_dir):
    table = trainable_table(with_adapter(tiny_model_dir, "qlora", train_embedding=True)).splitlines()
    linear, embedding = (next(line for line in table if word in line) for word in ("nf4", "embedding"))
    assert f"{2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128):,}" in linear
    assert f"{2 * 320 * 64:,}" in embedding and "100.00%" in embedding
    counts = [[int(x.replace(",", "")) for x in line.split()[-3:-1]] for line in table[1:]]
    assert [sum(column) for column in zip(*counts[:-1], strict=True)] == counts[-1], "the last row is the total"


def released_folder(folder: Path, base: Path, tokenizer, *, adds_pad=True) -> torch.nn.Module:
    """A checkpoint in the form of LongLoRA's releases, with [PAD], or of LongQLoRA's; returns the model behind it.

    The steps are those of LongLoRA's fine-tune.py and get_trainable_weights.py: [PAD] is added, the embeddings grow by
    the mean of their rows, LoRA goes on attention, embedding and norms are trained in place, and saved beside the LoRA.
    LongQLoRA names the latter without PEFT's prefix.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = copy.deepcopy(tokenizer)
    if adds_pad:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer))
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.data[-1:] = layer.weight.data[:-1].mean(dim=0, keepdim=True)
    lora = LoraConfig("CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "embed" in name or "norm" in name)
    train_briefly(model)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    lora_weights = {name.replace("default.", ""): w for name, w in weights.items() if "lora" in name}
    folder.mkdir()
    torch.save(lora_weights, folder / "adapter_model.bin")
    prefix = "" if adds_pad else "base_model.model."
    rest = {n.removeprefix(prefix): w for n, w in weights.items() if "lora" not in n and ("embed" in n or "norm" in n)}
    torch.save(rest, folder / "trainable_params.bin")
    model.peft_config["default"].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adds_pad", [True, False])
def test_released_checkpoints(tmp_path, tiny_tokenizer, tied, adds_pad):
    """LongLoRA's embeddings have a row more than the base's; an untied output embedding is not in the file."""
    base = save_tiny_model(tmp_path / "base", tiny_tokenizer, tiny_config(tie_word_embeddings=tied))
    adapter, ids, length = tmp_path / "adapter", PADDED_IDS if adds_pad else IDS, 321 if adds_pad else 320
    model = released_folder(adapter, base, tiny_tokenizer, adds_pad=adds_pad)
    expected, context = model(input_ids=ids).logits, ContextRequest(context_size=64)
    words = {"adapter_name_or_path": str(adapter), "context": context}
    loaded = load_for_inference(str(base), **words)
    assert loaded.config.vocab_size == loaded.model.config.vocab_size == len(loaded.tokenizer) == length
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected, **close)
    in_4bit = load_for_inference(str(base), **words, load_in_4bit=True).model(input_ids=ids).logits
    assert in_4bit.shape == expected.shape and (in_4bit - expected).abs().max() < 1
    with pytest.raises(ValueError, match="context_size"):
        merge(str(base), str(adapter), tmp_path / "merged")
    merge(str(base), str(adapter), tmp_path / "merged", context=context)
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()) and merged.config.vocab_size == length and merged.config.tie_word_embeddings is tied
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, **close)
    assert load_for_inference(str(tmp_path / "merged")).tokenizer.pad_token_id == (320 if adds_pad else 3)


def test_upstream_files_that_are_refused(tmp_path, tiny_tokenizer, tiny_model_dir):
    """A weight that the base does not have, another shape, and code, which is not run."""

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    released_folder(tmp_path / "adapter", tiny_model_dir, tiny_tokenizer, adds_pad=False)
    for extra, words in (
        ({"model.layers.9.input_layernorm.weight": torch.ones(64)}, "model.layers.9.input_layernorm.weight"),
        ({"model.norm.weight": torch.ones(32)}, "(?s)trainable_params.bin: .*model.norm.weight"),
        ({"x": Evil()}, "cannot be read as weights"),
    ):
        torch.save(extra, tmp_path / "adapter" / "trainable_params.bin")
        with pytest.raises(ValueError, match=words):
            load_for_inference(str(tiny_model_dir), adapter_name_or_path=str(tmp_path / "adapter"))
    assert not (tmp_path / "touched").exists()


def test_folders_that_are_no_adapters(tmp_path, tiny_tokenizer, tiny_model_dir):
    texts = {
        "broken": "{", "nameless": '{"peft_type": "LORA"}', "numbered": '{"base_model_name_or_path": 7}',
        "huge": '{"r": 1000000000}',
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(text)
    other = save_tiny_model(tmp_path / "other", tiny_tokenizer, tiny_config(hidden_size=32, num_hidden_layers=1))
    for base, adapter, message in (
        (tiny_model_dir, tiny_model_dir, "adapter_config.json"),
        (tiny_model_dir, tmp_path / "nowhere", "no folder"),
        (tiny_model_dir, tmp_path / "broken", "not valid JSON"),
        (None, tmp_path / "nameless", "name the base model"),
        (None, tmp_path / "numbered", "base_model_name_or_path is 7, not text or null"),
        (tiny_model_dir, tmp_path / "huge", "r is 1000000000, not a whole number up to"),
        (other, make_adapter(tiny_model_dir, tmp_path / "adapter"), "hidden_size"),
    ):
        with pytest.raises(ValueError, match=message):
            load_for_inference(base and str(base), adapter_name_or_path=str(adapter))
