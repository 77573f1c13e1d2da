"""Command-line arguments for context and attention, the same in every script that loads a model."""

import argparse

from longqlora.model.context_request import ContextRequest
from longqlora.model.rope_scaling import ROPE_METHODS

ATTENTIONS = ("auto", "full", "dca")


def add_context_arguments(parser: argparse.ArgumentParser) -> None:
    """One argument for each field of `ContextRequest`."""
    group = parser.add_argument_group("context and attention")
    group.add_argument("--context_size", type=int, help="context in tokens; a longer one than the model's is reached "
                       "by --rope_type or --attention dca (default: what the configs say)")  # fmt: skip
    group.add_argument("--rope_type", choices=list(ROPE_METHODS), help="how RoPE is scaled to --context_size, with dca "
                       "to --pretraining_length (default: linear; with dca: RoPE kept)")  # fmt: skip
    group.add_argument("--rope_theta", type=float, help="the new base for --rope_type theta (default: none)")
    group.add_argument("--attention", choices=ATTENTIONS, default="auto", help="full: dense causal; dca: dual chunk "
                       "attention, without training; auto: as the model's config says (default: auto)")  # fmt: skip
    group.add_argument("--pretraining_length", type=int, help="dca: tokens that RoPE covers (default: the model's "
                       "context)")  # fmt: skip
    group.add_argument("--dca_chunk_size", type=int, help="dca: largest distance within chunks, in tokens (default: "
                       "3/4 of --pretraining_length)")  # fmt: skip
    group.add_argument("--dca_local_window", type=int, help="dca: overlap of chunks, in tokens (default: 1/8 of "
                       "--pretraining_length)")  # fmt: skip
    group.add_argument("--dca_mscale", action="store_true", help="dca: scale the logits with the logarithm of the "
                       "length (default: no)")  # fmt: skip


def check_context_arguments(args: argparse.Namespace) -> None:
    """Refuse, before anything heavy is imported, what the arguments cannot mean."""
    try:
        context_request(args)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def context_request(args: argparse.Namespace) -> ContextRequest:
    """What `add_context_arguments` parsed."""
    return ContextRequest(**{name: getattr(args, name) for name in ContextRequest.__dataclass_fields__})
