"""What is trained, that all of it is saved, and that stock PEFT reads it back. fp32, tolerance 1e-5 on logits."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_model, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from longqlora.inference.load import load_for_inference
from longqlora.model.adapter import attach_adapter, trainable_table
from longqlora.model.adapter_folder import save_adapter
from longqlora.model.base import load_config, load_model
from longqlora.model.context import ContextRequest, extend_rope
from longqlora.model.library_internals import keep_4bit_weights_trainable
from longqlora.model.loss_binding import bind_chunked_loss
from longqlora.model.merge import merge
from longqlora.settings.config import AdapterConfig

CPU = torch.device("cpu")
IDS = torch.randint(4, 320, (2, 24), generator=torch.Generator().manual_seed(0))
PADDED_IDS = torch.cat([IDS, torch.tensor([[320], [320]])], dim=1)  # ends with the first token beyond the vocabulary


def load_base(folder, *, load_in_4bit=False, context=128):
    config = load_config(str(folder))
    extend_rope(config, context)
    return load_model(str(folder), config, dtype=torch.float32, load_in_4bit=load_in_4bit, device=CPU)


def train_briefly(model, num_steps=3):
    """A few optimizer steps, so that every trained weight differs from its start."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(num_steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embedding,norm", [(False, False), (True, False), ("input", True), (True, True)])
def test_stock_peft_gives_the_same_logits(tmp_path, tiny_tokenizer, load_in_4bit, tied, embedding, norm):
    base = save_tiny_model(tmp_path / "base", tiny_tokenizer, tiny_config(tie_word_embeddings=tied))
    config = AdapterConfig(
        finetuning_type="qlora" if load_in_4bit else "lora", lora_rank=4, train_embedding=embedding, train_norm=norm
    )
    model = load_base(base, load_in_4bit=load_in_4bit)
    bind_chunked_loss(model)
    model = train_briefly(attach_adapter(model, config))
    expected = model(input_ids=IDS).logits
    save_adapter(model, tmp_path / "adapter")

    saved = AutoConfig.from_pretrained(tmp_path / "adapter")
    stock_base = load_model(str(base), saved, dtype=torch.float32, load_in_4bit=load_in_4bit, device=CPU)
    stock = PeftModel.from_pretrained(stock_base, tmp_path / "adapter").eval()
    assert torch.allclose(stock(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    ours = load_for_inference(None, adapter_name_or_path=str(tmp_path / "adapter"), load_in_4bit=load_in_4bit)
    assert torch.allclose(ours.model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    assert ours.context_size == 128 and ours.config.rope_parameters["factor"] == 2

    untrained = load_base(base, load_in_4bit=load_in_4bit)
    assert not torch.allclose(untrained.eval()(input_ids=IDS).logits, expected, rtol=0, atol=1e-2)
    names = " ".join(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert ("embed_tokens" in names) == bool(embedding) and ("input_layernorm" in names) == norm
    assert ("lm_head" in names) == (embedding is True or bool(tied and embedding))
    assert ("model.norm" in names) == norm


@pytest.mark.parametrize("tied", [False, True])
def test_the_input_embedding_alone_is_trained_and_merged(tmp_path, tiny_tokenizer, tied):
    """LongLoRA's "embed": a tied output embedding is the same weight, an untied one stays as it is."""
    base = save_tiny_model(tmp_path / "base", tiny_tokenizer, tiny_config(tie_word_embeddings=tied))
    model = load_base(base)
    bind_chunked_loss(model)
    model = train_briefly(attach_adapter(model, AdapterConfig("lora", lora_rank=4, train_embedding="input")))
    expected = model(input_ids=IDS).logits
    save_adapter(model, tmp_path / "adapter")
    merge(None, str(tmp_path / "adapter"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(merged(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    before, after = load_base(base), merged
    assert not torch.equal(after.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert torch.equal(after.get_output_embeddings().weight, before.get_output_embeddings().weight) is not tied


@pytest.mark.parametrize("tied", [False, True])
def test_every_asked_for_weight_moves_and_no_other(tmp_path, tiny_tokenizer, tied):
    base = save_tiny_model(tmp_path / "base", tiny_tokenizer, tiny_config(tie_word_embeddings=tied))
    model = load_base(base)
    bind_chunked_loss(model)
    model = attach_adapter(
        model, AdapterConfig(finetuning_type="lora", lora_rank=4, train_embedding=True, train_norm=True)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_briefly(model)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(before[name], parameter)
        is_trained = "lora_" in name or "modules_to_save" in name
        assert moved == is_trained == parameter.requires_grad, name


def test_qwen3_head_norms_are_norms(tmp_path, tiny_tokenizer):
    base = save_tiny_model(tmp_path / "base", tiny_tokenizer, tiny_config("qwen3"))
    model = attach_adapter(load_base(base), AdapterConfig(finetuning_type="lora", lora_rank=4, train_norm=True))
    trained = {
        name.split(".modules_to_save")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad
    }
    assert {"q_norm", "k_norm", "norm", "input_layernorm", "post_attention_layernorm"} <= trained


def test_full_finetuning_trains_everything(tiny_model_dir):
    model = attach_adapter(load_base(tiny_model_dir), AdapterConfig(finetuning_type="full"))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_default_targets_are_all_linear_layers_but_the_head(tiny_model_dir):
    model = attach_adapter(load_base(tiny_model_dir, load_in_4bit=True), AdapterConfig(lora_rank=4))
    targets = {name.split(".lora_")[0].split(".")[-1] for name, _ in model.named_parameters() if ".lora_" in name}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_requested_targets(tiny_model_dir):
    config = AdapterConfig(lora_rank=4, target_modules=" q_proj, v_proj ")
    model = attach_adapter(load_base(tiny_model_dir), config)
    targets = {name.split(".lora_")[0].split(".")[-1] for name, _ in model.named_parameters() if ".lora_" in name}
    assert targets == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="target_modules: no linear layer named qq_proj"):
        attach_adapter(load_base(tiny_model_dir), AdapterConfig(target_modules="q_proj,qq_proj"))


def test_trainable_table_counts_numbers_not_bytes(tiny_model_dir):
    config = AdapterConfig(lora_rank=4, train_embedding=True)
    table = trainable_table(attach_adapter(load_base(tiny_model_dir, load_in_4bit=True), config))
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert f"{linear:,}" in next(line for line in table.splitlines() if "nf4" in line)
    embedding = next(line for line in table.splitlines() if line.startswith("embedding"))
    assert f"{2 * 320 * 64:,}" in embedding and "100.00%" in embedding
    shares = [float(line.split()[-1].rstrip("%")) for line in table.splitlines()[1:]]
    assert all(0 <= share <= 100 for share in shares)


def test_evaluation_does_not_repack_4bit_weights(tiny_model_dir):
    """bitsandbytes repacks in place on CPUs with avx512_bf16; gradients after an evaluation were then lost."""
    gradients = []
    for evaluate_first in (False, True):
        torch.manual_seed(0)
        model = attach_adapter(load_base(tiny_model_dir, load_in_4bit=True), AdapterConfig(lora_rank=4, lora_dropout=0))
        if evaluate_first:
            with torch.no_grad():
                model.eval()(input_ids=IDS)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_repacking_is_switched_off_on_every_4bit_layer(tiny_model_dir):
    model = load_base(tiny_model_dir, load_in_4bit=True)
    keep_4bit_weights_trainable(model)
    flags = [m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(flags) == 14 and not any(flags)


def upstream_folder(tmp_path, base, *, prefix="", extra=None):
    """A folder as LongQLoRA and LongLoRA release them: LoRA in PEFT's file, the rest in trainable_params.bin."""
    model = attach_adapter(load_base(base, context=64), AdapterConfig(finetuning_type="lora", lora_rank=4))
    train_briefly(model)
    folder = tmp_path / "upstream"
    model.save_pretrained(folder, save_embedding_layers=False)
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in AutoModelForCausalLM.from_pretrained(base).named_parameters()
        if "norm" in name or "embed" in name or "lm_head" in name
    }
    torch.save(
        {prefix + name: tensor for name, tensor in {**weights, **(extra or {})}.items()},
        folder / "trainable_params.bin",
    )
    return folder, model, weights


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_upstream_checkpoint_folder(tmp_path, tiny_model_dir, prefix):
    folder, model, weights = upstream_folder(tmp_path, tiny_model_dir, prefix=prefix)
    expected_model = model
    base_parameters = dict(expected_model.get_base_model().named_parameters())
    for name, tensor in weights.items():
        base_parameters[name].data.copy_(tensor)
    expected = expected_model.eval()(input_ids=IDS).logits
    loaded = load_for_inference(str(tiny_model_dir), adapter_name_or_path=str(folder))
    assert torch.allclose(loaded.model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)


def longlora_folder(folder: Path, base: Path, tokenizer, *, as_safetensors: bool) -> torch.nn.Module:
    """A checkpoint in the form of LongLoRA's releases, for a vocabulary with [PAD]; returns the model behind it.

    The steps are those of its fine-tune.py and get_trainable_weights.py: [PAD] is added, the embeddings grow by the
    mean of their rows, LoRA goes on attention, embedding and norms are trained in place, and saved beside the LoRA.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = copy.deepcopy(tokenizer)
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
    if as_safetensors:
        save_file(lora_weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(lora_weights, folder / "adapter_model.bin")
    rest = {name: w for name, w in weights.items() if "lora" not in name and ("embed" in name or "norm" in name)}
    torch.save(rest, folder / "trainable_params.bin")
    model.peft_config["default"].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("as_safetensors", [False, True])
def test_longlora_checkpoint_with_a_pad_token(tmp_path, tiny_tokenizer, tied, as_safetensors):
    """Its embeddings have a row more than the base's, and its output embedding, where untied, is not in the file."""
    base = save_tiny_model(tmp_path / "base", tiny_tokenizer, tiny_config(tie_word_embeddings=tied))
    expected = longlora_folder(tmp_path / "adapter", base, tiny_tokenizer, as_safetensors=as_safetensors)
    expected = expected(input_ids=PADDED_IDS).logits
    words = {"adapter_name_or_path": str(tmp_path / "adapter"), "context": ContextRequest(context_size=64)}
    loaded = load_for_inference(str(base), **words)
    assert loaded.config.vocab_size == loaded.model.config.vocab_size == len(loaded.tokenizer) == 321
    found = loaded.model(input_ids=PADDED_IDS).logits
    assert found.shape[-1] == 321
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    in_4bit = load_for_inference(str(base), **words, load_in_4bit=True).model(input_ids=PADDED_IDS).logits
    assert in_4bit.shape == expected.shape and (in_4bit - expected).abs().max() < 1
    merge(str(base), str(tmp_path / "adapter"), tmp_path / "merged", context=ContextRequest(context_size=64))
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()) and merged.config.vocab_size == 321
    torch.testing.assert_close(merged(input_ids=PADDED_IDS).logits, expected, rtol=0, atol=1e-5)
    assert load_for_inference(str(tmp_path / "merged")).tokenizer.pad_token_id == 320


def test_longlora_checkpoint_in_the_scripts(tmp_path, tiny_tokenizer, tiny_model_dir, run_script):
    longlora_folder(tmp_path / "adapter", tiny_model_dir, tiny_tokenizer, as_safetensors=False)
    words = ["--base_model", tiny_model_dir, "--peft_model", tmp_path / "adapter", "--context_size", 64]
    (tmp_path / "data.bin").write_bytes((np.arange(2000, dtype=np.uint16) % 320).tobytes())
    evaluated = run_script("script/evaluate/evaluate.py", *words, "--data_path", tmp_path / "data.bin", "--seq_len", 32)
    assert evaluated.returncode == 0 and "perplexity" in evaluated.stdout, evaluated.stderr[-1000:]
    answered = run_script("script/inference/chat.py", *words, "--max_new_tokens", 3, input="the quick\n")
    assert answered.returncode == 0, answered.stderr[-1000:]


def test_upstream_folder_with_a_strange_weight_is_refused(tmp_path, tiny_model_dir):
    folder, *_ = upstream_folder(
        tmp_path, tiny_model_dir, extra={"model.layers.9.input_layernorm.weight": torch.ones(64)}
    )
    with pytest.raises(ValueError, match="model.layers.9.input_layernorm.weight"):
        load_for_inference(str(tiny_model_dir), adapter_name_or_path=str(folder))


def test_upstream_file_with_code_in_it_is_not_run(tmp_path, tiny_model_dir):
    folder, *_ = upstream_folder(tmp_path, tiny_model_dir)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"model.norm.weight": Evil()}, folder / "trainable_params.bin")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_for_inference(str(tiny_model_dir), adapter_name_or_path=str(folder))
    assert not (tmp_path / "touched").exists()


@pytest.fixture
def adapter_folder(tmp_path, tiny_model_dir):
    model = attach_adapter(
        load_base(tiny_model_dir), AdapterConfig(finetuning_type="lora", lora_rank=4, train_norm=True)
    )
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("change,message", [("extra", "no place"), ("missing", "missing"), ("shape", "does not fit")])
def test_a_weight_that_does_not_match_is_an_error(adapter_folder, change, message):
    file = adapter_folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_A" in name)
    if change == "extra":
        weights[name.replace("layers.0", "layers.7").replace("layers.1", "layers.7")] = weights[name].clone()
    elif change == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, file)
    with pytest.raises(ValueError, match=message):
        load_for_inference(None, adapter_name_or_path=str(adapter_folder))


def test_wrong_base_model_is_named(tmp_path, tiny_tokenizer, adapter_folder):
    other = save_tiny_model(tmp_path / "other", tiny_tokenizer, tiny_config(hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ValueError, match="hidden_size"):
        load_for_inference(str(other), adapter_name_or_path=str(adapter_folder))


def test_folders_that_are_no_adapters(tmp_path, tiny_model_dir):
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_for_inference(str(tiny_model_dir), adapter_name_or_path=str(tiny_model_dir))
    with pytest.raises(ValueError, match="no folder"):
        load_for_inference(str(tiny_model_dir), adapter_name_or_path=str(tmp_path / "nowhere"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_for_inference(str(tiny_model_dir), adapter_name_or_path=str(tmp_path / "broken"))
    (tmp_path / "broken" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="name the base model"):
        load_for_inference(None, adapter_name_or_path=str(tmp_path / "broken"))


@pytest.mark.parametrize(
    "values,key",
    [({"lora_rank": 0}, "lora_rank"), ({"lora_alpha": 0}, "lora_alpha"), ({"lora_dropout": 1.0}, "lora_dropout"),
     ({"finetuning_type": "magic"}, "finetuning_type")],
)  # fmt: skip
def test_bad_adapter_settings(values, key):
    with pytest.raises(ValueError, match=key):
        AdapterConfig(**values)
