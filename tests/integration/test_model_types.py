"""Every model family that the README names through the whole path: train, sparse and dense, merge, reload.

And what the dry run says of other types: that they train, which they then do, or one line on why not.
"""

import re

import pytest
import torch
from conftest import save_tiny_model, tiny_config
from rigged_model import run_main_of
from training_process import start
from transformers import AutoModelForCausalLM

import train as train_script
from longqlora.attention.binding import bind_attention, unbind_attention
from longqlora.inference.load import load_for_inference
from longqlora.model.adapter import attach_adapter
from longqlora.model.adapter_folder import save_adapter
from longqlora.model.base import load_config, load_model
from longqlora.model.context import ContextRequest, apply_context
from longqlora.model.loss_binding import bind_chunked_loss
from longqlora.model.merge import merge
from longqlora.settings.config import AdapterConfig, AttentionConfig

MODEL_TYPES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gpt_neox"]
LENGTH, TARGET = 32, 128


@pytest.fixture(scope="module", params=MODEL_TYPES)
def base(request, tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return save_tiny_model(folder, tiny_tokenizer, tiny_config(request.param, max_position_embeddings=LENGTH))


def training_model(base, *, attention="s2", load_in_4bit=False, **adapter):
    config = load_config(str(base))
    kind = "dca" if attention == "dca" else "auto"
    apply_context(config, ContextRequest(context_size=TARGET, attention=kind))
    model = load_model(str(base), config, dtype=torch.float32, load_in_4bit=load_in_4bit, device=torch.device("cpu"))
    bind_attention(model, AttentionConfig(attention=attention), TARGET)
    bind_chunked_loss(model)
    torch.manual_seed(0)
    options = {"lora_rank": 4, "lora_dropout": 0.0, **adapter}
    return attach_adapter(model, AdapterConfig("qlora" if load_in_4bit else "lora", **options))


def ids_of(num_tokens, seed=0):
    return torch.randint(4, 320, (2, num_tokens), generator=torch.Generator().manual_seed(seed))


def train(model, num_steps=4):
    """Adam steps on one batch; returns the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = ids_of(TARGET), []
    model.train()
    for _ in range(num_steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_trains_sparse_and_reads_dense(base):
    model = training_model(base, train_embedding=True, train_norm=True)
    assert model.config._attn_implementation == "s2_sdpa_g32"
    ids = ids_of(TARGET, seed=1)
    with torch.no_grad():
        sparse = model.train()(input_ids=ids).logits
        dense = model.eval()(input_ids=ids).logits
        unbind_attention(model.get_base_model())
        assert torch.equal(model(input_ids=ids).logits, dense), "evaluation is stock dense attention"
    assert torch.allclose(sparse[:, :16], dense[:, :16], atol=1e-5), "the first half group sees all there is"
    assert not torch.allclose(sparse[:, 64:], dense[:, 64:], atol=1e-4)
    bind_attention(model.get_base_model(), AttentionConfig(), TARGET)
    changed = ids.clone()
    changed[:, 100:] = (changed[:, 100:] + 1) % 316 + 4
    with torch.no_grad():
        again = model.train()(input_ids=changed).logits
    assert torch.allclose(again[:, :100], sparse[:, :100], atol=1e-5), "no token sees a later one"


def test_qlora_step_learns(base):
    losses = train(training_model(base, load_in_4bit=True))
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("attention", ["s2", "dca"])
def test_merged_model_reloads_in_stock_transformers(base, attention, tmp_path, tiny_tokenizer):
    model = training_model(base, attention=attention, train_embedding=True, train_norm=True)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    save_adapter(model, adapter)
    merge(None, str(adapter), merged)
    short, long = ids_of(16, seed=2), ids_of(100, seed=3)
    stock = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=long).logits
        for source in ({"adapter_name_or_path": str(adapter)}, {"model_name_or_path": str(merged)}):
            loaded = load_for_inference(**{"model_name_or_path": None, **source}, dtype=torch.float32)
            assert torch.allclose(loaded.model(input_ids=long).logits, expected, atol=1e-4), source
            assert loaded.context_size == TARGET and ("dual chunk" in loaded.attention) == (attention == "dca")
        # Stock transformers knows no dual chunk attention; within one chunk there is nothing to know.
        assert torch.allclose(stock(input_ids=short).logits, model(input_ids=short).logits, atol=1e-4)
        same = torch.allclose(stock(input_ids=long).logits, expected, atol=1e-4)
        assert same == (attention == "s2")


@pytest.fixture(scope="module")
def write_settings(tmp_path_factory, tiny_tokenizer, write_yaml_in):
    """Write a tiny model of a type and the YAML of a run of two steps on it; returns the YAML's path."""
    folder = tmp_path_factory.mktemp("types")

    def write(model_type, **changes):
        model = folder / model_type
        if not model.is_dir():
            save_tiny_model(model, tiny_tokenizer, tiny_config(model_type))
        values = {
            "model_name_or_path": str(model), "finetuning_type": "lora", "max_seq_length": 64, "max_steps": 2,
            "save_strategy": "no", "overwrite_output_dir": True, "train_embedding": None, "train_norm": None,
            "gradient_checkpointing": None, **changes,
        }  # fmt: skip
        return write_yaml_in(folder, f"{model_type}-run", **values)[0]

    return write


@pytest.fixture
def dry_run(write_settings, monkeypatch, capsys):
    """Dry run of train.py on a type of model, which draws none of the caller's random numbers: exit code, outputs."""

    def run(model_type, **changes):
        words = ["--train_args_file", write_settings(model_type, **changes), "--dry_run"]
        state = torch.get_rng_state()
        outcome = run_main_of(train_script, words, monkeypatch, capsys)
        assert torch.equal(torch.get_rng_state(), state)
        return outcome

    return run


@pytest.mark.parametrize(
    "model_type,changes,refusal",
    [
        ("phi3", {}, "rope_type: phi3 takes no RoPE of type linear .*use rope_type: ntk, or theta"),
        ("phi3", {"rope_type": "ntk"}, None),
        ("phimoe", {}, "rope_type: phimoe takes no RoPE of type linear"),
        ("qwen3_moe", {}, None),
        ("deepseek_v3", {"attention": "dca"}, None),
        ("deepseek_v3", {"target_modules": "o_proj,up_proj"}, "target_modules: up_proj: in deepseek_v3 PEFT takes it"),
        ("gemma2", {"attention": "full"}, "model_name_or_path: .* is a gemma2, whose attention torch's SDPA cannot"),
        ("llama4_text", {"finetuning_type": "qlora"}, "finetuning_type: llama4_text .*Llama4Router.*use lora"),
        ("seed_oss", {"attention": "dca"}, "seed_oss: attention: dca has no attention dropout; set attention_dropout"),
        ("hunyuan_v1_dense", {"attention": "dca"}, "attention: dca does not suit hunyuan_v1_dense"),
    ],
)
def test_the_dry_run_says_whether_a_type_trains(dry_run, model_type, changes, refusal):
    code, out, error = dry_run(model_type, **changes)
    assert re.search(refusal, error) if refusal else "all settings are valid" in out
    assert code == (2 if refusal else 0)


def test_experts_stay_as_they_are_and_lora_is_on_what_is_linear(dry_run):
    """deepseek_v3: PEFT would put LoRA on the experts' fused weights, with which it knows no dropout."""
    assert "experts of deepseek_v3 are no linear layers" in dry_run("deepseek_v3")[1]
    with torch.device("meta"):
        model = attach_adapter(AutoModelForCausalLM.from_config(tiny_config("deepseek_v3")), AdapterConfig("lora"))
    trained = {name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["s2", "full", "dca"])
@pytest.mark.parametrize(
    "model_type",
    [
        *MODEL_TYPES, "qwen3_moe", "phi3", "phimoe", "gemma", "gemma2", "gemma3_text", "olmo2", "granite", "granitemoe",
        "smollm3", "ernie4_5", "glm4", "deepseek_v3", "cohere", "cohere2", "gpt_oss", "starcoder2", "stablelm",
        "helium", "seed_oss", "hunyuan_v1_dense", "llama4_text", "lfm2", "olmoe", "nemotron", "persimmon", "falcon",
    ],
)  # fmt: skip
def test_what_passes_the_dry_run_trains(write_settings, tmp_path, model_type, attention):
    """Two steps after a dry run that found nothing; a dry run that did says so in one line."""
    path, log = write_settings(model_type, attention=attention), tmp_path / "log"
    for words, expected in ((["--dry_run"], (0, 2)), ([], (0,))):
        process = start("--train_args_file", path, *words, log=log)
        process.join(120)
        text = log.read_text()
        assert process.exitcode in expected and "Traceback" not in text, text[-2000:]
        if process.exitcode:
            break
