"""The end of a dry run: where it would start, and the model's shape with attention and adapter, without weights."""

import warnings
from types import SimpleNamespace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from component.adapter import attach_adapter, trainable_table
from component.arguments import Settings
from component.attention import bind_attention
from component.distributed import print_main
from component.model import empty_model, linear_layers, training_dtype
from component.resuming import data_hashes, resume_point
from component.run_checks import detached_arguments


def dry_run(settings: Settings, config: PretrainedConfig, notices: list[str]) -> None:
    """Build the model without memory, bind attention and adapter to it, and print what a run would do."""
    _, start, changes = resume_point(settings, data_hashes(settings.data))
    arguments = detached_arguments(settings)
    model = empty_model(
        config,
        name=settings.model.model_name_or_path,
        dtype=training_dtype(arguments),
        trust_remote_code=settings.model.trust_remote_code,
    )
    attention = bind_attention(model, settings.attention, settings.data.max_seq_length)
    if settings.adapter.finetuning_type == "qlora":
        mark_as_4bit(model)
    with torch.device("meta"), warnings.catch_warnings():
        # PEFT asks transformers for a property by its former name.
        warnings.simplefilter("ignore", FutureWarning)
        model = attach_adapter(model, settings.adapter)
    for line in [*notices, attention, trainable_table(model), start, *changes, "dry run: all settings are valid"]:
        print_main(line)


def mark_as_4bit(model: PreTrainedModel) -> None:
    """Make `trainable_table` name the weights nf4 that a run would quantise: all linear layers but the output."""
    for module in linear_layers(model).values():
        module.weight.quant_state = SimpleNamespace(shape=module.weight.shape)
