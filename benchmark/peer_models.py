"""Models as others train them, for a comparison: PEFT's way, with Liger's kernels, and Unsloth's.

Liger and Unsloth are imported where they are asked for; both need a GPU.
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from trl_step import TOKENIZER

from longqlora.memory.decoder_layer import LINEARS

LORA = {"lora_alpha": 16, "lora_dropout": 0.05}


def with_stock_adapter(model: PreTrainedModel, args: argparse.Namespace) -> PeftModel:
    """The model as PEFT's documentation prepares it for training on 4-bit weights."""
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
    lora = LoraConfig(r=args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM", **LORA)
    return get_peft_model(model, lora).train()


def with_liger_kernels(model: PreTrainedModel) -> PreTrainedModel:
    """Liger's norms, RoPE, SwiGLU and loss in the place of transformers' own."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model)
    return model


def unsloth_model(config: PretrainedConfig, args: argparse.Namespace, dtype: torch.dtype) -> PeftModel:
    """Unsloth loads checkpoints only: random weights are written in 16 bit (13 GB at 7B) and read by it in 4 bit."""
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=args.seq_len, dtype=dtype, load_in_4bit=True
        )
    options = {"use_gradient_checkpointing": "unsloth" if args.gradient_checkpointing else False}
    return FastLanguageModel.get_peft_model(
        model, r=args.lora_rank, target_modules=list(LINEARS), **LORA, **options
    ).train()
