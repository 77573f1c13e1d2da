"""README.md of final/: a model card as the Hugging Face hub reads it, of what the run record and the log say.

The metadata and its form are huggingface_hub's (ModelCard, ModelCardData).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PretrainedConfig

from longqlora.attention.binding import describe_inference_attention
from longqlora.model.context import context_length, rope_of

# Settings that are places on a machine: a card says their names.
PLACES = ("model_name_or_path", "train_file", "eval_file", "deepspeed")
LEFT_OUT = ("output_dir", "logging_dir", "data_cache_dir", "resume_from_checkpoint", "hub_token")
LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM
folder = "..."  # this repository's name, or its folder
model = AutoModelForCausalLM.from_pretrained("{base}", config=AutoConfig.from_pretrained(folder))
model = PeftModel.from_pretrained(model, folder)"""
LOAD_MODEL = """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("...")  # this repository's name, or its folder"""
ADAPTER_NOTE = (
    "The config carries the RoPE of the longer context, which the base model's own lacks. For other software merge the "
    "adapter first: `python script/merge_lora.py --adapter_name_or_path FOLDER --save_path merged`."
)


def make_model_card(
    record: Mapping[str, Any], log_history: Sequence[Mapping], config: PretrainedConfig, *, name: str, is_adapter: bool
) -> ModelCard:
    """The card of a run: its record, what it logged, the config that it saved. name: of the model."""
    settings = record["arguments"]
    base, data = settings["model"]["model_name_or_path"], settings["data"]
    is_on_hub = base.count("/") == 1 and not Path(base).exists() and base[0] not in "./~"
    loss = next((entry["eval_loss"] for entry in reversed(log_history) if "eval_loss" in entry), None)
    perplexity = None if loss is None else math.exp(min(loss, 700))
    results = None
    if perplexity is not None:
        eval_name = shown_name(data.get("eval_file"))
        task = {"task_type": "text-generation", "dataset_type": "text", "dataset_name": eval_name}
        results = [EvalResult(**task, metric_type="perplexity", metric_value=round(perplexity, 4))]
    metadata = ModelCardData(
        base_model=base if is_on_hub else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["longqlora", "long-context", *["lora"] * is_adapter],
        model_name=name,
        eval_results=results,
    )
    rope = rope_of(config).rope_parameters
    factor = f" x{rope['factor']:g}" if rope.get("factor") else ""
    rows = {
        "base model": base if is_on_hub else shown_name(base),
        "context": f"{context_length(config)} tokens",
        "RoPE": f"{rope.get('rope_type', 'as the model has it')}{factor}",
        "attention in training": settings["attention"]["attention"],
        "attention to read it with": describe_inference_attention(config),
        "trained": trained(settings["adapter"]),
        "data": f"{shown_name(data['train_file'])}, rows of at most {data['max_seq_length']} tokens",
        "steps": max((entry["step"] for entry in log_history if "step" in entry), default=0),
        "training loss": next((f"{e['loss']:.4f}" for e in reversed(log_history) if "loss" in e), "not logged"),
    }
    if perplexity is not None:
        rows[f"loss on {eval_name}"] = f"{loss:.4f}, perplexity {perplexity:.4g}"
    table = "\n".join(f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows.items())
    protocol = (
        "The loss on held-out text is the mean over rows of the mean negative log-likelihood of the learned tokens, "
        "in the rows of training's form and length, read with the attention above; perplexity is its exponential.\n\n"
    )
    load = LOAD_ADAPTER.format(base=rows["base model"]) if is_adapter else LOAD_MODEL
    versions = ", ".join(f"{key} {value}" for key, value in record.get("versions", {}).items())
    return ModelCard(
        f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n\n"
        "Trained with [LongQLoRA](https://arxiv.org/abs/2311.04879).\n\n"
        f"| | |\n|---|---|\n{table}\n\n{protocol if loss is not None else ''}"
        f"## How to load it\n\n```python\n{load}\n```\n\n{ADAPTER_NOTE if is_adapter else ''}\n\n"
        f"## Settings\n\n```yaml\n{yaml.safe_dump(shown_settings(settings), sort_keys=False)}```\n\n{versions}\n"
    )


def shown_name(value: Any) -> str:
    """A data file, several, or a model by name, without the folders of the machine that trained."""
    values = value if isinstance(value, list | tuple) else [value]
    return ", ".join(Path(str(item)).name for item in values)


def shown_settings(settings: Mapping[str, Mapping]) -> dict[str, Any]:
    """The resolved settings that say something: no empty values, no places of the machine that trained."""
    flat = {key: value for section in settings.values() for key, value in section.items()}
    kept = {key: value for key, value in flat.items() if key not in LEFT_OUT and value is not None}
    plain = {key: shown_name(value) if key in PLACES else value for key, value in kept.items()}
    return {key: value if isinstance(value, int | float | list | dict) else str(value) for key, value in plain.items()}


def trained(adapter: Mapping[str, Any]) -> str:
    if adapter["finetuning_type"] == "full":
        return "all weights"
    also = [kind for kind in ("embedding", "norm") if adapter[f"train_{kind}"]]
    return " and ".join([f"LoRA of rank {adapter['lora_rank']} ({adapter['finetuning_type']})", *also])
