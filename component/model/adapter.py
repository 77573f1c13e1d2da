"""What is trained on top of the base model: LoRA matrices, and embedding and norm weights where asked.

Embedding and norm layers are trained through PEFT's `modules_to_save`, so that they are saved and
restored with the adapter; `requires_grad` alone would leave them out of every checkpoint.
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from longqlora.model.base import linear_layers
from longqlora.model.library_internals import fused_expert_names
from longqlora.settings.config import INPUT, AdapterConfig
from longqlora.table import text_table

MODULE_KINDS = {"LoRA": ["lora_"], "norm": ["norm"], "embedding": ["embed", "lm_head"]}


def attach_adapter(model: PreTrainedModel, config: AdapterConfig) -> PreTrainedModel | PeftModel:
    """Freeze the base and add what is trained. Trained weights are fp32: an optimizer step of 1e-4 of a
    weight's size is lost in 16 bit. What flows between the layers stays in the base's dtype."""
    if config.finetuning_type == "full":
        # ZeRO-3 holds fp32 weights of its own beside those that the model computes with.
        return model.requires_grad_(True) if is_deepspeed_zero3_enabled() else model.float().requires_grad_(True)
    model.requires_grad_(False)
    stream_dtype = model.get_input_embeddings().weight.dtype
    modules_to_save = trained_module_names(model, embedding=config.train_embedding, norm=config.train_norm)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_module_names(model, config.target_modules),
        modules_to_save=modules_to_save or None,
        ensure_weight_tying=bool(config.train_embedding and model.config.tie_word_embeddings),
    )
    peft_model = get_peft_model(model, lora)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    settle_copies(peft_model, stream_dtype)
    return peft_model


def settle_copies(model: PeftModel, dtype: torch.dtype) -> None:
    """Embeddings and norms that are trained as fp32 copies return `dtype`, and a trained head takes it. The frozen
    original that PEFT keeps of each is freed: no training step reads it."""
    head = model.get_base_model().get_output_embeddings()
    names = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if ".original_module." not in name}
    for module in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        if dtype != torch.float32 and module is head:
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
        elif dtype != torch.float32:
            module.register_forward_hook(lambda module, inputs, output: output.to(dtype))
        for parameter in module.original_module.parameters():
            # A tied original is the weight of another module too.
            if id(parameter) not in names:
                parameter.data = parameter.data.new_empty(0)
                module.original_module.register_forward_pre_hook(refuse_without_adapter)


def refuse_without_adapter(module: torch.nn.Module, inputs: tuple) -> None:
    raise RuntimeError("a model in training cannot switch its adapter off: the originals of trained layers are freed")


def target_module_names(model: PreTrainedModel, requested: str | None) -> list[str]:
    """The LoRA targets: the requested ones, each checked against the model, or all linear layers. Names that PEFT reads
    as the experts' fused weights are left out; requested, they are refused."""
    available = sorted({short_name(name) for name in linear_layers(model)})
    if not available:
        text = f"{model.config.model_type} has no torch.nn.Linear layers, which LoRA adapts"
        raise ValueError(f"finetuning_type: {text}; use full, or another model")
    fused = fused_expert_names(model, available)
    if not requested:
        return [name for name in available if name not in fused]
    names = [name.strip() for name in requested.split(",") if name.strip()]
    for name in names:
        if name not in available:
            raise ValueError(f"target_modules: no linear layer named {name}; choose from {', '.join(available)}")
        if name in fused:
            raise ValueError(
                f"target_modules: {name}: in {model.config.model_type} PEFT takes it for the experts' fused weights, "
                "which have no LoRA here; leave it out"
            )
    return names


def frozen_experts_notice(model: PreTrainedModel) -> list[str]:
    """A notice, where `model` has experts, that LoRA leaves them as they are."""
    if not any(parameter.ndim == 3 for parameter in model.parameters()):
        return []
    names = sorted({short_name(name) for name in linear_layers(model)} - {*target_module_names(model, None)})
    also = f", as do linear layers named {', '.join(names)}, which PEFT takes for them" if names else ""
    return [f"finetuning_type: experts of {model.config.model_type} are no linear layers and stay as they are{also}"]


def trained_module_names(model: PreTrainedModel, *, embedding: bool | str, norm: bool) -> list[str]:
    """Short names of the modules that are trained in full. A tied output embedding is left out: it
    follows the input embedding, as it does where LongLoRA trains that alone."""
    wanted, outer = [], []
    if embedding:
        wanted.append(model.get_input_embeddings())
        if embedding != INPUT and not model.config.tie_word_embeddings:
            wanted.append(model.get_output_embeddings())
    if norm:
        norms = [module for module in model.modules() if type(module).__name__.endswith(("RMSNorm", "LayerNorm"))]
        # A.X-K2 has norms around norms: PEFT cannot load one inside another, and matches names by how they end.
        outer = [module for module in norms if any(part in norms for part in module.children())]
        wanted += [module for module in norms if module not in outer]
    identities, num_parts = {id(module) for module in wanted}, 2 if outer else 1
    found = [name for name, module in model.named_modules() if id(module) in identities]
    names = sorted({short_name(name, num_parts) for name in found})
    if in_lists := [name for name in names if name.rpartition(".")[2].isdigit()]:
        text = f"{model.config.model_type} has {in_lists[0]!r} in a list of modules, which PEFT cannot train"
        raise ValueError(f"train_norm: {text}; set it to false")
    return names


def short_name(name: str, num_parts: int = 1) -> str:
    """The last parts of a module's name; in a list (LongCat's norms) the one before too: PEFT would take the number for
    that of a decoder layer."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-num_parts:])


def trainable_table(model: torch.nn.Module) -> str:
    """Text table of parameter counts by module kind and dtype, trained against all. 4-bit weights count as the numbers
    they stand for. A module that PEFT trains as a copy counts once: the frozen twin is no part of the model."""
    counts: dict[tuple[str, str], list[int]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        kind = next((kind for kind, marks in MODULE_KINDS.items() if any(mark in name for mark in marks)), "linear")
        quant_state = getattr(parameter, "quant_state", None)
        # Under ZeRO-3 a process holds a part of each weight, and no element where it looks.
        count = quant_state.shape.numel() if quant_state else getattr(parameter, "ds_numel", parameter.numel())
        dtype = "nf4" if quant_state else str(parameter.dtype).removeprefix("torch.")
        row = counts.setdefault((kind, dtype), [0, 0])
        row[0] += count if parameter.requires_grad else 0
        row[1] += count
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    counts = dict(sorted(counts.items())) | {("total", ""): total}
    rows = [(*key, f"{part:,}", f"{whole:,}", f"{part / whole:.2%}") for key, (part, whole) in counts.items()]
    return text_table(("kind", "dtype", "trained", "all", "share"), rows, num_left=2)
