"""Load the base model, its config and its tokenizer, and refuse what is not what it seems."""

import copy
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers import logging as transformers_logging
from transformers.integrations import is_deepspeed_zero3_enabled

from longqlora.attention.model_internals import check_heads, config_of_full_layers, stock_attention
from longqlora.device import cpu_has_bf16
from longqlora.distributed import print_notice
from longqlora.model.library_internals import drop_kernels, keep_4bit_weights_trainable, save_under_own_names
from longqlora.reading import COUNT, MAPPING, NONE, POSITIVE, TEXT, check_kinds, reading
from longqlora.settings.config import Settings, at_least

# Forms of quantised weights whose kernels come from installed packages; for others transformers may ask the hub.
QUANTIZERS_WITHOUT_HUB = ("bitsandbytes", "gptq", "awq")
# How weights of a text model are called in the files of a model that wraps it, with images or sound (transformers'
# key_mapping: patterns and what they become).
TEXT_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
}

# A model of more layers or experts would be built for minutes, on the meta device too.
FEW = at_least(1, 2000)
# None in Granite 4, 16,384 in Doge, whose experts are rows of one weight.
EXPERTS = at_least(0, 20_000)
# What a config.json says, beyond what transformers checks of it.
CONFIG_KINDS = {
    **dict.fromkeys(("hidden_size", "num_attention_heads", "vocab_size"), (POSITIVE,)), "num_hidden_layers": (FEW,),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (EXPERTS, NONE)),
    "head_dim": (POSITIVE, NONE), "quantization_config": (MAPPING, NONE),
}  # fmt: skip
TRIAL_TEXT = "Once upon a time."


def quantization_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3)."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype, **nf4)


def default_dtype() -> torch.dtype:
    """bf16 on Ampere or later, fp16 on older GPUs, fp32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def is_slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether products in `dtype` are much slower than in fp32 on this CPU: fp16 on all, bf16 on many."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu_has_bf16())


def model_source(name_or_path: str) -> str:
    """A local folder as an absolute path, a hub name as it is; a path that is not there is refused."""
    path, flag = Path(os.path.expanduser(name_or_path)), "model_name_or_path"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{flag}: {str(path)!r} has no config.json; give the folder of a saved model")
        return str(path.resolve())
    is_hub_name = name_or_path.count("/") <= 1 and not name_or_path.startswith((".", "/", "~", os.sep))
    if not is_hub_name or path.is_file():
        raise ValueError(f"{flag}: no model folder at {name_or_path!r}; give an existing folder or a hub name")
    return name_or_path


def load_config(name_or_path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Config of a model folder or hub name. Raises ValueError naming the model where it cannot be read."""
    source = model_source(name_or_path)
    with reading("model_name_or_path", name_or_path, "correct it, or give another model", part="config.json of "):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    config = text_config(config, name_or_path)
    check_heads(config)
    layers = config_of_full_layers(config)
    found = {name: getattr(layers, name) for name in CONFIG_KINDS if hasattr(layers, name)}
    check_kinds(found, CONFIG_KINDS, f"model_name_or_path: config.json of {name_or_path!r}")
    if getattr(config, "max_position_embeddings", None) is None:
        raise ValueError(f"model_name_or_path: {config.model_type} says no max_position_embeddings in its config.json")
    if getattr(config, "transformers_weights", None):
        raise ValueError(
            f"model_name_or_path: config.json of {name_or_path!r} names its own weight file (transformers_weights); "
            "call the file model.safetensors, and remove the key"
        )
    refuse_hub_code(config, name_or_path, trust_remote_code=trust_remote_code)
    config.use_cache = True
    return config


def text_config(config: PretrainedConfig, name: str) -> PretrainedConfig:
    """The text model's part of a config that wraps one, as Gemma 3's with images; else `config` itself."""
    text = getattr(config, "text_config", None)
    if not isinstance(text, PretrainedConfig) or getattr(config, "max_position_embeddings", None) is not None:
        return config
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        text = f"{name!r} is a {config.model_type} around a {text.model_type}, which is no causal language model"
        raise ValueError(f"model_name_or_path: {text}; give a text model")
    text._name_or_path = config._name_or_path
    # What is said of the whole holds for the part.
    for key in ("tie_word_embeddings", "quantization_config", "transformers_weights"):
        if getattr(config, key, None) is not None:
            setattr(text, key, getattr(config, key))
    return text


def wraps_text_model(source: str, config: PretrainedConfig) -> bool:
    """Whether the model of `source` is one around that of `config`, its text model."""
    values, _ = PretrainedConfig.get_config_dict(source)
    return "text_config" in values and values.get("model_type") != config.model_type


def text_names(names: Iterable[str]) -> dict[str, str]:
    """Of the weights `names` in the files of a model that wraps a text model, those of the latter: its own name -> name
    in the files; empty for other models."""
    found = {}
    for name in names:
        part = next((part for pattern, part in TEXT_NAMES.items() if re.match(pattern, name)), None)
        if part:
            found[part + re.sub("|".join(TEXT_NAMES), "", name)] = name
    return {**found, **{name: name for name in names if name.startswith("lm_head.")}} if found else {}


def refuse_hub_code(config: PretrainedConfig, name: str, *, trust_remote_code: bool) -> None:
    """Keep a config.json from deciding which compiled code (kernels) transformers fetches from the hub and runs.

    Attention is bound by this repository, so a kernel named for it, in nested configs too, is dropped with a notice.
    """
    for kernel in drop_kernels(config):
        print_notice(f"the attention kernel {kernel!r} in config.json of {name!r} has no effect: it is not fetched")
    quantization = getattr(config, "quantization_config", None) or {}
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    # Configs of before transformers 4.35 do not name the method of bitsandbytes.
    is_unnamed = values.get("load_in_8bit") or values.get("load_in_4bit")
    method = values.get("quant_method") or ("bitsandbytes" if is_unnamed else None)
    if quantization and method not in QUANTIZERS_WITHOUT_HUB and not trust_remote_code:
        raise ValueError(
            f"model_name_or_path: {name!r} is quantised as {str(method)!r}, for which transformers may fetch code from "
            "the hub; give the 16-bit model, or set trust_remote_code"
        )


def training_dtype(arguments: TrainingArguments) -> torch.dtype:
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def load_training_model(settings: Settings, config: PretrainedConfig, arguments: TrainingArguments) -> PreTrainedModel:
    """The base model in the precision of the run, on this process's device."""
    model, is_quantised = settings.model, settings.adapter.finetuning_type == "qlora"
    device = None if is_deepspeed_zero3_enabled() else arguments.device
    options = {"dtype": training_dtype(arguments), "device": device, "trust_remote_code": model.trust_remote_code}
    return load_model(model.model_name_or_path, config, load_in_4bit=is_quantised, **options)


def load_model(
    name_or_path: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    load_in_4bit: bool,
    device: torch.device | Literal["auto"] | None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the base weights onto `device` (None: where DeepSpeed ZeRO-3 places them; auto: spread over all GPUs).

    `dtype` is that of the 16- or 32-bit weights, and of the products with the 4-bit ones. Raises ValueError for
    weights that are missing, damaged or of another shape, which transformers would make up at random.
    """
    source = model_source(name_or_path)
    is_wrapped = wraps_text_model(source, config)
    options = {
        "config": config,
        "key_mapping": TEXT_NAMES if is_wrapped else None,
        "dtype": dtype,
        "quantization_config": quantization_config(dtype) if load_in_4bit else None,
        "device_map": device if device in (None, "auto") else {"": device},
        "trust_remote_code": trust_remote_code,
        "attn_implementation": stock_attention(config),
        "ignore_mismatched_sizes": True,  # named by check_loaded
        "output_loading_info": True,
    }
    # It would list the weights around the text model, one a line.
    with without_reports(is_silent=is_wrapped), reading("model_name_or_path", name_or_path, "is it whole?"):
        model, info = AutoModelForCausalLM.from_pretrained(source, **options)
    if is_wrapped:
        info["unexpected_keys"] = text_names(info["unexpected_keys"]).values()
        save_under_own_names(model, TEXT_NAMES)
    check_loaded(info, model, name_or_path)
    if load_in_4bit:
        keep_4bit_weights_trainable(model)
    return model


@contextmanager
def without_reports(*, is_silent: bool = True) -> Iterator[None]:
    """Let transformers log errors alone; is_silent false: leave it as it is."""
    verbosity = transformers_logging.get_verbosity()
    if is_silent:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def check_loaded(info: dict, model: PreTrainedModel, name: str, *, hint: str = "; is it whole?") -> None:
    """Raise ValueError for the first weight in which `info`, transformers' report on loading, finds a fault. A surplus
    weight is one where it belongs to a decoder layer: such models compute something else without it."""
    layers = next((n for n, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)), "layers")
    in_layers = re.compile(rf"(^|\.){layers.rpartition('.')[2]}\.\d+\.")
    faults = [f"lacks {weight!r}" for weight in sorted(info["missing_keys"])]
    for weight, found, expected in sorted(info["mismatched_keys"]):
        faults.append(f"has {weight!r} of shape {list(found)}, where its config.json says {list(expected)}")
    surplus = sorted(weight for weight in info["unexpected_keys"] if in_layers.search(weight))
    faults += [*map(str, info["error_msgs"]), *(f"has {x!r}, for which its config.json has no place" for x in surplus)]
    if faults:
        raise ValueError(f"model_name_or_path: {name!r} {faults[0]} ({len(faults)} such weights){hint}")


def empty_model(config: PretrainedConfig, *, name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` on the meta device, without memory; ValueError, with `name`, where it describes none."""
    with reading("model_name_or_path", name, "correct it", part="the model of config.json in "), torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)


def embedding_names(model: PreTrainedModel) -> tuple[str, str | None]:
    """Names of the input and the output embedding weights; None for a model without the latter."""
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return names[id(model.get_input_embeddings())], names.get(id(model.get_output_embeddings()))


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """Linear layers but the output layer, by name: those that a 4-bit base quantises and LoRA adapts."""
    head, changed = model.get_output_embeddings(), routers(model)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: module for name, module in linear.items() if module is not head and name not in changed}


def routers(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """Linear layers whose forward pass the model's own class changed, as the routers of some experts, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and type(module).forward is not torch.nn.Linear.forward
        and type(module).__module__.startswith("transformers")
    }


def load_tokenizer(
    name_or_path: str,
    *,
    model_max_length: int | None = None,
    trust_remote_code: bool = False,
    flag: str = "model_name_or_path",
) -> PreTrainedTokenizerBase:
    """Tokenizer with right padding. A missing pad token becomes UNK or EOS, which is harmless here:
    labels and masks come from lengths, never from comparing ids with the pad id."""
    source = os.path.expanduser(name_or_path)
    with reading(flag, name_or_path, "is it whole?", part="the tokenizer of "):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if len(tokenizer) == 0:
            raise ValueError("it has no tokens")
        # What a damaged one fails at where it is used.
        tokenizer.decode(tokenizer(TRIAL_TEXT, padding=True)["input_ids"], skip_special_tokens=True)
    place = f"{flag}: the tokenizer of {name_or_path!r}"
    check_kinds(vars(tokenizer), {"chat_template": (NONE, TEXT, MAPPING)}, place)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        check_kinds({name: getattr(tokenizer, name)}, {name: (NONE, COUNT)}, place)
    tokenizer.padding_side = "right"
    if model_max_length is not None:
        tokenizer.model_max_length = model_max_length
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, source: str) -> None:
    """Refuse a tokenizer whose ids go beyond the model's embeddings, as one made for another model, and one without
    words, which transformers makes of a folder without tokenizer.json and tokenizer.model."""
    vocabulary = tokenizer.get_vocab()
    if vocabulary.keys() <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"model_name_or_path: the tokenizer of {source!r} knows no word; is its tokenizer.json or tokenizer.model "
            "missing?"
        )
    token, last = max(vocabulary.items(), key=lambda item: item[1])
    if last >= num_embeddings:
        raise ValueError(
            f"model_name_or_path: the tokenizer of {source!r} has ids up to {last} ({token!r}), beyond the model's "
            f"{num_embeddings} embeddings; give a folder whose tokenizer belongs to the model"
        )
