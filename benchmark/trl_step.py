"""A training step as TRL's SFTTrainer takes it, for a comparison; trl is imported where it is asked for."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

TOKENIZER = Path(__file__).resolve().parents[1] / "data" / "tiny-llama"


def trl_step(
    args: argparse.Namespace, model: torch.nn.Module, dtype: torch.dtype
) -> tuple[torch.nn.Module, Callable[[], float]]:
    """The model as the trainer holds it, and a function that takes one step on a fixed random row and returns its loss.

    model: with its adapter. The trainer makes the optimizer, casts and scales as its arguments say.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (args.batch_size, args.seq_len), generator=generator)
    is_cpu = args.device == "cpu" or not torch.cuda.is_available()
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=args.seq_len, per_device_train_batch_size=args.batch_size,
        max_steps=1, learning_rate=1e-4, optim="adamw_torch_fused" if args.optim == "adamw_torch" else args.optim,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=is_cpu, report_to="none",
        gradient_checkpointing=args.gradient_checkpointing, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args=config, train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
    )  # fmt: skip
    trainer.create_optimizer()
    # What train() would set before its first step.
    trainer.current_gradient_accumulation_steps = 1
    loader = trainer.get_train_dataloader()

    def step() -> float:
        inputs = next(iter(loader))
        loss = trainer.training_step(trainer.model, inputs)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss.item()

    return trainer.model, step
