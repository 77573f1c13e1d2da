"""The end of a dry run: where it would start, a step on a small copy, and the model's shape without weights."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from longqlora.attention.binding import bind_attention
from longqlora.attention.proof import FIRST_DOCUMENT, NUM_TOKENS, refusing, token_ids
from longqlora.attention.tiny_copy import tiny_copy
from longqlora.distributed import print_main
from longqlora.memory.layer_binding import apply_mechanisms
from longqlora.memory.policy import Mechanisms
from longqlora.model.adapter import attach_adapter, trainable_table
from longqlora.model.base import empty_model, linear_layers, training_dtype
from longqlora.model.loss_binding import bind_chunked_loss
from longqlora.settings.reader import Settings
from longqlora.training.checkpoint import resume_point
from longqlora.training.checks import detached_arguments


def dry_run(settings: Settings, config: PretrainedConfig, mechanisms: Mechanisms, notices: list[str]) -> None:
    """Build the model without memory, train a small copy of it for a step, and print what a run would do."""
    _, start, changes = resume_point(settings)
    arguments = detached_arguments(settings)
    model = empty_model(
        config,
        name=settings.model.model_name_or_path,
        dtype=training_dtype(arguments),
        trust_remote_code=settings.model.trust_remote_code,
    )
    attention = rehearse(model, settings, mechanisms)
    if settings.adapter.finetuning_type == "qlora":
        mark_as_4bit(model)
    with torch.device("meta"), warnings.catch_warnings():
        # PEFT asks transformers for a property by its former name.
        warnings.simplefilter("ignore", FutureWarning)
        model = attach_adapter(model, settings.adapter)
    for line in [*notices, attention, trainable_table(model), start, *changes, "dry run: all settings are valid"]:
        print_main(line)


def rehearse(model: PreTrainedModel, settings: Settings, mechanisms: Mechanisms) -> str:
    """Train a small copy of `model` for one step as a run would; returns the description of its attention.

    What a library below has against the model comes out here. Not rehearsed: NF4, DeepSpeed, rows shared by processes.
    Raises ValueError, naming the model type.
    """
    small, is_packed = tiny_copy(model, drops=True), settings.data.pack
    attention = bind_attention(small, settings.attention, settings.data.max_seq_length, is_packed=is_packed)
    ids = token_ids(NUM_TOKENS)
    positions = {"position_ids": torch.arange(NUM_TOKENS)[None] % FIRST_DOCUMENT} if is_packed else {}
    fix = "give another model_name_or_path, or change the setting that it names"
    with torch.random.fork_rng(devices=[]), refusing(model, "a step of training", fix):
        bind_chunked_loss(small)
        if mechanisms.gradient_checkpointing:
            small.gradient_checkpointing_enable({"use_reentrant": False})
        small = attach_adapter(small, replace(settings.adapter, lora_rank=1))
        apply_mechanisms(small, replace(mechanisms, offload_activations=False), torch.device("cpu"))
        small.train()(input_ids=ids, labels=ids, **positions).loss.backward()
    return attention


def mark_as_4bit(model: PreTrainedModel) -> None:
    """Make `trainable_table` name the weights nf4 that a run would quantise: all linear layers but the output."""
    for module in linear_layers(model).values():
        module.weight.quant_state = SimpleNamespace(shape=module.weight.shape)
