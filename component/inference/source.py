"""A model before its weights are loaded: all that it takes to make its prompts and to refuse bad ones.

torch is imported where it is used, which keeps --help and bad input fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longqlora.data.prompt import CHAT_TEMPLATE, prompt_template_for
from longqlora.distributed import print_main
from longqlora.inference.generation import NO_TEMPLATE
from longqlora.model.context_request import ContextRequest
from longqlora.run_record import read_run_record


@dataclass
class ModelSource:
    """Tokenizer and config of a model, the folders or hub names that they are from, and its context in tokens."""

    tokenizer: Any
    config: Any
    base_model_name_or_path: str
    adapter_name_or_path: str | None
    context_size: int
    trust_remote_code: bool = False

    def warn_beyond_context(self, lengths: Sequence[int]) -> None:
        """Name the lengths that the model is not meant to read; with dual chunk attention there are none."""
        from longqlora.attention.dual_chunk_binding import dual_chunk_sizes

        for length in lengths:
            if length > self.context_size and dual_chunk_sizes(self.config) is None:
                print_main(f"warning: length {length} is beyond the model's context of {self.context_size} tokens")

    def template(self, requested: str, *, default: str = NO_TEMPLATE) -> str:
        """The template that --prompt_template means.

        auto is the one that the model was tuned with, by the run record of adapter or base, or the tokenizer's own, and
        `default` where neither is known. Raises ValueError as `prompt_template_for`.
        """
        if requested != "auto":
            return requested if requested == NO_TEMPLATE else prompt_template_for(self.tokenizer, requested)
        for folder in filter(None, (self.adapter_name_or_path, self.base_model_name_or_path)):
            data = (read_run_record(folder) or {}).get("arguments", {}).get("data", {})
            if data.get("sft"):
                return prompt_template_for(self.tokenizer, data.get("prompt_template"))
        return CHAT_TEMPLATE if getattr(self.tokenizer, "chat_template", None) else default


def read_source(
    model_name_or_path: str | None,
    adapter_name_or_path: str | None = None,
    context: ContextRequest | None = None,
    *,
    trust_remote_code: bool = False,
) -> ModelSource:
    """The source of a base or merged model, with or without an adapter.

    The adapter names its base model, and config.json RoPE, length and attention; `context` changes the latter.
    """
    from longqlora.model.base import load_tokenizer
    from longqlora.model.context import context_length, resolve_config, tokenizer_source

    trust = {"trust_remote_code": trust_remote_code}
    base, config = resolve_config(model_name_or_path, adapter_name_or_path, context, **trust)
    # Prompts may be longer than the context, about which the tokenizer would warn.
    tokenizer = load_tokenizer(tokenizer_source(base, adapter_name_or_path), model_max_length=10**12, **trust)
    return ModelSource(tokenizer, config, base, adapter_name_or_path, context_length(config), trust_remote_code)
