"""The memory policy: which mechanisms a training run uses, by one word or one by one.

    memory: auto | fast | balanced | max_length

- fast: everything that a product computed is kept for the backward pass; nothing is made twice.
- balanced: attention's output is kept, the rest of a layer is made again.
- max_length: like balanced, with what is kept in host memory, attention in chunks of heads and a paged 8-bit
  optimizer.
- auto: the fastest of LADDER that fits the GPU (memory_plan.py).

Without `memory`, `gradient_checkpointing` decides as in transformers. A mechanism that is set by its own key
overrules the policy.
"""

from dataclasses import dataclass, field, fields, replace

from component.layer_call import KEPT

POLICY_NAMES = ("auto", "fast", "balanced", "max_length")


@dataclass
class MemoryConfig:
    """What is given up for memory: time, and host memory."""

    memory: str | None = field(
        default=None,
        metadata={
            "help": "memory policy: auto (the fastest that fits), fast, balanced, max_length; default: none, "
            "gradient_checkpointing decides",
            "choices": POLICY_NAMES,
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
        for name, choices in (("memory", POLICY_NAMES), ("keep_activations", KEPT)):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}")
        for name in ("tile_size", "num_head_chunks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")

    def own_mechanisms(self) -> dict[str, object]:
        """Mechanisms set by their own key."""
        names = [mechanism.name for mechanism in fields(Mechanisms)]
        return {name: getattr(self, name) for name in names if getattr(self, name, None) is not None}

    def without_effect(self, *, is_on_gpu: bool, num_kv_heads: int) -> list[str]:
        """Notices of mechanisms that were asked for by name and cannot do what they say."""
        notices = []
        if self.offload_activations and not is_on_gpu:
            notices.append("offload_activations has no effect without a GPU: activations are in host memory as it is")
        if self.num_head_chunks and self.num_head_chunks > num_kv_heads:
            notices.append(f"num_head_chunks: {self.num_head_chunks} acts as {num_kv_heads}, the key/value heads")
        return notices


@dataclass(frozen=True)
class Mechanisms:
    """How a run spends memory. Without layer_function, only gradient_checkpointing counts.

    optim: the optimizer that goes with it on a GPU where the user names none; None for the default.
    """

    layer_function: bool = True
    keep_activations: str = "attention"
    tile_size: int = 2048
    num_head_chunks: int = 1
    offload_activations: bool = False
    gradient_checkpointing: bool = False
    optim: str | None = None

    def describe(self) -> str:
        if not self.layer_function:
            return f"gradient checkpointing {'on' if self.gradient_checkpointing else 'off'}, layers as in transformers"
        parts = [f"layer function, tiles of {self.tile_size} tokens", f"{self.keep_activations} kept"]
        parts += [f"{self.num_head_chunks} head chunks"] if self.num_head_chunks > 1 else []
        parts += ["in host memory"] if self.offload_activations else []
        return ", ".join(parts + ([self.optim] if self.optim else []))


STOCK = Mechanisms(layer_function=False)
CHECKPOINTED = Mechanisms(layer_function=False, gradient_checkpointing=True)
FAST = Mechanisms(keep_activations="all")
BALANCED = Mechanisms()
MAX_LENGTH = Mechanisms(
    keep_activations="attention", offload_activations=True, tile_size=1024, num_head_chunks=4, optim="paged_adamw_8bit"
)
POLICIES = {"fast": FAST, "balanced": BALANCED, "max_length": MAX_LENGTH}
# From the fastest to the one that reaches furthest.
LADDER = (
    FAST,
    replace(FAST, keep_activations="projections"),
    BALANCED,
    replace(BALANCED, keep_activations="input"),
    replace(BALANCED, offload_activations=True),
    replace(MAX_LENGTH, num_head_chunks=1, keep_activations="input"),
    MAX_LENGTH,
    replace(MAX_LENGTH, keep_activations="input"),
    replace(MAX_LENGTH, num_head_chunks=8, keep_activations="input"),
)
# Models whose layers the layer function does not know.
STOCK_LADDER = (STOCK, CHECKPOINTED)
