"""A small Llama trained from random weights: tokenizer, model, schedule, step, and what is saved."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longqlora.model.saved_folder import save_config, save_tokenizer

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]
NUM_WARMUP_STEPS = 100


def train_byte_tokenizer(
    texts: Iterable[str], *, vocab_size: int, context: int, splits_digits: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama's BOS and EOS and a pad token of its own; splits_digits: every digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if splits_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=context, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def random_llama(tokenizer: PreTrainedTokenizerFast, **sizes) -> LlamaForCausalLM:
    """A Llama of four layers for `tokenizer` and its context, with random weights."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=4, max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False, **ids, **sizes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def scheduled_steps(
    optimizers: Sequence[torch.optim.Optimizer], learning_rate: float, *, num_steps: float, max_minutes: float
) -> Iterator[tuple[int, float]]:
    """Number of each step and the part of the run before it, until steps or minutes are used up.

    Sets the learning rate: 100 steps of warm-up, constant, and over the second half linear to zero.
    """
    start = time.monotonic()
    for step in itertools.count():
        progress = max(step / num_steps, (time.monotonic() - start) / 60 / max_minutes)
        if progress >= 1:
            return
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / NUM_WARMUP_STEPS, 2 * (1 - progress))
        yield step, progress


def take_step(model: LlamaForCausalLM, loss: torch.Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Backward pass, gradients clipped to a norm of 1, and an optimizer step."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights, config and tokenizer."""
    model.save_pretrained(folder)
    save_config(model.config, folder)
    save_tokenizer(tokenizer, folder)
