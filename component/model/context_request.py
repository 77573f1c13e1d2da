"""What a user asks of a model's context, and the command-line arguments for it, the same in every script.

Checked as far as that goes without the model; imports nothing heavy.
"""

import argparse
import math
from dataclasses import dataclass, fields

from longqlora.settings.config import (
    MSCALE_CHOICES,
    MSCALES,
    ROPE_TYPES,
    AttentionConfig,
    ContextConfig,
    at_least,
    check_limit,
    one_of,
)

ATTENTIONS = ("auto", "full", "dca")
LENGTHS = ("context_size", "pretraining_length", "dca_chunk_size", "dca_local_window")
HELP = {
    item.name: item.metadata["help"] for section in (ContextConfig, AttentionConfig) for item in fields(section)
} | {
    "context_size": "context in tokens; a longer one than the model's is reached by --rope_type or --attention dca "
    "(default: what the configs say)",
    "attention": "full: dense causal; dca: dual chunk attention, without training; auto: as the model's config says "
    "(default: auto)",
}


@dataclass(frozen=True)
class ContextRequest:
    """None and "auto" leave a thing to what the model's config says. context_size: tokens to read. The rest is named as
    in a training YAML. With dca, a rope_type scales RoPE to `pretraining_length` only; chunks reach the rest."""

    context_size: int | None = None
    rope_type: str | None = None
    rope_theta: float | None = None
    attention: str = "auto"
    pretraining_length: int | None = None
    dca_chunk_size: int | None = None
    dca_local_window: int | None = None
    dca_mscale: bool | str = False

    def __post_init__(self) -> None:
        for name in LENGTHS:
            check_limit(name, getattr(self, name), at_least(1))
        check_limit("dca_mscale", self.dca_mscale, MSCALE_CHOICES)
        check_limit("rope_type", self.rope_type, one_of(ROPE_TYPES))
        check_limit("rope_theta", self.rope_theta, ("a finite number above 1", lambda value: 1 < value < math.inf))
        if (self.rope_type == "theta") != (self.rope_theta is not None):
            raise ValueError("rope_theta: goes with rope_type: theta, and that with it; give both, such as 500000")


def add_context_arguments(parser: argparse.ArgumentParser) -> None:
    """One argument for each field of `ContextRequest`."""
    group = parser.add_argument_group("context and attention")
    kinds = {"rope_type": {"choices": ROPE_TYPES}, "rope_theta": {"type": float}, "attention": {"choices": ATTENTIONS}}
    kinds |= {"dca_mscale": {"nargs": "?", "const": True, "choices": MSCALES}, **dict.fromkeys(LENGTHS, {"type": int})}
    for item in fields(ContextRequest):
        group.add_argument(f"--{item.name}", default=item.default, help=HELP[item.name], **kinds[item.name])


def context_request(args: argparse.Namespace) -> ContextRequest:
    """What `add_context_arguments` parsed. Raises ValueError naming the argument that cannot be meant."""
    try:
        return ContextRequest(**{item.name: getattr(args, item.name) for item in fields(ContextRequest)})
    except ValueError as error:
        raise ValueError(f"--{error}") from None
