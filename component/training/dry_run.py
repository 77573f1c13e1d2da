"""The end of a dry run: data and steps, where it would start, a step on a small copy, the shape without weights."""

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longqlora.attention.binding import bind_attention, bind_dense_finish
from longqlora.attention.proof import refusing, tiny_copy, trial_inputs
from longqlora.data.preview import measure
from longqlora.distributed import is_main_process, print_main, world_size
from longqlora.memory.layer_binding import apply_policy
from longqlora.memory.plan import MemoryPlan
from longqlora.memory.policy import ActivationPolicy
from longqlora.model.adapter import attach_adapter, trainable_table
from longqlora.model.base import linear_layers, training_dtype
from longqlora.model.loss_binding import bind_chunked_loss
from longqlora.settings.config import Notice, Settings
from longqlora.training.arguments import RunArguments
from longqlora.training.dense_finish import num_sparse_steps
from longqlora.training.resume import resume_point

# What a GPU is taken to reach, for the hours of a run; as in script/plan_memory.py.
TFLOPS = 100


def dry_run(
    settings: Settings,
    arguments: RunArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: MemoryPlan,
    notices: list[Notice],
) -> None:
    """Train a small copy of `model`, which is on the meta device, for a step, and print what a run would do."""
    data = describe_data(settings, arguments, tokenizer, plan) if is_main_process() else []
    _, on_start = resume_point(settings, model)
    with warnings.catch_warnings():
        # PEFT and we ask transformers for things by their former names.
        warnings.simplefilter("ignore", FutureWarning)
        attention = rehearse(model, settings, plan.policy, num_steps=arguments.max_steps)
        model = model.to(training_dtype(arguments))
        if settings.adapter.finetuning_type == "qlora":
            # `trainable_table` names weights nf4 that a run would quantise: all linear layers but the output.
            for module in linear_layers(model).values():
                module.weight.quant_state = SimpleNamespace(shape=module.weight.shape)
        with torch.device("meta"):
            model = attach_adapter(model, settings.adapter)
    found = [*(notice.text for notice in notices), *data, attention, trainable_table(model)]
    print_main("\n".join([*found, *(notice.text for notice in on_start), "dry run: all settings are valid"]))


def describe_data(
    settings: Settings, arguments: RunArguments, tokenizer: PreTrainedTokenizerBase, plan: MemoryPlan
) -> list[str]:
    """Lines on the size of the training data, its first rows, and the steps and hours that they make."""
    size, accumulated = measure(tokenizer, settings.data), arguments.gradient_accumulation_steps
    together = arguments.per_device_train_batch_size * world_size() // settings.parallel.sequence_parallel_size
    round_off = math.floor if arguments.dataloader_drop_last else math.ceil
    num_batches = round_off(size.num_rows / max(1, together))
    steps = math.ceil(arguments.num_train_epochs * max(1, math.ceil(num_batches / accumulated)))
    about = "" if size.is_exact or arguments.max_steps > 0 else "about "
    steps = arguments.max_steps if arguments.max_steps > 0 else steps
    hours = steps * accumulated * plan.estimate.flops / (TFLOPS * 1e12) / 3600
    took = f", at most {hours:.3g} hours at {TFLOPS} TFLOP/s a GPU" if hours >= 0.01 else ""
    return [
        *(f"row {number}: {row}" for number, row in enumerate(size.shown, start=1)),
        f"{size.describe()}; {about}{steps:,} steps of {together * accumulated:,} rows{took}",
    ]


def rehearse(model: PreTrainedModel, settings: Settings, policy: ActivationPolicy, *, num_steps: int) -> str:
    """Train a small copy of `model` for one step as a run would; returns the description of its attention.

    With a dense finish one more step; num_steps: of the run, 0 or less where epochs decide.

    What a library below has against the model comes out here. Not rehearsed: NF4, DeepSpeed, rows shared by processes.
    Raises ValueError, naming the model type.
    """
    small, is_packed, part = tiny_copy(model, drops=True), settings.data.is_packed, settings.attention.dense_part
    options = settings.attention, settings.data.max_seq_length
    attention = bind_attention(small, *options, is_packed=is_packed)
    switch = bind_dense_finish(small, *options, is_packed=is_packed) if part else None
    inputs = trial_inputs(is_packed=is_packed)
    fix = "give another model_name_or_path, or change the setting that it names"
    with torch.random.fork_rng(devices=[]), refusing(model, "a step of training", fix):
        bind_chunked_loss(small)
        if policy.gradient_checkpointing:
            small.gradient_checkpointing_enable({"use_reentrant": False})
        small = attach_adapter(small, replace(settings.adapter, lora_rank=1))
        apply_policy(small, replace(policy, offload_activations=False), torch.device("cpu"))
        small.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        if switch:
            where = (
                f"step {num_sparse_steps(num_steps, part) + 1} of {num_steps}" if num_steps > 0 else "its last steps"
            )
            attention += f"\n{switch()} from {where} on (dense_finish: {part:g})"
            small(**inputs, labels=inputs["input_ids"]).loss.backward()
    return attention
