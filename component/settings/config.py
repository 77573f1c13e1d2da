"""Every key of the training YAML that is ours, by section; the section `training` is transformers' TrainingArguments.

Imports nothing, so that a YAML can be read before torch is. A field's `help` and `choices` make docs/settings.md.
"""

from dataclasses import dataclass, field

ROPE_TYPES = ("linear", "ntk", "dynamic", "yarn", "llama3", "theta")
ATTENTIONS = ("s2", "full", "dca")
FINETUNING_TYPES = ("qlora", "lora", "full")
# train_embedding: the input embedding alone.
INPUT = "input"
MEMORY_POLICIES = ("auto", "fast", "balanced", "max_length")
# keep_activations: each with those before it.
KEPT = ("input", "attention", "projections", "all")
PROMPT_TEMPLATES = ("vicuna_v1.1", "vicuna_v1.1_fastchat", "chat_template")
DEFAULT_PROMPT_TEMPLATE = "vicuna_v1.1"


@dataclass
class ModelConfig:
    """The base model."""

    model_name_or_path: str = field(metadata={"help": "folder or hub name of the base model"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the model; only for sources you trust"}
    )


@dataclass
class ContextConfig:
    """The context length to reach and the way there."""

    model_max_length: int | None = field(
        default=None, metadata={"help": "context length after training, in tokens; None keeps the model's own"}
    )
    rope_type: str | None = field(
        default=None,
        metadata={
            "help": "RoPE scaling: linear (PI), ntk, dynamic, yarn, llama3 or theta; "
            "None is linear, and RoPE unchanged with attention: dca"
        },
    )
    rope_theta: float | None = field(default=None, metadata={"help": "the new base, with rope_type: theta only"})


@dataclass
class AttentionConfig:
    """Attention during training; evaluation is dense after s2 and full, and dual chunk attention after dca."""

    attention: str = field(
        default="s2",
        metadata={
            "help": "s2 (shift-short attention), full, or dca (dual chunk attention, also after training)",
            "choices": ATTENTIONS,
        },
    )
    group_size_ratio: float = field(
        default=0.25, metadata={"help": "S2-Attn group size as a part of max_seq_length (the papers use 1/4)"}
    )
    use_flash_attn: bool = field(
        default=False, metadata={"help": "use the flash-attn package, which must be installed; else torch's SDPA"}
    )
    pretraining_length: int | None = field(
        default=None, metadata={"help": "dca: tokens that RoPE covers; default: the model's context"}
    )
    dca_chunk_size: int | None = field(
        default=None, metadata={"help": "dca: largest distance within chunks; default: 3/4 of pretraining_length"}
    )
    dca_local_window: int | None = field(
        default=None, metadata={"help": "dca: overlap of chunks in tokens; default: 1/8 of pretraining_length"}
    )
    dca_mscale: bool = field(
        default=False, metadata={"help": "dca: scale the logits with the logarithm of the length, as its authors can"}
    )

    def group_size(self, max_seq_length: int) -> int:
        """Tokens per S2-Attn group, rounded down to an even number; fixed for the whole run."""
        if not 0 < self.group_size_ratio <= 1:
            raise ValueError(f"group_size_ratio: must lie in (0, 1], got {self.group_size_ratio}; the papers use 0.25")
        return int(max_seq_length * self.group_size_ratio) // 2 * 2


@dataclass
class AdapterConfig:
    """Which weights are trained."""

    finetuning_type: str = field(
        default="qlora",
        metadata={"help": "qlora (4-bit base), lora (16-bit base) or full", "choices": FINETUNING_TYPES},
    )
    lora_rank: int = field(default=64, metadata={"help": "rank of the LoRA matrices"})
    lora_alpha: float = field(default=16, metadata={"help": "LoRA scale numerator: the update is alpha / rank * B A"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the input of the LoRA matrices"})
    target_modules: str | None = field(
        default=None, metadata={"help": "comma-separated names of linear layers; default: all but the output layer"}
    )
    train_embedding: bool | str = field(
        default=False,
        metadata={"help": "true: train input and output embeddings in full; input: the former alone, as LongLoRA does"},
    )
    train_norm: bool = field(default=False, metadata={"help": "train the norm layers in full"})

    def __post_init__(self) -> None:
        if self.finetuning_type not in FINETUNING_TYPES:
            raise ValueError(f"finetuning_type: {self.finetuning_type!r} is not one of {', '.join(FINETUNING_TYPES)}")
        if self.train_embedding not in (True, False, INPUT):
            raise ValueError(f"train_embedding: {self.train_embedding!r} is not true, false or {INPUT}")
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank: must be at least 1, got {self.lora_rank}")
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha: must be positive, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: must lie in [0, 1), got {self.lora_dropout}")


@dataclass
class MemoryConfig:
    """What is given up for memory: time, and host memory."""

    memory: str | None = field(
        default=None,
        metadata={
            "help": "memory policy: auto (the fastest that fits), fast, balanced, max_length; default: none, "
            "gradient_checkpointing decides",
            "choices": MEMORY_POLICIES,
        },
    )
    layer_function: bool | None = field(
        default=None,
        metadata={"help": "train each decoder layer as one function that works in tiles; default: by the policy"},
    )
    keep_activations: str | None = field(
        default=None,
        metadata={
            "help": "layer_function: what is kept of each layer for the backward pass: input, attention "
            "(and its output), projections (and queries, keys, values), all (and the MLP's inner products)",
            "choices": KEPT,
        },
    )
    tile_size: int | None = field(default=None, metadata={"help": "layer_function: tokens computed at a time"})
    num_head_chunks: int | None = field(
        default=None, metadata={"help": "layer_function: parts in which attention and its projections are computed"}
    )
    offload_activations: bool | None = field(
        default=None, metadata={"help": "layer_function: keep activations in host memory between forward and backward"}
    )
    gpu_memory: str | None = field(
        default=None, metadata={"help": "memory to plan for, such as 32GiB; default: that of the GPU at hand"}
    )

    def __post_init__(self) -> None:
        for name, choices in (("memory", MEMORY_POLICIES), ("keep_activations", KEPT)):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}")
        for name in ("tile_size", "num_head_chunks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")


@dataclass
class SequenceParallelConfig:
    """How many processes share one row."""

    sequence_parallel_size: int = field(
        default=1,
        metadata={"help": "processes that share each row (Ulysses); divides their number and the attention heads"},
    )

    def __post_init__(self) -> None:
        if self.sequence_parallel_size < 1:
            raise ValueError(f"sequence_parallel_size: must be at least 1, got {self.sequence_parallel_size}")


@dataclass
class DataConfig:
    """What to train on and how it is cut into rows. The fields are keys of the training YAML."""

    train_file: str = field(metadata={"help": 'jsonl: {"text"} rows, or conversations where sft is true.'})
    eval_file: str | None = field(default=None, metadata={"help": "jsonl of the same form, for the evaluation loss."})
    sft: bool = field(default=False, metadata={"help": "Rows are conversations; only the answers are learned."})
    max_seq_length: int = field(default=8192, metadata={"help": "Most tokens of a row; longer rows are cut."})
    pack: bool = field(
        default=False,
        metadata={"help": "Fill rows with several documents, kept apart, and split long documents, not cut them."},
    )
    prompt_template: str = field(
        default=DEFAULT_PROMPT_TEMPLATE,
        metadata={"help": f"Form of the conversations where sft is true: {', '.join(PROMPT_TEMPLATES)}."},
    )
    preprocessing_num_workers: int = field(default=1, metadata={"help": "Processes that tokenise."})
    data_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for tokenised files; default: the Hugging Face datasets cache."}
    )

    def __post_init__(self) -> None:
        for name, least in (("max_seq_length", 2), ("preprocessing_num_workers", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: {value!r} is not a whole number of at least {least}; give one")
        if self.prompt_template not in PROMPT_TEMPLATES:
            known = ", ".join(PROMPT_TEMPLATES)
            raise ValueError(f"prompt_template: unknown template {self.prompt_template!r}; use one of {known}")


@dataclass
class OutputConfig:
    """Where a run writes and what becomes of an earlier run there."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "replace the results of an earlier run in output_dir as soon as this run has its own"},
    )


@dataclass
class LogConfig:
    """Where the events go."""

    logging_dir: str | None = field(
        default=None, metadata={"help": "folder of the tensorboard events; default: tensorboard/ in output_dir"}
    )
