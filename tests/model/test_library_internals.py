"""What component/model relies on in transformers, PEFT and bitsandbytes without their promise, each by name.

A failure here says which library changed what: component/model/library_internals.py and loss_binding.py name the reason
for each.
"""

import inspect

import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from longqlora.model import library_internals as internals
from longqlora.model.loss_binding import bind_chunked_loss, chunked_loss_forward


def meta_model(model_type="llama"):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type))


def forward_is_replaceable():
    model, ids = AutoModelForCausalLM.from_config(tiny_config()), torch.arange(4, 12)[None]
    ours, stock = (set(inspect.signature(x).parameters) for x in (chunked_loss_forward, model.forward))
    bind_chunked_loss(model)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    return {"input_ids", "attention_mask", "position_ids", "labels"} <= ours & stock and all(
        x(input_ids=ids, labels=ids).logits is None for x in (model, peft_model)
    )


def trainer_sees_the_arguments(folder):
    model = AutoModelForCausalLM.from_config(tiny_config())
    bind_chunked_loss(model)
    trainer = Trainer(model, TrainingArguments(folder, report_to="none"), train_dataset=[{}])
    trainer._set_signature_columns_if_needed()
    columns = {"position_ids", "attention_mask", "labels", "shift_labels"}
    return trainer.model_accepts_loss_kwargs and columns <= set(trainer._signature_columns)


def kernels_are_dropped():
    config = AutoConfig.for_model("gemma3", attn_implementation="org/kernel", experts_implementation="org/kernel")
    config.text_config._attn_implementation = "org/nested"
    found, parts = internals.drop_kernels(config), (config, config.text_config)
    is_unnamed = [x._attn_implementation is x._experts_implementation is None for x in parts]
    return found == ["org/kernel", "org/nested"] and all(is_unnamed)


def experts_have_their_names_in_files():
    names = set(internals.saved_names(meta_model("mixtral")))
    return "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names


def experts_that_peft_fuses():
    names = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    return internals.fused_expert_names(meta_model("deepseek_v3"), names) == names[1:]


def weights_that_peft_loses():
    layers = ("self_attn.q_proj", "mlp.shared_experts.up_proj")
    keys = [f"base_model.model.model.layers.1.{layer}.lora_A.weight" for layer in layers]
    return internals.lost_on_loading(meta_model("laguna"), keys) == keys[1:]


def lora_scales():
    config = {"lora_alpha": 16, "alpha_pattern": {"v_proj": 3}}
    scales = [internals.lora_scale(config, f"model.layers.0.self_attn.{name}", 4) for name in ("q_proj", "v_proj")]
    return scales == [4, 0.75] and internals.lora_scale({**config, "use_rslora": True}, "q_proj", 4) == 8


def repacking_is_switched_off():
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(8, 8)
    internals.keep_4bit_weights_trainable(layer)
    return layer.support_avx512bf16_for_cpu is False


RELIED_ON = {
    "transformers or PEFT: the instance's own forward is what they call": forward_is_replaceable,
    "transformers: config._attn_implementation, config._experts_implementation": kernels_are_dropped,
    "transformers: core_model_loading.revert_weight_conversion": experts_have_their_names_in_files,
    "PEFT: convert_peft_config_for_transformers": experts_that_peft_fuses,
    "PEFT: convert_peft_adapter_state_dict_for_transformers": weights_that_peft_loses,
    "PEFT: get_pattern_key": lora_scales,
    "bitsandbytes: Linear4bit.support_avx512bf16_for_cpu": repacking_is_switched_off,
}


@pytest.mark.parametrize("name", RELIED_ON)
def test_libraries_are_as_they_were(name):
    assert RELIED_ON[name](), f"{name} changed; see component/model/library_internals.py and loss_binding.py"


def test_the_trainer_keeps_the_columns_that_the_loss_needs(tmp_path):
    assert trainer_sees_the_arguments(str(tmp_path)), "transformers: the Trainer no longer inspects forward as it did"
