"""Every key of the training YAML that is ours, by section; the section `training` is transformers' TrainingArguments.

Imports nothing heavy, so that a YAML can be read before torch is. The help texts make docs/settings.md.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from types import MappingProxyType
from typing import Any

# Label of a token that is not to be predicted.
IGNORE_INDEX = -100
ROPE_TYPES = ("linear", "ntk", "dynamic", "yarn", "llama3", "theta")
ATTENTIONS = ("s2", "full", "dca")
FINETUNING_TYPES = ("qlora", "lora", "full")
# train_embedding: the input embedding alone.
INPUT = "input"
# dca_mscale: the factor of the logarithm in the authors' two files, by their names: flash_decoding_chunkllama.py
# (ChunkLlama commit 4bee63c), as in YaRN, and chunkllama_attn_replace.py (847ae71), the newest.
MSCALES = {"flash_decoding": 0.1, "attn_replace": 0.05}
DEFAULT_MSCALE = "flash_decoding"
MEMORY_POLICIES = ("auto", "fast", "balanced", "max_length")
# keep_activations: each with those before it.
KEPT = ("input", "attention", "projections", "all")
PROMPT_TEMPLATES = ("vicuna_v1.1", "vicuna_v1.1_fastchat", "llama2", "chat_template")
DEFAULT_PROMPT_TEMPLATE = "vicuna_v1.1"
# pack: rows in which documents attend to those before them.
JOIN = "join"
MAX_PASSES = 1000
MAX_RANK, MAX_WORKERS, MAX_BATCH_SIZE, MAX_STEPS, MAX_EPOCHS = 2**16, 512, 2**20, 10**9, 10**6
# org/name[:split] of the hub, and no path of a file that is not there.
HUB_NAME = re.compile(r"(?!.*\.(jsonl?|parquet|csv|txt|bin|gz|zip|zst)(:|$))[\w.-]+/[\w.-]+(:[\w.%:+\[\]-]+)?")

# What a value must be, in words and as a test.
Limit = tuple[str, Callable[[Any], bool]]


def one_of(choices: Sequence) -> Limit:
    return f"one of {', '.join(choices)}", lambda value: value in choices


def at_least(least: int, most: int = 2**31 - 1) -> Limit:
    """`most`: above what any machine holds, so that a slip of the keyboard allocates nothing."""
    text = f"a whole number of at least {least} and at most {most:,}"
    return text, lambda value: type(value) is int and least <= value <= most


MSCALE_CHOICES = (
    f"true, false, {' or '.join(MSCALES)}",
    lambda value: isinstance(value, bool) or value in MSCALES,
)
PART = "in [0, 1)", lambda value: 0 <= value < 1
# Keys of the section `training` that this trainer does not support, and what to do instead.
UNSUPPORTED = {
    "fsdp": "use deepspeed to shard", "fsdp_config": "use deepspeed to shard",
    "parallelism_config": "set sequence_parallel_size",
    "use_liger_kernel": "the loss is computed in chunks without it",
}  # fmt: skip
LIMITS = {name: limit for names, limit in {
    "learning_rate warmup_steps weight_decay max_grad_norm adam_epsilon logging_steps save_steps eval_steps":
        ("0 or more", lambda value: value >= 0),
    "dataloader_num_workers": at_least(0, MAX_WORKERS),
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps": at_least(1, MAX_BATCH_SIZE),
    "save_total_limit": at_least(1),
    "num_train_epochs": (f"at most {MAX_EPOCHS:,}", lambda value: value <= MAX_EPOCHS),
    "adam_beta1 adam_beta2": PART,
    "seed data_seed": ("in [0, 2**32)", lambda value: 0 <= value < 2**32),
    "max_steps":
        (f"positive, up to {MAX_STEPS:,}, or -1 for whole epochs", lambda value: value == -1 or 0 < value <= MAX_STEPS),
    "metric_for_best_model": ("measured; use eval_loss", lambda value: value in ("loss", "eval_loss")),
    "hub_strategy": ("end: final/ alone is uploaded, after training", lambda value: value == "end"),
    "lr_scheduler_kwargs activation_checkpointing_kwargs gradient_checkpointing_kwargs":
        ("a mapping", lambda value: not isinstance(value, str)),
    **{key: (f"supported; leave it out ({fix})", lambda value: not value) for key, fix in UNSUPPORTED.items()},
}.items() for name in names.split()}  # fmt: skip

# Keys that a resumed run may change without a warning: no loss depends on them.
CHANGES_NO_LOSS = {
    "resume_from_checkpoint", "overwrite_output_dir", "output_dir", "save_steps", "save_total_limit", "save_strategy",
    "logging_steps", "logging_dir", "disable_tqdm", "report_to", "dataloader_num_workers", "dataloader_pin_memory",
    "local_rank", "gpu_memory", "data_cache_dir", "preprocessing_num_workers", "run_name", "push_to_hub",
    "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token",
}  # fmt: skip


def check_limit(name: str, value: Any, limit: Limit | None) -> None:
    """Raise ValueError naming the key and the value where it is beyond the limit. None never is."""
    if limit and value is not None and not limit[1](value):
        raise ValueError(f"{name}: {value!r} is not {limit[0]}")


def key(default: Any, text: str, limit: Limit | None = None) -> Any:
    """A field with its help text; MISSING: it must be given."""
    return field(default=default, metadata={"help": text, "limit": limit})


@dataclass(frozen=True)
class Section:
    """Keys that belong together, each within its limit."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            check_limit(item.name, getattr(self, item.name), item.metadata["limit"])


@dataclass(frozen=True)
class ModelConfig(Section):
    """The base model."""

    model_name_or_path: str = key(MISSING, "folder or hub name of the base model")
    trust_remote_code: bool = key(False, "run code that comes with the model; only for sources you trust")


@dataclass(frozen=True)
class ContextConfig(Section):
    """The context length to reach and how."""

    model_max_length: int | None = key(None, "context length to reach in tokens; default: the model's own", at_least(1))
    rope_type: str | None = key(
        None,
        "RoPE scaling: linear (PI), ntk, dynamic, yarn, llama3 or theta; "
        "None is linear, and RoPE unchanged with attention: dca",
    )
    rope_theta: float | None = key(None, "the new base, with rope_type: theta only")


@dataclass(frozen=True)
class AttentionConfig(Section):
    """Attention during training; evaluation is dense after s2 and full, and dual chunk attention after dca."""

    attention: str = key(
        "s2", "s2 (shift-short attention), full, or dca (dual chunk attention, also after training)", one_of(ATTENTIONS)
    )
    group_size_ratio: float = key(
        0.25,
        "S2-Attn group size as a part of max_seq_length (the papers use 1/4)",
        ("in (0, 1]; the papers use 0.25", lambda value: 0 < value <= 1),
    )
    dense_finish: float = key(
        0.0,
        "s2: part of the steps, at the end, that train with full attention, so that every head sees every distance",
        ("in [0, 1]", lambda value: 0 <= value <= 1),
    )
    use_flash_attn: bool = key(False, "use the flash-attn package, which must be installed; else torch's SDPA")
    pretraining_length: int | None = key(None, "dca: tokens that RoPE covers; default: the model's context")
    dca_chunk_size: int | None = key(None, "dca: largest distance within chunks; default: 3/4 of pretraining_length")
    dca_local_window: int | None = key(None, "dca: overlap of chunks in tokens; default: 1/8 of pretraining_length")
    dca_mscale: bool | str = key(
        False,
        "dca: scale the logits with the logarithm of the length, as its authors can: flash_decoding (0.1; also true) "
        "or attn_replace (0.05), after their files",
        MSCALE_CHOICES,
    )

    @property
    def dense_part(self) -> float:
        """Part of the steps that a dense finish takes."""
        return self.dense_finish if self.attention == "s2" else 0.0

    def group_size(self, max_seq_length: int) -> int:
        """Tokens per S2-Attn group, rounded down to an even number; fixed for the whole run."""
        return int(max_seq_length * self.group_size_ratio) // 2 * 2


@dataclass(frozen=True)
class AdapterConfig(Section):
    """Which weights are trained."""

    finetuning_type: str = key("qlora", "qlora (4-bit base), lora (16-bit base) or full", one_of(FINETUNING_TYPES))
    lora_rank: int = key(64, "rank of the LoRA matrices", at_least(1, MAX_RANK))
    lora_alpha: float = key(16, "LoRA scale: the update is alpha / rank * B A", ("positive", lambda value: value > 0))
    lora_dropout: float = key(0.05, "dropout on the input of the LoRA matrices", PART)
    target_modules: str | None = key(None, "comma-separated names of linear layers; default: all but the output layer")
    train_embedding: bool | str = key(
        False,
        "true: train input and output embeddings in full; input: the former alone, as LongLoRA does",
        (f"true, false or {INPUT}", lambda value: value in (True, False, INPUT)),
    )
    train_norm: bool = key(False, "train the norm layers in full")


@dataclass(frozen=True)
class MemoryConfig(Section):
    """What is given up for memory: time, and host memory."""

    memory: str | None = key(
        None,
        "memory policy: auto (the fastest that fits), fast, balanced, max_length; default: none, "
        "gradient_checkpointing decides",
        one_of(MEMORY_POLICIES),
    )
    layer_function: bool | None = key(None, "train each layer as one function, in tiles; default: by the policy")
    keep_activations: str | None = key(
        None,
        "layer_function: what is kept of each layer for the backward pass: input, attention (and its output), "
        "projections (and queries, keys, values), all (and the MLP's inner products)",
        one_of(KEPT),
    )
    tile_size: int | None = key(None, "layer_function: tokens computed at a time", at_least(1))
    num_head_chunks: int | None = key(None, "layer_function: parts of attention and its projections", at_least(1))
    offload_activations: bool | None = key(None, "layer_function: keep activations in host memory until backward")
    gpu_memory: str | None = key(None, "memory to plan for, such as 32GiB; default: that of this machine's GPU")

    @property
    def parts(self) -> dict[str, Any]:
        """The parts of an activation policy that are set by their own key."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("memory", "gpu_memory")}
        return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class SequenceParallelConfig(Section):
    """How many processes share one row."""

    sequence_parallel_size: int = key(
        1, "processes that share each row (Ulysses); divides their number and the attention heads", at_least(1)
    )


@dataclass(frozen=True)
class DataConfig(Section):
    """What to train on and how it is cut into rows."""

    train_file: str | list[str] = key(
        MISSING,
        'Rows {"text"}, or conversations where sft is true: a .jsonl, .json (array) or .parquet file, a glob, '
        "org/name[:split] of the hub, or a list of these.",
    )
    eval_file: str | list[str] | None = key(None, "Rows of the same form, for the evaluation loss.")
    train_file_weights: list[float] | None = key(
        None,
        "Passes over each source of train_file in an epoch: 2 takes it twice, 0.5 a random half (by seed, the same in "
        "each epoch); default: 1 each.",
        (
            f"a list of numbers above 0 and up to {MAX_PASSES}",
            lambda value: value and all(type(x) in (int, float) and 0 < x <= MAX_PASSES for x in value),
        ),
    )
    sft: bool = key(False, "Rows are conversations; only the answers are learned.")
    max_seq_length: int = key(8192, "Most tokens of a row; longer rows are cut.", at_least(2))
    pack: bool | str = key(
        False,
        "true: fill rows with several documents, kept apart, and split long documents, not cut them; "
        f"{JOIN}: the same, but each attends to those before it in the row, as in LongLoRA.",
        (f"true, false or {JOIN}", lambda value: value in (True, False, JOIN)),
    )
    prompt_template: str | None = key(
        None,
        f"Form of the conversations where sft is true: {', '.join(PROMPT_TEMPLATES)}; default: chat_template where the "
        f"tokenizer has one, else {DEFAULT_PROMPT_TEMPLATE}.",
        one_of(PROMPT_TEMPLATES),
    )
    preprocessing_num_workers: int = key(1, "Processes that tokenise.", at_least(1, MAX_WORKERS))
    data_cache_dir: str | None = key(None, "Folder for tokenised files; default: the Hugging Face datasets cache.")

    def __post_init__(self) -> None:
        super().__post_init__()
        num_weights, num_sources = len(self.train_file_weights or ()), len(self.files["train_file"])
        if num_weights not in (0, num_sources):
            text = f"{num_weights} numbers for {num_sources} source(s) of train_file; give one for each"
            raise ValueError(f"train_file_weights: {text}")

    @property
    def files(self) -> dict[str, list[str]]:
        """The sources of the run by their keys."""
        files = {"train_file": self.train_file, "eval_file": self.eval_file}
        return {name: [value] if isinstance(value, str) else value for name, value in files.items() if value}

    @property
    def is_packed(self) -> bool:
        """Whether rows hold several documents that are kept apart."""
        return self.pack is True


@dataclass(frozen=True)
class OutputConfig(Section):
    """Where a run writes, and whether it may replace an earlier run there."""

    overwrite_output_dir: bool = key(False, "replace an earlier run's results in output_dir once this run has its own")
    logging_dir: str | None = key(None, "folder of the tensorboard events; default: tensorboard/ in output_dir")


@dataclass(frozen=True)
class Settings:
    """All settings of a run; a change makes new ones.

    training: keywords of TrainingArguments; given: what the user gave, by key; uses_gpu: whether a GPU trains.
    """

    model: ModelConfig
    context: ContextConfig
    attention: AttentionConfig
    adapter: AdapterConfig
    memory: MemoryConfig
    parallel: SequenceParallelConfig
    data: DataConfig
    output: OutputConfig
    # They may hold hub_token.
    training: Mapping[str, Any] = field(repr=False)
    given: Mapping[str, Any] = field(repr=False)
    uses_gpu: bool

    def __post_init__(self) -> None:
        for name, value in self.training.items():
            check_limit(name, value, LIMITS.get(name))
        for name in ("training", "given"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def with_training(self, **changes) -> "Settings":
        """The same with some keywords of TrainingArguments changed."""
        return dataclasses.replace(self, training={**self.training, **changes})

    def as_dict(self) -> dict[str, dict]:
        """Sections as plain values for a record on disk, without the secret among them."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        return {**sections, "training": {k: value for k, value in self.training.items() if k != "hub_token"}}


SECTIONS = {item.name: item.type for item in dataclasses.fields(Settings) if dataclasses.is_dataclass(item.type)}


@dataclass(frozen=True)
class Notice:
    """A line for the log on what became of a setting, with its level there."""

    text: str
    level: int = logging.INFO


def warning(text: str) -> Notice:
    """A notice that a setting does not do what its words say."""
    return Notice(text, logging.WARNING)
