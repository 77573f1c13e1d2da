"""What a user asks of a model's context, and the command-line arguments for it, the same in every script.

Checked as far as that goes without the model; imports nothing heavy.
"""

import argparse
from dataclasses import dataclass, fields

from longqlora.model.rope_scaling import check_rope_request
from longqlora.settings.config import ROPE_TYPES, Section, at_least, key, one_of

ATTENTIONS = ("auto", "full", "dca")


@dataclass(frozen=True)
class ContextRequest(Section):
    """Lengths are in tokens; None and "auto" leave a thing to what the model's config says."""

    context_size: int | None = key(
        None,
        "context in tokens; a longer one than the model's is reached by --rope_type or --attention dca "
        "(default: what the configs say)",
        at_least(1),
    )
    rope_type: str | None = key(
        None,
        "how RoPE is scaled to --context_size, with dca to --pretraining_length (default: linear; with dca: RoPE kept)",
    )
    rope_theta: float | None = key(None, "the new base for --rope_type theta (default: none)")
    attention: str = key(
        "auto",
        "full: dense causal; dca: dual chunk attention, without training; auto: as the model's config says "
        "(default: auto)",
        one_of(ATTENTIONS),
    )
    pretraining_length: int | None = key(
        None, "dca: tokens that RoPE covers (default: the model's context)", at_least(1)
    )
    dca_chunk_size: int | None = key(
        None, "dca: largest distance within chunks, in tokens (default: 3/4 of --pretraining_length)", at_least(1)
    )
    dca_local_window: int | None = key(
        None, "dca: overlap of chunks, in tokens (default: 1/8 of --pretraining_length)", at_least(1)
    )
    dca_mscale: bool = key(False, "dca: scale the logits with the logarithm of the length (default: no)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rope_request(self.rope_type, self.rope_theta, None)
        if self.attention == "full" and self.given_dual_chunk_settings:
            raise ValueError(f"{self.given_dual_chunk_settings[0]}: has an effect with attention: dca only")

    @property
    def given_dual_chunk_settings(self) -> list[str]:
        names = ("pretraining_length", "dca_chunk_size", "dca_local_window", "dca_mscale")
        return [name for name in names if getattr(self, name)]


KINDS = {
    "rope_type": {"choices": ROPE_TYPES}, "rope_theta": {"type": float}, "attention": {"choices": ATTENTIONS},
    "dca_mscale": {"action": "store_true"},
}  # fmt: skip


def add_context_arguments(parser: argparse.ArgumentParser) -> None:
    """One argument for each field of `ContextRequest`, a number of tokens where KINDS says nothing else."""
    group = parser.add_argument_group("context and attention")
    for item in fields(ContextRequest):
        kind = KINDS.get(item.name, {"type": int})
        group.add_argument(f"--{item.name}", default=item.default, help=item.metadata["help"], **kind)


def check_context_arguments(args: argparse.Namespace) -> None:
    """Refuse, before anything heavy is imported, what the arguments cannot mean."""
    try:
        context_request(args)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def context_request(args: argparse.Namespace) -> ContextRequest:
    """What `add_context_arguments` parsed."""
    return ContextRequest(**{item.name: getattr(args, item.name) for item in fields(ContextRequest)})
