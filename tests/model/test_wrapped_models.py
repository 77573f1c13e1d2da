"""Models that wrap a text model, as they are on the hub: the text model alone is loaded, trained and merged."""

import pytest
import torch
from model_folders import IDS, make_adapter, stock_logits
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from longqlora.inference.load import load_for_inference
from longqlora.model.base import load_config, load_model
from longqlora.model.merge import merge

TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 64, "pad_token_id": 3, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16,
}  # fmt: skip
WHOLE = {
    "gemma3": ({**TEXT, **WINDOWS}, {**VISION, "model_type": "siglip_vision_model"}, {"mm_tokens_per_image": 4}),
    "mistral3": (
        {**TEXT, "model_type": "mistral"}, {**VISION, "model_type": "pixtral", "head_dim": 16},
        {"tie_word_embeddings": False},
    ),
    "qwen3_5": ({**TEXT, **LINEAR}, QWEN_VISION, {}),
}  # fmt: skip


def save_whole(model_type, folder, tokenizer):
    text, vision, others = WHOLE[model_type]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **others)
    whole = AutoModelForImageTextToText.from_config(config)
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return whole.eval()


@pytest.mark.parametrize("model_type", WHOLE)
@torch.no_grad()
def test_the_text_model_of_a_whole_one_loads_trains_and_merges(model_type, tmp_path, tiny_tokenizer):
    folder = tmp_path / "whole"
    whole = save_whole(model_type, folder, tiny_tokenizer)
    config = load_config(str(folder))
    assert config.model_type in (f"{model_type}_text", "mistral") and config.max_position_embeddings == 64
    loaded = load_for_inference(str(folder), dtype=torch.float32)
    assert torch.allclose(loaded.model(IDS).logits, whole(IDS).logits, atol=1e-5)

    # As a run with finetuning_type: full saves it.
    loaded.model.save_pretrained(tmp_path / "saved")
    assert torch.allclose(stock_logits(tmp_path / "saved"), whole(IDS).logits, atol=1e-5)

    text = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    text.save_pretrained(tmp_path / "text")
    targets = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"]}
    adapter = make_adapter(tmp_path / "text", tmp_path / "adapter", tiny_tokenizer, context=None, **targets)
    config.save_pretrained(adapter)
    live = load_for_inference(str(folder), adapter_name_or_path=str(adapter), dtype=torch.float32).model(IDS).logits
    assert not torch.allclose(live, whole(IDS).logits, atol=1e-3)
    merge(str(folder), str(adapter), tmp_path / "merged")
    assert torch.allclose(stock_logits(tmp_path / "merged"), live, atol=1e-5)


def test_a_text_model_in_4_bit(tmp_path, tiny_tokenizer):
    save_whole("mistral3", tmp_path, tiny_tokenizer)
    config = load_config(str(tmp_path))
    model = load_model(str(tmp_path), config, dtype=torch.float32, load_in_4bit=True, device=torch.device("cpu"))
    assert (
        type(model).__name__ == "MistralForCausalLM"
        and type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    )


def test_what_the_whole_config_says_holds_for_the_text_model(tmp_path):
    text, vision, _ = WHOLE["mistral3"]
    text = {**text, "tie_word_embeddings": True}
    AutoConfig.for_model("mistral3", text_config=text, vision_config=vision, tie_word_embeddings=False).save_pretrained(
        tmp_path
    )
    assert load_config(str(tmp_path)).tie_word_embeddings is False


def test_a_text_model_of_no_causal_class_is_refused(tmp_path):
    AutoConfig.for_model("qwen2_5_vl").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a qwen2_5_vl around a qwen2_5_vl_text, .* give a text model"):
        load_config(str(tmp_path))


def test_other_numbers_of_heads_in_some_layers_are_refused(tmp_path):
    AutoConfig.for_model("dots3_note_text", num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_name_or_path: dots3_note_text has other numbers of heads in some"):
        load_config(str(tmp_path))
