"""How a training run spends memory on activations: chosen by one word, or by a key for each part.

    memory: auto | fast | balanced | max_length

docs/memory.md says what each word means; auto is the fastest of CANDIDATES that fits the GPU (plan.py).
Without `memory`, `gradient_checkpointing` decides as in transformers. A part set by its own key overrules the policy.
"""

from dataclasses import dataclass, replace

from transformers import TrainingArguments

from longqlora.settings.config import MEMORY_POLICIES

# transformers 5 renamed it.
IS_RENAMED = hasattr(TrainingArguments, "activation_checkpointing")
CHECKPOINTING_KEY = "activation_checkpointing" if IS_RENAMED else "gradient_checkpointing"


@dataclass(frozen=True)
class ActivationPolicy:
    """Without layer_function, only gradient_checkpointing counts.

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

    def as_settings(self) -> list[str]:
        """The fewest lines of a YAML that ask for it."""
        if not self.layer_function:
            return [f"{CHECKPOINTING_KEY}: {str(self.gradient_checkpointing).lower()}"]
        names = ("keep_activations", "tile_size", "num_head_chunks", "offload_activations")
        options = []
        for word, policy in POLICIES.items():
            changed = [name for name in names if getattr(self, name) != getattr(policy, name)]
            options.append([f"memory: {word}", *(f"{name}: {str(getattr(self, name)).lower()}" for name in changed)])
        return min(options, key=len)


STOCK = ActivationPolicy(layer_function=False)
CHECKPOINTED = ActivationPolicy(layer_function=False, gradient_checkpointing=True)
FAST = ActivationPolicy(keep_activations="all")
BALANCED = ActivationPolicy()
MAX_LENGTH = replace(BALANCED, offload_activations=True, tile_size=1024, num_head_chunks=4, optim="paged_adamw_8bit")
POLICIES = {"fast": FAST, "balanced": BALANCED, "max_length": MAX_LENGTH}
assert ("auto", *POLICIES) == MEMORY_POLICIES, "name each policy in settings/config.py"
# What `auto` chooses from, each leaner than the one before it.
CANDIDATES = (
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
