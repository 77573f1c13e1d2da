"""Decide the RoPE parameters that let a model read a given number of tokens.

Pure maths: works on plain values. A method is a row of `ROPE_METHODS`; the result is a `rope_parameters` dictionary
that stock transformers understands and saves. Throughout, s = target / original, d is the number of rotated dimensions
of a head, and dimension pair i turns at theta^(-2i/d) per position.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from longqlora.settings.config import ROPE_TYPES


@dataclass(frozen=True)
class Rope:
    """What a config says of RoPE, under the config's own names; lengths in tokens.

    original_max_position_embeddings, original_rope_theta: length and base of pretraining; None where the config does
    not say. Stock transformers scales `dynamic` RoPE from max_position_embeddings on, so there it stays the original.
    """

    rope_parameters: dict
    max_position_embeddings: int
    original_max_position_embeddings: int | None = None
    original_rope_theta: float | None = None

    @property
    def original_length(self) -> int:
        stated = self.original_max_position_embeddings or self.rope_parameters.get("original_max_position_embeddings")
        return stated or self.max_position_embeddings

    @property
    def context_length(self) -> int:
        """Tokens that the model reads.

        With `linear`, max_position_embeddings is the length reached where the config states a shorter original length
        (what is saved here), and else the original length, to be multiplied (LongLoRA, LongChat). YaRN's factor counts
        from the original length, which Qwen's configs repeat as max_position_embeddings.
        """
        rope_type, factor = self.rope_parameters.get("rope_type"), self.rope_parameters.get("factor") or 1.0
        length = self.max_position_embeddings
        if rope_type == "dynamic" or (rope_type == "linear" and self.original_length >= length):
            return round(length * factor)
        return max(length, round(self.original_length * factor)) if rope_type == "yarn" else length


@dataclass(frozen=True)
class RopeTarget:
    """What a method works from: s, the original length in tokens and base, rotated dimensions per head, a new base."""

    scale: float
    original: int
    theta: float
    rotary_dim: int
    new_theta: float | None

    @property
    def ntk_theta(self) -> float:
        if self.rotary_dim <= 2:
            raise ValueError(f"rope_type: ntk needs more than 2 rotated dimensions, the model has {self.rotary_dim}")
        return self.theta * self.scale ** (self.rotary_dim / (self.rotary_dim - 2))


# Each gives what its rope_parameters say beside the base of pretraining.
ROPE_METHODS: dict[str, Callable[[RopeTarget], dict]] = {
    # Position interpolation: position p is read as p / factor (arXiv 2306.15595, section 2.3), the factor a whole
    # number as upstream's.
    "linear": lambda rope: {"rope_type": "linear", "factor": float(math.ceil(rope.scale))},
    # NTK-aware scaling: a larger base, theta * s^(d / (d - 2)) (YaRN, arXiv 2309.00071, section 3.1). The fastest pair
    # keeps its frequency, the slowest is interpolated by s. Stock transformers sees plain RoPE with another base.
    "ntk": lambda rope: {"rope_theta": rope.ntk_theta, "rope_type": "default"},
    # Dynamic NTK: unscaled within the original length, and beyond it the base grows with the tokens read. In
    # transformers it is theta * (s n / original - (s - 1))^(d / (d - 2)) at n tokens.
    "dynamic": lambda rope: {"rope_type": "dynamic", "factor": rope.scale},
    # YaRN (arXiv 2309.00071, section 3.4): fast pairs kept, slow pairs interpolated, logits scaled by
    # (0.1 ln s + 1)^2; beta_fast 32 and beta_slow 1, as for Llama there.
    "yarn": lambda rope: {
        "rope_type": "yarn", "factor": rope.scale, "original_max_position_embeddings": rope.original,
    },
    # Llama 3.1's: wavelengths above the original length interpolated, those below a quarter of it kept, a smooth
    # passage between; the factors of its config.
    "llama3": lambda rope: {
        "rope_type": "llama3", "factor": rope.scale, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": rope.original,
    },
    # A base of the user's choice (adjusted base frequency, arXiv 2309.16039, section 4.1).
    "theta": lambda rope: {"rope_theta": float(rope.new_theta), "rope_type": "default"},
}  # fmt: skip
# Methods that a model comes with and that nobody can choose: their other parameters are the model's. The factor of
# LongRoPE (arXiv 2402.13753) decides the size of cos and sin alone; its lists have a factor for each pair.
OWN_METHODS = ("longrope", "proportional")
assert tuple(ROPE_METHODS) == ROPE_TYPES, "name each method in settings/config.py"


def scale_rope(
    rope: Rope, target: int, *, rotary_dim: int, rope_type: str | None = None, rope_theta: float | None = None
) -> Rope:
    """RoPE for `target` tokens. rope_type None is the method that scales the model already, else linear.

    Idempotent: the result follows from the original length and base and the target alone. A target within the present
    context changes nothing. Raises ValueError for a model whose RoPE is already scaled by another method (the two would
    have to be composed, which no method here defines).
    """
    parameters, present, original = rope.rope_parameters, rope.context_length, rope.original_length
    present_type = parameters.get("rope_type", "default")
    base = rope.original_rope_theta or parameters["rope_theta"]
    own = present_type if present_type in (*ROPE_METHODS, *OWN_METHODS) else None
    method = rope_type or own or "linear"
    # The stock types carry their name; a changed base does not, and shows by differing from the original one.
    is_scaled = present_type != "default" or base != parameters["rope_theta"]
    scaled_by = "theta" if present_type == "default" else present_type
    if is_scaled and scaled_by != ("theta" if method == "ntk" else method) and (rope_type or target > present):
        unknown = "give rope_type: ntk" if scaled_by == "theta" else f"lower model_max_length to at most {present}"
        raise ValueError(
            f"rope_type: the model's RoPE is already scaled by {scaled_by!r} to {present} tokens, and {method!r} does "
            f"not go on top; {'leave rope_type out, to go on by its own' if own else unknown}, or use attention: dca"
        )
    if target <= present and method != "theta":
        return rope
    aim = RopeTarget(target / original, original, base, rotary_dim, rope_theta)
    is_own = method in OWN_METHODS
    changes = {"rope_type": method, "factor": aim.scale} if is_own else ROPE_METHODS[method](aim)
    scaled = {"rope_theta": base, **changes}
    previous = parameters.get("factor", 1.0) if present_type == "linear" else 1.0
    if scaled.get("factor", previous) < previous:
        raise ValueError(
            f"the model is already interpolated by {previous:g}, yet {target} tokens over {original} need only "
            f"{scaled['factor']:g}; set original_max_position_embeddings in config.json to the length of pretraining"
        )
    # What else the model says of the same method (YaRN's betas) is its own; of another, only the rotated part.
    is_same = scaled["rope_type"] == present_type
    kept = {key for key in parameters if is_same or key == "partial_rotary_factor"}
    if is_same and method == "yarn" and is_yarn_default(parameters):
        kept -= {"attention_factor"}
    scaled |= {key: parameters[key] for key in kept - {"rope_theta", "rope_type", "factor"}}
    return Rope(scaled, original if method == "dynamic" else max(target, present), original, base)


def is_yarn_default(parameters: dict) -> bool:
    """Whether attention_factor, where `parameters` have it, is what YaRN takes for their factor, so follows it."""
    stated, factor = parameters.get("attention_factor"), parameters.get("factor") or 1.0
    return stated is not None and math.isclose(stated, 0.1 * math.log(factor) + 1, rel_tol=1e-6)
