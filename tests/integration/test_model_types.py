"""Every model family that the README names, and every RoPE method, through the whole path: train, merge, reload.

And what the dry run says of other types: that they train, which they then do, or one line on why not.
"""

import re

import pytest
import torch
from conftest import save_tiny_model, tiny_config
from training_process import losses_of, start, train
from transformers import AutoConfig, AutoModelForCausalLM

from longqlora.inference.load import load_for_inference
from longqlora.model.adapter import attach_adapter
from longqlora.model.merge import merge
from longqlora.settings.config import AdapterConfig

MODEL_TYPES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gpt_neox"]


@pytest.fixture(scope="module")
def write_settings(tmp_path_factory, tiny_tokenizer, write_yaml_in):
    """Write a tiny model of a type and the YAML of a short run on it; returns the YAML's path and the output_dir."""
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
        return write_yaml_in(folder, f"{model_type}-run", **values)

    return write


LONG = {
    "model_max_length": 256, "max_seq_length": 256, "max_steps": 4, "warmup_steps": None, "lora_dropout": 0.0,
    "train_embedding": True, "train_norm": True,
}  # fmt: skip
# Model type and settings; then what the adapter's config holds: RoPE's type and factor.
RUNS = {
    **{f"{x}-s2": (x, {"attention": "s2", "finetuning_type": "qlora"}, "linear", 4.0) for x in MODEL_TYPES},
    **{f"{x}-dca": (x, {"attention": "dca"}, "default", 1.0) for x in MODEL_TYPES},
    "yarn": ("llama", {"rope_type": "yarn", "attention": "s2"}, "yarn", 4.0),
    "ntk": ("llama", {"rope_type": "ntk", "attention": "full"}, "default", 1.0),
    "dynamic": ("llama", {"rope_type": "dynamic", "attention": "s2"}, "dynamic", 4.0),
    "dca on PI": ("llama", {"attention": "dca", "rope_type": "linear", "pretraining_length": 128}, "linear", 2.0),
}


@pytest.mark.parametrize("model_type,settings,rope_type,factor", RUNS.values(), ids=RUNS)
def test_an_adapter_reads_the_same_merged_and_in_stock_transformers(
    write_settings, tmp_path, model_type, settings, rope_type, factor
):
    path, out = write_settings(model_type, **LONG, **settings)
    final, merged, is_dca = out / "final", tmp_path / "merged", settings["attention"] == "dca"
    assert ("context of 256" if is_dca else "context 64 -> 256") in train(path)
    losses = losses_of(out)
    assert losses[4] < losses[1] - 0.05
    rope = AutoConfig.from_pretrained(final).rope_parameters
    assert (rope["rope_type"], rope.get("factor", 1.0)) == (rope_type, factor)

    merge(None, str(final), merged)
    ids = torch.randint(4, 320, (2, 200), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        outputs = []
        for base, adapter in ((None, str(final)), (str(merged), None)):
            loaded = load_for_inference(base, adapter_name_or_path=adapter, dtype=torch.float32)
            assert loaded.context_size == loaded.tokenizer.model_max_length == 256
            assert ("dual chunk" in loaded.attention) == is_dca
            outputs.append(loaded.model(input_ids=ids).logits)
        assert torch.allclose(*outputs, atol=1e-4)
        # Stock transformers knows no dual chunk attention; within one chunk there is nothing to know.
        assert torch.allclose(stock(input_ids=ids).logits, outputs[1], atol=1e-4) != is_dca
        short = ids[:, :16]
        assert torch.allclose(stock(input_ids=short).logits, loaded.model(input_ids=short).logits, atol=1e-4)


@pytest.fixture
def dry_run(write_settings, run_in_process):
    """Dry run of train.py on a type of model, which draws none of the caller's random numbers: exit code, outputs."""

    def run(model_type, **changes):
        path, _ = write_settings(model_type, **changes)
        state = torch.get_rng_state()
        outcome = run_in_process("train.py", "--train_args_file", path, "--dry_run")
        assert torch.equal(torch.get_rng_state(), state)
        return outcome

    return run


@pytest.mark.parametrize(
    "model_type,changes,refusal",
    [
        ("phi3", {}, "rope_type: phi3 takes no RoPE of type linear .*use ntk, or theta"),
        ("phi3", {"rope_type": "ntk"}, None),
        ("phimoe", {}, "rope_type: phimoe takes no RoPE of type linear"),
        ("qwen3_moe", {}, None),
        ("deepseek_v3", {"attention": "dca"}, None),
        ("deepseek_v3", {"target_modules": "o_proj,up_proj"}, "target_modules: up_proj: in deepseek_v3 PEFT takes it"),
        ("gemma2", {"attention": "full"}, None),
        ("gemma2", {}, "attention: gemma2 has attention that torch's SDPA does not compute .*use attention: full"),
        ("gpt_oss", {"attention": "full", "rope_type": None}, "pack does not suit gpt_oss: .*set pack: false"),
        ("gpt_oss", {"attention": "full", "pack": False}, None),
        ("gpt_oss", {"rope_type": "linear"}, "already scaled by 'yarn' .*leave rope_type out"),
        ("deepseek_v32", {}, "attention: deepseek_v32 has layers that choose the keys .*use attention: full"),
        ("doge", {"attention": "dca"}, "attention: doge has layers that choose the keys .*use attention: full"),
        ("recurrent_gemma", {"rope_type": "ntk"}, "recurrent_gemma has sliding-window layers alone .*attention: full"),
        ("gemma3_text", {}, None),
        ("gemma3_text", {"attention": "dca"}, "has sliding-window layers .*use attention: s2 or full"),
        ("exaone4", {}, None),
        ("glm4_moe", {}, None),
        ("mixtral", {}, None),
        ("llama4_text", {"finetuning_type": "qlora"}, "finetuning_type: llama4_text .*Llama4Router.*use lora"),
        ("seed_oss", {"attention": "dca"}, "seed_oss: attention: dca has no attention dropout; set attention_dropout"),
        ("hunyuan_v1_dense", {"attention": "dca"}, "attention: dca does not suit hunyuan_v1_dense"),
    ],
)
def test_the_dry_run_says_whether_a_type_trains(dry_run, model_type, changes, refusal):
    code, out, error = dry_run(model_type, **changes)
    assert re.search(refusal, error) if refusal else "all settings are valid" in out, error
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
    (path, _), log = write_settings(model_type, attention=attention), tmp_path / "log"
    for words, expected in ((["--dry_run"], (0, 2)), ([], (0,))):
        process = start("--train_args_file", path, *words, log=log)
        process.join(120)
        text = log.read_text()
        assert process.exitcode in expected and "Traceback" not in text, text[-2000:]
        if process.exitcode:
            break
