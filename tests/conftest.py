"""Fixtures shared by the tests: a tiny tokenizer and model made here, and a runner for the scripts."""

import copy
import functools
import io
import json
import os
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny products: waking a second thread takes longer than they do.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box quietly in the long dark river night".split()
# A training run of the tiny model: seconds.
NUM_STEPS = 6
ZERO2 = str(REPO / "train_args" / "deepspeed" / "zero2.json")
SETTINGS = {
    "model_max_length": 128, "max_seq_length": 128, "attention": "s2", "lora_rank": 4, "train_embedding": True,
    "train_norm": True, "max_steps": NUM_STEPS, "per_device_train_batch_size": 2, "learning_rate": "1e-2",
    "logging_steps": 1, "save_steps": 2, "save_total_limit": 2, "gradient_checkpointing": True, "pack": True,
    "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3, "seed": 7, "report_to": "none",
    "dataloader_pin_memory": False,
}  # fmt: skip


def sentences(num_words: int, seed: int = 0) -> str:
    """Deterministic text of `num_words` words."""
    state, out = seed * 7919 + 1, []
    for _ in range(num_words):
        state = (state * 1103515245 + 12345) % 2**31
        out.append(WORDS[(state >> 8) % len(WORDS)])
    return " ".join(out)


def pytest_runtest_setup(item) -> None:
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch.cuda.is_available() is false")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the checkout; tests that need it skip where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside the checkout: real-data test skipped")
    return SHARED / "data"


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    options = {"vocab_size": 320, "min_frequency": 0, "show_progress": False}
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([sentences(2000)], special_tokens=list(special.values()), **options)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), **special)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """A copy that a test may change."""
    return copy.deepcopy(tiny_tokenizer)


# Layers of both kinds.
WINDOWS = {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 32,
}  # fmt: skip
# What single model types need beside the sizes that all have.
SIZES = {
    **dict.fromkeys(("gemma3_text", "cohere2", "ministral", "olmo3", "exaone4"), WINDOWS),
    "mistral": {"sliding_window": None},
    "smollm3": {"num_hidden_layers": 4},  # every fourth layer has no RoPE
    **dict.fromkeys(
        ("qwen3", "ernie4_5", "glm4", "gemma", "gemma2", "helium", "seed_oss", "hunyuan_v1_dense",
         "nemotron"), {"head_dim": 16},
    ),
    **dict.fromkeys(("mixtral", "phimoe", "granitemoe", "olmoe"), {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["chunked_attention", "full_attention"],
    },
    "glm4_moe": {"head_dim": 16, **EXPERTS},
    "gpt_oss": {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "decoder_sparse_step": 2,
    },
    "deepseek_v3": {
        **EXPERTS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}  # fmt: skip


def tiny_config(model_type: str = "llama", **overrides):
    """Config of a random model small enough for a test; `overrides` replace single values."""
    from transformers import AutoConfig

    values = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 64, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 3, "tie_word_embeddings": False, **SIZES.get(model_type, {}),
    }  # fmt: skip
    if model_type == "gpt_neox":
        del values["num_key_value_heads"]
    return AutoConfig.for_model(model_type, **{**values, **overrides})


def save_tiny_model(folder: Path, tokenizer, config=None, seed: int = 0) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config or tiny_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", tiny_tokenizer)


@pytest.fixture(autouse=True)
def what_a_test_sets_does_not_outlive_it():
    """Notices that are printed once, variables that scripts set when they are called here, bars that one turns off."""
    import datasets

    from longqlora.distributed import print_notice

    print_notice.cache_clear()
    datasets.enable_progress_bars()
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def train_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"text": sentences(20 + 37 * i % 160, seed=i)} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="session")
def write_yaml_in(tiny_model_dir, train_file):
    """Write a YAML of SETTINGS with changes (None leaves a key out); returns its path and the output_dir."""

    def write(folder: Path, name="run", **changes) -> tuple[Path, Path]:
        path, output_dir = folder / f"{name}.yaml", folder / name
        values = {
            "model_name_or_path": str(tiny_model_dir), "train_file": str(train_file), "output_dir": str(output_dir),
            "data_cache_dir": str(folder / "cache"), **SETTINGS, **changes,
        }  # fmt: skip
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path, output_dir

    return write


@pytest.fixture
def write_yaml(write_yaml_in, tmp_path):
    return functools.partial(write_yaml_in, tmp_path)


@pytest.fixture(scope="session")
def run_script():
    """`script_process.run_script`: a script to its end in a process of its own."""
    import script_process

    return script_process.run_script


@pytest.fixture
def run_in_process(monkeypatch, capsys):
    """run_in_process("script/x.py", *arguments): the script's main in this process: exit code, stdout, stderr."""
    from rigged_model import load_script, run_main_of

    def run(script, *arguments, input=""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(input.encode())))
        return run_main_of(load_script(script), arguments, monkeypatch, capsys)

    return run


@pytest.fixture
def evaluate(run_in_process):
    """evaluate("passkey", *arguments) runs script/evaluate/passkey.py in this process."""
    return lambda name, *arguments: run_in_process(f"script/evaluate/{name}.py", *arguments)
