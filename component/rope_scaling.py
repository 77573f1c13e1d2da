"""Decide the RoPE parameters that let a model read `model_max_length` tokens.

Pure: works on plain values, knows nothing of transformers. A method is a row of `ROPE_METHODS`; the
result is a `rope_parameters` dictionary that stock transformers understands and saves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class ContextConfig:
    """The context length to reach and the way there."""

    model_max_length: int | None = field(
        default=None, metadata={"help": "context length after training, in tokens; None keeps the model's own"}
    )
    rope_type: str = field(default="linear", metadata={"help": "RoPE scaling method: linear (position interpolation)"})


@dataclass(frozen=True)
class RopeDecision:
    """What to write into a config.

    rope_parameters: dictionary for `config.rope_parameters`.
    original_max_position_embeddings: length of pretraining, in tokens.
    max_position_embeddings: length after scaling, in tokens.
    """

    rope_parameters: dict
    original_max_position_embeddings: int
    max_position_embeddings: int


def linear(rope_parameters: dict, *, original: int, target: int) -> dict:
    """Position interpolation: position p is read as p / factor (arXiv 2306.15595, section 2.3).

    The factor is rounded up to a whole number, as upstream does.
    """
    factor = float(math.ceil(target / original))
    previous = rope_parameters.get("factor", 1.0) if rope_parameters.get("rope_type") == "linear" else 1.0
    if factor < previous:
        raise ValueError(
            f"the model is already interpolated by {previous:g}, yet {target} tokens over an original length of "
            f"{original} would need only {factor:g}; set original_max_position_embeddings in its config.json to the "
            "length it was pretrained with"
        )
    return {"rope_theta": rope_parameters["rope_theta"], "rope_type": "linear", "factor": factor}


ROPE_METHODS: dict[str, Callable[..., dict]] = {"linear": linear}


def scale_rope(
    rope_parameters: dict,
    *,
    max_position_embeddings: int,
    original_max_position_embeddings: int | None,
    model_max_length: int,
    rope_type: str = "linear",
) -> RopeDecision:
    """Return the RoPE parameters for `model_max_length` tokens; all lengths are in tokens.

    Idempotent: the factor follows from the original length and the target alone, so deciding on an
    already scaled model gives the same answer. A target within the present length changes nothing.

    Raises ValueError for an unknown method, a target below one token, or a model whose RoPE is
    already scaled by another method (the two would have to be composed, which no method here defines).
    """
    if rope_type not in ROPE_METHODS:
        raise ValueError(f"rope_type: {rope_type!r} is not one of {sorted(ROPE_METHODS)}")
    if model_max_length < 1:
        raise ValueError(f"model_max_length: must be at least 1, got {model_max_length}")
    present_type = rope_parameters.get("rope_type", "default")
    original = original_max_position_embeddings or max_position_embeddings
    if model_max_length <= max_position_embeddings:
        return RopeDecision(dict(rope_parameters), original, max_position_embeddings)
    if present_type not in ("default", rope_type):
        raise ValueError(
            f"rope_type: the model's RoPE is already scaled by {present_type!r} to {max_position_embeddings} tokens "
            f"and cannot be taken to {model_max_length} by {rope_type!r}; lower model_max_length to at most "
            f"{max_position_embeddings} or start from a model with unscaled RoPE"
        )
    scaled = ROPE_METHODS[rope_type](rope_parameters, original=original, target=model_max_length)
    kept = {key: value for key, value in rope_parameters.items() if key == "partial_rotary_factor"}
    return RopeDecision({**kept, **scaled}, original, model_max_length)
