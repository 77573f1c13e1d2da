"""Decide the RoPE parameters that let a model read `model_max_length` tokens.

Pure maths: works on plain values, knows nothing of transformers. A method is a row of `ROPE_METHODS`; the
result is a `rope_parameters` dictionary that stock transformers understands and saves.

Throughout, s = target / original, d is the number of rotated dimensions of a head, and dimension pair
i turns at theta^(-2i/d) per position.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from longqlora.settings.config import ROPE_TYPES


@dataclass(frozen=True)
class RopeDecision:
    """What to write into a config.

    rope_parameters: dictionary for `config.rope_parameters`.
    original_max_position_embeddings, original_rope_theta: length (tokens) and base of pretraining.
    max_position_embeddings: for `config`, in tokens; stock transformers scales `dynamic` RoPE from this
    length on, so there it stays the original one.
    context_length: tokens that the scaled model reads.
    """

    rope_parameters: dict
    original_max_position_embeddings: int
    original_rope_theta: float
    max_position_embeddings: int
    context_length: int


@dataclass(frozen=True)
class RopeTarget:
    """What a method works from: lengths in tokens, the base of pretraining, rotated dimensions per head."""

    original: int
    target: int
    theta: float
    rotary_dim: int
    new_theta: float | None = None

    @property
    def scale(self) -> float:
        return self.target / self.original


def linear(rope: RopeTarget) -> dict:
    """Position interpolation: position p is read as p / factor (arXiv 2306.15595, section 2.3).

    The factor is rounded up to a whole number, as upstream does.
    """
    return {"rope_theta": rope.theta, "rope_type": "linear", "factor": float(math.ceil(rope.scale))}


def ntk(rope: RopeTarget) -> dict:
    """NTK-aware scaling: a larger base, theta * s^(d / (d - 2)) (YaRN, arXiv 2309.00071, section 3.1).

    The fastest pair keeps its frequency, the slowest is interpolated by s. Stock transformers sees
    plain RoPE with another base.
    """
    if rope.rotary_dim <= 2:
        raise ValueError(f"rope_type: ntk needs more than 2 rotated dimensions, the model has {rope.rotary_dim}")
    exponent = rope.rotary_dim / (rope.rotary_dim - 2)
    return {"rope_theta": rope.theta * rope.scale**exponent, "rope_type": "default"}


def dynamic(rope: RopeTarget) -> dict:
    """Dynamic NTK: unscaled within the original length, and beyond it the base grows with the tokens read.

    transformers' convention: at n tokens the base is theta * (s n / original - (s - 1))^(d / (d - 2)).
    """
    return {"rope_theta": rope.theta, "rope_type": "dynamic", "factor": rope.scale}


def yarn(rope: RopeTarget) -> dict:
    """YaRN (arXiv 2309.00071, section 3.4): fast pairs kept, slow pairs interpolated, logits scaled by
    (0.1 ln s + 1)^2; beta_fast 32 and beta_slow 1, as for Llama there."""
    return {
        "rope_theta": rope.theta,
        "rope_type": "yarn",
        "factor": rope.scale,
        "original_max_position_embeddings": rope.original,
    }


def llama3(rope: RopeTarget) -> dict:
    """Llama 3.1's method: wavelengths above the original length interpolated, those below a quarter of it
    kept, a smooth passage between (low_freq_factor 1, high_freq_factor 4, as in its config)."""
    return {
        "rope_theta": rope.theta,
        "rope_type": "llama3",
        "factor": rope.scale,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": rope.original,
    }


def theta(rope: RopeTarget) -> dict:
    """A base of the user's choice (adjusted base frequency, arXiv 2309.16039, section 4.1)."""
    if rope.new_theta is None:
        raise ValueError("rope_theta: rope_type: theta needs the new base, for example rope_theta: 500000")
    return {"rope_theta": float(rope.new_theta), "rope_type": "default"}


ROPE_METHODS: dict[str, Callable[[RopeTarget], dict]] = {
    "linear": linear,
    "ntk": ntk,
    "dynamic": dynamic,
    "yarn": yarn,
    "llama3": llama3,
    "theta": theta,
}
assert tuple(ROPE_METHODS) == ROPE_TYPES, "name each method in settings/config.py"


def context_of_rope(
    rope_parameters: dict, max_position_embeddings: int, original_max_position_embeddings: int | None = None
) -> int:
    """Tokens that a model reads whose config says so.

    With `linear`, max_position_embeddings is the length reached where the config states a shorter original length
    (what is saved here), and else the original length, to be multiplied (LongLoRA, LongChat). YaRN's factor counts
    from the original length, which Qwen's configs repeat as max_position_embeddings.
    """
    rope_type, factor = rope_parameters.get("rope_type"), rope_parameters.get("factor") or 1.0
    original = original_max_position_embeddings or rope_parameters.get("original_max_position_embeddings")
    original = original or max_position_embeddings
    if rope_type == "dynamic" or (rope_type == "linear" and original >= max_position_embeddings):
        return round(max_position_embeddings * factor)
    if rope_type == "yarn":
        return max(max_position_embeddings, round(original * factor))
    return max_position_embeddings


def check_rope_request(rope_type: str | None, rope_theta: float | None, model_max_length: int | None) -> None:
    """Raise ValueError, naming the setting, for what no method can mean."""
    if rope_type is not None and rope_type not in ROPE_METHODS:
        raise ValueError(f"rope_type: {rope_type!r} is not one of {', '.join(ROPE_METHODS)}")
    if rope_theta is not None and rope_type != "theta":
        raise ValueError("rope_theta: has an effect with rope_type: theta only; set that, or leave rope_theta out")
    if rope_type == "theta" and rope_theta is None:
        raise ValueError("rope_theta: rope_type: theta needs the new base, for example rope_theta: 500000")
    if rope_theta is not None and not 1 < rope_theta < math.inf:
        raise ValueError(f"rope_theta: must be a finite number above 1, got {rope_theta}")
    if model_max_length is not None and model_max_length < 1:
        raise ValueError(f"model_max_length: must be at least 1, got {model_max_length}")


def scale_rope(
    rope_parameters: dict,
    *,
    max_position_embeddings: int,
    rotary_dim: int,
    model_max_length: int,
    rope_type: str | None = None,
    rope_theta: float | None = None,
    original_max_position_embeddings: int | None = None,
    original_rope_theta: float | None = None,
) -> RopeDecision:
    """Return the RoPE parameters for `model_max_length` tokens; all lengths are in tokens.

    Idempotent: the result follows from the original length and base and the target alone, so deciding
    on an already scaled model gives the same answer. A target within the present context changes
    nothing. rope_type None is the method that scales the model already, else linear.

    Raises ValueError for an unknown method, a target below one token, or a model whose RoPE is
    already scaled by another method (the two would have to be composed, which no method here defines).
    """
    check_rope_request(rope_type, rope_theta, model_max_length)
    present_type = rope_parameters.get("rope_type", "default")
    present = context_of_rope(rope_parameters, max_position_embeddings, original_max_position_embeddings)
    present_theta = rope_parameters["rope_theta"]
    original = (
        original_max_position_embeddings
        or rope_parameters.get("original_max_position_embeddings")
        or max_position_embeddings
    )
    base = original_rope_theta or present_theta
    method = rope_type or (present_type if present_type in ROPE_METHODS else "linear")
    # The stock types carry their name; a changed base does not, and shows by differing from the original one.
    is_scaled_by = present_type if present_type != "default" else "theta" if base != present_theta else None
    own_names = {"ntk": "theta", "theta": "theta"}
    if is_scaled_by not in (None, own_names.get(method, method)) and (rope_type or model_max_length > present):
        raise ValueError(
            f"rope_type: the model's RoPE is already scaled by {is_scaled_by!r} to {present} tokens and cannot be "
            f"taken to {model_max_length} by {method!r}; use the same method, lower model_max_length to at most "
            f"{present} and leave rope_type out, or start from a model with unscaled RoPE"
        )
    if model_max_length <= present and method != "theta":
        return RopeDecision(dict(rope_parameters), original, base, max_position_embeddings, present)
    previous = rope_parameters.get("factor", 1.0) if present_type == "linear" else 1.0
    scaled = ROPE_METHODS[method](RopeTarget(original, model_max_length, base, rotary_dim, rope_theta))
    if scaled.get("factor", previous) < previous:
        raise ValueError(
            f"the model is already interpolated by {previous:g}, yet {model_max_length} tokens over an original "
            f"length of {original} would need only {scaled['factor']:g}; set original_max_position_embeddings in its "
            "config.json to the length it was pretrained with"
        )
    # What else the model says of the same method (YaRN's betas) is its own; of another, only the rotated part.
    changed = ("rope_theta", "rope_type", "factor")
    is_same = scaled["rope_type"] == present_type
    kept = {key: rope_parameters[key] for key in rope_parameters if is_same or key == "partial_rotary_factor"}
    scaled = {**scaled, **{key: value for key, value in kept.items() if key not in changed}}
    length = max(model_max_length, present)
    return RopeDecision(scaled, original, base, original if method == "dynamic" else length, length)
