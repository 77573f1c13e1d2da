"""Everything a run does before it needs weights: settings, data, tokenizer and the model's shape."""

from contextlib import redirect_stdout
from io import StringIO

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from component.adapter import attach_adapter, trainable_table
from component.arguments import Settings
from component.attention import bind_attention
from component.distributed import print_main
from component.prompt import eos_id, prompt_template_for


def dry_run(
    settings: Settings, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, notices: list[str]
) -> None:
    """Build the model without memory, bind attention and adapter to it, and print what a run would do."""
    eos_id(tokenizer)
    if settings.data.sft:
        prompt_template_for(tokenizer, settings.data.prompt_template)
    with torch.device("meta"), redirect_stdout(StringIO()):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.model.trust_remote_code)
    attention = bind_attention(model, settings.attention, settings.data.max_seq_length)
    model = attach_adapter(model, settings.adapter)
    for line in [*notices, attention, trainable_table(model), "dry run: all settings are valid"]:
        print_main(line)
