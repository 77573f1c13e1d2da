"""Settings that contradict each other, the model or the data: refused, or named as without effect.

Everything here reads, and runs before weights are loaded and before anything is written. In the order of a start:
check_settings, check_model, check_data, check_num_rows.
"""

import math
import os
from dataclasses import replace
from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations

from longqlora.attention.binding import check_attention, flash_kernel
from longqlora.data.dataset import check_sources
from longqlora.data.prompt import CHAT_TEMPLATE, eos_id, prompt_template_for
from longqlora.distributed import is_main_process, world_size
from longqlora.memory.estimate import ModelShape
from longqlora.model.adapter import frozen_experts_notice, target_module_names
from longqlora.model.base import check_vocabulary, routers
from longqlora.model.context import context_length, rope_of
from longqlora.model.weight_files import check_base, weight_file
from longqlora.settings.config import DEFAULT_PROMPT_TEMPLATE, Notice, Settings, warning
from longqlora.training.arguments import RunArguments
from longqlora.training.resume import FINAL, list_checkpoints


def check_settings(settings: Settings) -> list[Notice]:
    """Refuse values that no run can have, and paths that it must not; returns notices of settings without effect."""
    if settings.attention.use_flash_attn:
        flash_kernel()
    training = settings.training
    if training.get("max_steps", -1) == -1 and training.get("num_train_epochs", 1) <= 0:
        raise ValueError(f"num_train_epochs: must be positive, got {training['num_train_epochs']}; or set max_steps")
    reporters, available = training.get("report_to") or [], [*get_available_reporting_integrations(), "all", "none"]
    for name in [reporters] if isinstance(reporters, str) else reporters:
        if name not in available:
            raise ValueError(f"report_to: {name!r} is unknown or not installed; choose from {', '.join(available)}")
    strategy = training.get("eval_strategy", "no")
    if evaluates(training) and not settings.data.eval_file:
        raise ValueError(f"eval_strategy: {strategy!r} has nothing to evaluate on; add eval_file, or leave it out")
    if training.get("save_strategy") == "best" and not evaluates(training):
        raise ValueError("save_strategy: 'best' needs an evaluation; set eval_strategy and eval_file")
    check_paths(settings)
    return settings_without_effect(settings)


def evaluates(training: dict) -> bool:
    return training.get("eval_strategy", "no") != "no" or bool(training.get("eval_on_start"))


def check_paths(settings: Settings) -> None:
    """Refuse folders that a file is in the way of, and inputs that the run would replace."""
    output_dir, cache = settings.training["output_dir"], settings.data.data_cache_dir
    folders = {"output_dir": output_dir, "logging_dir": settings.output.logging_dir, "data_cache_dir": cache}
    for key, value in folders.items():
        path = Path(value or ".")
        if file := next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None):
            raise ValueError(f"{key}: {value!r} cannot be a folder, since {str(file)!r} is a file; give another")
    inputs = {"model_name_or_path": [settings.model.model_name_or_path], **settings.data.files}
    for key, value in ((key, value) for key, values in inputs.items() for value in values):
        for place in (Path(output_dir, FINAL), *list_checkpoints(output_dir)):
            if value and Path(os.path.realpath(value)).is_relative_to(os.path.realpath(place)):
                text = f"{value!r} lies in {str(place)!r}, which this run replaces; choose another output_dir"
                raise ValueError(f"{key}: {text}")


def settings_without_effect(settings: Settings) -> list[Notice]:
    """A notice for each setting that was given but that nothing will read."""
    training, attention = settings.training, settings.attention.attention
    schedule = training.get("lr_scheduler_type", "linear")
    own_optimizer = (training.get("deepspeed") or {}).get("optimizer")
    lora = ["lora_rank", "lora_alpha", "lora_dropout", "target_modules", "train_embedding", "train_norm"]
    groups = [
        (f"attention: {attention}", attention != "s2", ["group_size_ratio", "dense_finish"]),
        ("attention: dca", attention == "dca", ["use_flash_attn"]),
        ("finetuning_type: full", settings.adapter.finetuning_type == "full", lora),
        ("sft: false", not settings.data.sft, ["prompt_template"]),
        ("no model_max_length", settings.context.model_max_length is None, ["rope_type", "rope_theta"]),
        ("no evaluation (eval_strategy)", not evaluates(training), ["eval_file", "eval_steps"]),
        (f"lr_scheduler_type: {schedule}", schedule == "constant", ["warmup_steps"]),
        ("max_steps", training.get("max_steps", -1) > 0, ["num_train_epochs"]),
        ("save_strategy: no", training.get("save_strategy") == "no", ["save_steps", "save_total_limit"]),
        ("an optimizer in the DeepSpeed file", bool(own_optimizer), ["optim"]),
        ("training that stops at the first loss that is not finite", True, ["logging_nan_inf_filter"]),
    ]
    return [
        warning(f"{key} has no effect with {cause}")
        for cause, holds, keys in groups
        for key in keys
        if holds and settings.given.get(key) not in (None, False)
    ]


def check_model(
    settings: Settings, config: PretrainedConfig, *, needs_weights: bool
) -> tuple[PreTrainedModel, list[Notice]]:
    """The model of `config`, in which RoPE was set, on the meta device, and notices; refuses what does not suit it.

    Base weights are checked by the headers of their files. needs_weights: whether a folder without any is an error.
    """
    name, trust = settings.model.model_name_or_path, settings.model.trust_remote_code
    length, wanted = settings.data.max_seq_length, settings.context.model_max_length
    if length > (context := min(context_length(config), wanted or math.inf)):
        raise ValueError(f"max_seq_length: {length} is beyond the context of {context}; set model_max_length: {length}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise ValueError(f"model_name_or_path: {name!r} is a {config.model_type}, no causal language model")
    if getattr(config, "quantization_config", None):
        raise ValueError(f"model_name_or_path: {name!r} is already quantised; give the model it was made from")
    model = check_base(name, config, trust_remote_code=trust, needs_weights=needs_weights)
    attention, size = settings.attention, settings.parallel.sequence_parallel_size
    check_sequence_parallel(size, config, attention=attention.attention, num_processes=world_size())
    check_attention(model, attention, length, size)
    notices = [*check_adapter(settings, model), *settings_known_to_lose(settings, config)]
    if Path(name).is_dir() and not weight_file(Path(name)):
        notices.append(Notice(f"model_name_or_path: {name!r} has no weights: a run would end here"))
    return model, notices


def settings_known_to_lose(settings: Settings, config: PretrainedConfig) -> list[Notice]:
    """A notice where sparse training leaves distances unlearned that dense evaluation reads."""
    rope, attention = rope_of(config).rope_parameters, settings.attention
    is_interpolated = rope.get("rope_type") == "linear" and rope["factor"] > 1
    if attention.attention != "s2" or attention.dense_finish or not is_interpolated:
        return []
    text = (
        "attention: s2 with rope_type: linear trains no distance beyond a group, which dense evaluation reads; a small "
        "model at 4 times its context has perplexity 12.6, with dense_finish: 0.1 10.0, with rope_type: yarn 7.8"
    )
    return [Notice(text)]


def check_sequence_parallel(size: int, config: PretrainedConfig, *, attention: str, num_processes: int) -> None:
    """Raise ValueError where `size` processes cannot share the rows of a model of `config`."""
    if size == 1:
        return
    shape, fault = ModelShape.of(config), None
    if attention == "dca":
        fault = "dual chunk attention needs whole rows; use attention: s2 or full"
    elif rope_of(config).rope_parameters.get("rope_type") == "dynamic":
        fault = "dynamic RoPE follows the length of whole rows, which no process sees; use another rope_type"
    elif num_processes % size:
        start = f"deepspeed --num_gpus {size} or torchrun --nproc_per_node {size}"
        fault = f"{size} does not divide the {num_processes} process(es) of this run; start it with {start}"
    elif shape.num_heads % size or (shape.num_kv_heads % size and size % shape.num_kv_heads):
        heads = f"{shape.num_heads} heads ({shape.num_kv_heads} key/value heads)"
        fault = f"{size} does not divide the model's {heads}; choose a divisor of both"
    if fault:
        raise ValueError(f"sequence_parallel_size: {fault}")


def check_adapter(settings: Settings, model: PreTrainedModel) -> list[Notice]:
    """Refuse an adapter that `model` has no place for; a notice on layers that it leaves as they are."""
    kind, targets = settings.adapter.finetuning_type, settings.adapter.target_modules
    if kind == "full":
        return []
    if kind == "qlora" and (more_than_linear := routers(model)):
        name = type(next(iter(more_than_linear.values()))).__name__
        layers = f"{model.config.model_type} has linear layers with more to them ({name})"
        raise ValueError(f"finetuning_type: {layers}, which a 4-bit base would replace; use lora")
    if not target_module_names(model, targets):
        raise ValueError(f"target_modules: {targets!r} names no layer; leave it out for all")
    return [Notice(text) for text in frozen_experts_notice(model)]


def check_data(
    settings: Settings, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Settings, list[Notice]]:
    """Settings with the prompt template that is taken, and a notice of it where none was given.

    Refuses a tokenizer without EOS, without the chat template asked for, or made for another model; then, on the first
    process, the first bad row of the data files.
    """
    eos_id(tokenizer)
    asked, notices = settings.data.prompt_template, []
    template = prompt_template_for(tokenizer, asked) if settings.data.sft else asked or DEFAULT_PROMPT_TEMPLATE
    if settings.data.sft and not asked:
        why = "the tokenizer's own" if template == CHAT_TEMPLATE else "the tokenizer has no chat template"
        notices.append(Notice(f"prompt_template: {template} ({why}; none was given)"))
    settings = replace(settings, data=replace(settings.data, prompt_template=template))
    check_vocabulary(tokenizer, config.vocab_size, settings.model.model_name_or_path)
    if is_main_process():
        check_sources(tokenizer, settings.data)
    return settings, notices


def check_num_rows(
    arguments: RunArguments, num_rows: int, num_eval_rows: int | None, *, processes_per_row: int
) -> None:
    """Refuse rows that do not make one batch of all processes, where dataloader_drop_last leaves out a part of one."""
    if not arguments.dataloader_drop_last:
        return
    for key, rows, together in (
        ("train", num_rows, arguments.train_batch_size * arguments.world_size // processes_per_row),
        ("eval", num_eval_rows, arguments.eval_batch_size * arguments.world_size),
    ):
        if rows is not None and rows < together:
            text = f"{key}_file makes {rows} rows, a batch of all processes takes {together}"
            raise ValueError(f"dataloader_drop_last: {text}; leave it out, or lower per_device_{key}_batch_size")
