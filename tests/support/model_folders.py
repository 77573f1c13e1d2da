"""Folders of tiny models and adapters: made, spoiled, read by stock transformers."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from longqlora.model.context import extend_rope

CONTEXT = 256  # four times the 64 tokens of the tiny model
IDS = torch.arange(4, 52)[None]


def extended(config, target: int, rope_type: str | None = None):
    """`config` itself, with RoPE scaled to `target` tokens."""
    extend_rope(config, target, rope_type, 5e5 if rope_type == "theta" else None)
    return config


def make_adapter(base: Path, folder: Path, tokenizer=None, *, context: int | None = CONTEXT, **lora) -> Path:
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
        extended(AutoConfig.from_pretrained(base), context).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def stock_logits(folder: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()(IDS).logits


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(file: Path, change) -> None:
    """Change the weights in a safetensors file; `change` gets all of them, and returns those to save."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
