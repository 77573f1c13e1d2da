"""What our folders mean to others: config.json to four readers, tokenizer files to transformers 4.

Each reader's rule is restated in a line or two and linked; the slow test at the end runs transformers 4 itself.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model, tiny_config
from model_folders import extended, make_adapter
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from longqlora.inference.load import load_for_inference
from longqlora.model.adapter_folder import save_adapter
from longqlora.model.base import load_tokenizer
from longqlora.model.context import ContextRequest, apply_context, context_length
from longqlora.model.merge import merge
from longqlora.model.rope_scaling import ROPE_METHODS
from longqlora.model.saved_folder import save_config, save_tokenizer

ORIGINAL, TARGET, LONG = 64, 256, 1024
PACKAGES = ["transformers==4.57.3", "tokenizers==0.22.2", "huggingface-hub==0.36.2"]


def by_transformers(config) -> int:
    """https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_rope_utils.py: dynamic RoPE is
    scaled from max_position_embeddings on, by the factor; to all else that is the longest input."""
    rope = config.rope_parameters
    return int(config.max_position_embeddings * (rope["factor"] if rope["rope_type"] == "dynamic" else 1))


def by_vllm(config) -> int:
    """https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/config/model.py, _get_and_verify_max_len, and
    transformers_utils/model_arch_config_convertor.py, derive_max_model_len_and_key."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "seq_len")
    length = min(getattr(config, name) for name in names if getattr(config, name, None) is not None)
    rope = config.rope_parameters
    return int(length * (1 if rope["rope_type"] in ("longrope", "llama3", "yarn") else rope.get("factor", 1)))


def by_older_vllm(config) -> int:
    """https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/config/model.py: YaRN from the original length."""
    if config.rope_parameters["rope_type"] == "yarn":
        return int(config.rope_parameters["original_max_position_embeddings"] * config.rope_parameters["factor"])
    return by_vllm(config)


def by_sglang(config) -> int:
    """https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/utils/hf_transformers/common.py,
    get_context_length; config.rope_scaling is rope_parameters there."""
    names = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
    length = next(getattr(config, name) for name in names if getattr(config, name, None) is not None)
    rope = config.rope_parameters
    keeps = "original_max_position_embeddings" in rope or rope["rope_type"] == "llama3"
    return int(length * (1 if keeps else rope.get("factor", 1)))


def by_llama_cpp(config) -> int:
    """https://github.com/ggml-org/llama.cpp/blob/00bd27a621f92be9a99d24d7c5117a263b9b3c01/conversion/base.py,
    TextModel.set_gguf_parameters."""
    return config.max_position_embeddings


READERS = [context_length, by_transformers, by_vllm, by_older_vllm, by_sglang, by_llama_cpp]


def announced(folder) -> dict[str, int]:
    config = AutoConfig.from_pretrained(folder)
    return {reader.__name__: reader(config) for reader in READERS}


RELEASED = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
EARLIER = {**RELEASED, "max_position_embeddings": TARGET, "original_max_position_embeddings": ORIGINAL}
CASES = [*((name, {}) for name in ROPE_METHODS), (None, {}), (None, RELEASED), (None, EARLIER)]


@pytest.mark.parametrize(("rope_type", "values"), CASES, ids=[*ROPE_METHODS, "unscaled", "released", "earlier"])
def test_every_reader_announces_the_context(tmp_path, rope_type, values):
    """Also of a config in the convention of LongLoRA's releases, or of earlier versions here."""
    config = tiny_config(**copy.deepcopy(values))
    save_config(extended(config, TARGET, rope_type) if rope_type else config, tmp_path)
    expected = dict.fromkeys((reader.__name__ for reader in READERS), TARGET if rope_type or values else ORIGINAL)
    if rope_type == "dynamic":
        expected["by_llama_cpp"] = ORIGINAL  # it has no dynamic RoPE
    assert announced(tmp_path) == expected
    save_config(extended(config, 2 * TARGET, rope_type), tmp_path)
    assert set(announced(tmp_path).values()) - {ORIGINAL} == {2 * TARGET}


def test_a_length_with_linear_rope_that_can_mean_two_things_is_said(capsys):
    """LongLoRA says what was pretrained; Together's LLaMA-2-7B-32K, Chinese-Alpaca-2-16k what is reached."""
    rope, original = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}, "original_max_position_embeddings"
    for length, values, is_said in ((4096, {}, False), (32768, {}, True), (32768, {original: 4096}, False)):
        config = tiny_config(rope_parameters=dict(rope), max_position_embeddings=length, **values)
        apply_context(config, ContextRequest())
        printed = capsys.readouterr().err
        assert (f"add {original}: 4096" in printed and "262144" in printed) == bool(printed) == is_said


def test_dual_chunk_attention_is_no_length_for_readers_without_it(tmp_path):
    config = tiny_config()
    request = ContextRequest(context_size=1024, rope_type="linear", attention="dca", pretraining_length=TARGET)
    apply_context(config, request)
    save_config(config, tmp_path)
    expected = dict.fromkeys((reader.__name__ for reader in READERS), TARGET)
    assert announced(tmp_path) == {**expected, "context_length": 1024}


MODEL_TYPES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gpt_neox", "phi", "stablelm"]


@pytest.mark.parametrize("rope_type", list(ROPE_METHODS))
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_transformers_4_finds_its_names_and_5_reads_the_same(tmp_path, model_type, rope_type):
    config = extended(tiny_config(model_type), TARGET, rope_type)
    save_config(config, tmp_path)
    values, rope = json.loads((tmp_path / "config.json").read_text()), config.rope_parameters
    neox = model_type == "gpt_neox"
    assert values["rotary_emb_base" if neox else "rope_theta"] == rope["rope_theta"]
    assert values.get("rotary_pct" if neox else "partial_rotary_factor") == rope.get("partial_rotary_factor")
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    assert values.get("rope_scaling", {"rope_type": "default"}) == scaling
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.rope_parameters, loaded.max_position_embeddings) == (rope, config.max_position_embeddings)
    assert extended(loaded, TARGET, rope_type).rope_parameters == rope and context_length(loaded) == TARGET
    # Its own names alone, as in a config.json of transformers 4, say the same.
    del values["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope


def test_parameters_by_layer_type(tmp_path):
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    config = tiny_config("gemma3_text", head_dim=16, layer_types=list(rope), rope_parameters=rope)
    save_config(config, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["rope_theta"], values["rope_local_base_freq"]) == (2e6, 2e4)
    assert values["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert values["max_position_embeddings"] == ORIGINAL and "max_seq_len" not in values
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


@pytest.fixture(scope="module")
def other_base(tmp_path_factory, tiny_tokenizer):
    """A model folder as transformers 5 saves it, with a sentencepiece model and a special token of its own."""
    folder = save_tiny_model(
        tmp_path_factory.mktemp("other") / "base", tiny_tokenizer, tiny_config(vocab_size=len(tiny_tokenizer) + 1)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["dog"]})
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    return folder


def tokenizer_values(folder) -> dict:
    values = json.loads((folder / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert values["model_input_names"] == ["input_ids", "attention_mask"]
    assert "extra_special_tokens" not in values and values["additional_special_tokens"] == ["dog"]
    assert (folder / "tokenizer.model").read_bytes() == b"sentencepiece"
    return values


def test_a_tokenizer_is_saved_in_words_that_transformers_4_knows(tmp_path, other_base):
    tokenizer = load_tokenizer(str(other_base))
    save_tokenizer(tokenizer, tmp_path)
    assert tokenizer_values(tmp_path)["added_tokens_decoder"]["2"]["content"] == "</s>"
    (tmp_path / "config.json").write_bytes((other_base / "config.json").read_bytes())
    again = load_tokenizer(str(tmp_path))
    text = "the lazy dog</s> sleeps"
    assert again(text) == tokenizer(text) and again.all_special_tokens == tokenizer.all_special_tokens
    save_tokenizer(again, tmp_path / "again")
    tokenizer_values(tmp_path / "again")


@pytest.mark.parametrize("of_adapter", [True, False])
def test_a_merged_folder_carries_the_tokenizer_of_adapter_or_base(tmp_path, other_base, of_adapter):
    adapter = make_adapter(other_base, tmp_path / "adapter", load_tokenizer(str(other_base)) if of_adapter else None)
    merge(str(other_base), str(adapter), tmp_path / "out")
    assert tokenizer_values(tmp_path / "out")["model_max_length"] == TARGET
    save_adapter(load_for_inference(None, adapter_name_or_path=str(adapter)).model, tmp_path / "final")
    for folder in ("out", "final"):
        assert set(announced(tmp_path / folder).values()) == {TARGET}
        assert json.loads((tmp_path / folder / "config.json").read_text())["rope_scaling"]["factor"] == 4.0


# transformers 4.57 itself: the same tokens and logits as transformers 5.


@pytest.fixture(scope="module")
def transformers_4(request) -> Path:
    """Folder for PYTHONPATH, beside the cache of pytest: it, and the two packages that it needs in older versions."""
    folder = Path(request.config.cache.mkdir("transformers-4.57.3"))
    if not (folder / "complete").is_file():
        words = ["-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(folder), *PACKAGES]
        outcome = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600)
        if outcome.returncode:
            pytest.skip(f"transformers 4.57.3 cannot be installed: {outcome.stderr.strip().splitlines()[-1]}")
        (folder / "complete").touch()
    return folder


@pytest.fixture(scope="module")
def folders_of_each_method(tmp_path_factory, repo) -> Path:
    """An adapter and its merged model for every way to scale RoPE."""
    root = tmp_path_factory.mktemp("folders")
    base = Path(shutil.copytree(repo / "data" / "tiny-llama", root / "base"))
    for rope_type in ROPE_METHODS:
        final = make_adapter(base, root / rope_type / "final", context=None, modules_to_save=["norm"])
        save_config(extended(AutoConfig.from_pretrained(base), LONG, rope_type), final)
        save_tokenizer(load_tokenizer(str(base)), final)
        merge(str(base), str(final), root / rope_type / "merged", dtype=torch.float32)
    return root


def answers(folders: Path, output: Path, path: Path | None = None) -> tuple[str, dict[str, torch.Tensor]]:
    """The version of transformers that read the folders, and what it answered."""
    words = [str(Path(__file__).with_name("model_folder_reader.py")), str(folders), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    outcome = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=600)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    with safe_open(output, "pt") as file:
        return file.metadata()["version"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.slow
def test_transformers_4_gives_the_same_tokens_and_logits(folders_of_each_method, transformers_4, tmp_path):
    new, expected = answers(folders_of_each_method, tmp_path / "5.safetensors")
    old, found = answers(folders_of_each_method, tmp_path / "4.safetensors", transformers_4)
    assert new.startswith("5.") and old == "4.57.3" and len(found) == 4 * len(ROPE_METHODS)
    num_tokens = len(expected["linear.merged.logits"])
    assert 256 < num_tokens < LONG, "the text must reach past the base's context"
    for name, answer in found.items():
        torch.testing.assert_close(answer, expected[name], atol=0 if "tokens" in name else 1e-4, rtol=0, msg=name)
    for rope_type in ROPE_METHODS:
        merged, adapted = (expected[f"{rope_type}.{kind}.logits"] for kind in ("merged", "final"))
        torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0, msg=rope_type)
