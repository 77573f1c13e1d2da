"""Merge an adapter into its base model, shard by shard, and save a model that stock transformers loads.

W' = W + scale * B @ A in fp32, rounded once; scale = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2106.09685,
section 4.1, arXiv 2312.03732). Optionally W is first taken through NF4 with double quantisation, so that the adapter
meets exactly the weights it was trained against. Every weight of the adapter is used exactly once, or the merge fails
with its name. Tied embeddings are untied where input and output embedding end up different.
"""

import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig

from longqlora.distributed import local_device
from longqlora.files import atomic_folder, write_json
from longqlora.model.adapter_folder import AdapterUpdates, adapter_vocabulary, grown, read_updates
from longqlora.model.base import (
    check_vocabulary,
    embedding_names,
    empty_model,
    linear_layers,
    load_config,
    load_tokenizer,
    model_source,
)
from longqlora.model.context import ContextRequest, context_length, resolve_config, tokenizer_source
from longqlora.model.library_internals import names_in_files
from longqlora.model.saved_folder import complete_tokenizer_config, save_config
from longqlora.model.weight_files import check_weights, save_in_shards
from longqlora.outputs import OutputFolder, check_outputs
from longqlora.run_record import RECORD_NAME, read_run_record, software_versions

MERGE_RECORD = "merge.json"
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template*", "*.tiktoken", "spiece.model", "sentencepiece*.model",
)  # fmt: skip
# What old checkpoints store besides weights: RoPE frequencies and causal masks, which follow from the config.
OLD_BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


def merge(
    model_name_or_path: str | None,
    adapter_name_or_path: str,
    save_path: str | Path,
    *,
    context: ContextRequest | None = None,
    dtype: torch.dtype | None = None,
    load_in_4bit: bool = False,
    max_shard_size: int = 4 * 10**9,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict:
    """Merge and save to the folder `save_path`; returns the record written there as merge.json.

    context: for an adapter folder without config.json. dtype: of the saved weights, None for the base's. load_in_4bit:
    merge into the NF4 weights. max_shard_size: in bytes. What stood at `save_path` stays until the merge is complete.
    Raises ValueError for whatever does not fit.
    """
    save_path, adapter = Path(os.path.expanduser(save_path)), Path(adapter_name_or_path)
    trust = {"trust_remote_code": trust_remote_code}
    base, config = resolve_config(model_name_or_path, adapter_name_or_path, context, **trust)
    if (context is None or context.context_size is None) and not (adapter / "config.json").is_file():
        raise ValueError(f"--context_size: {str(adapter)!r} has no config.json; give the context of its training")
    sources = {"model_name_or_path": base, "adapter_name_or_path": adapter}
    check_outputs({"--save_path": OutputFolder(save_path, MERGE_RECORD, overwrite=overwrite)}, sources)
    if getattr(load_config(base, **trust), "quantization_config", None):
        raise ValueError(f"model_name_or_path: {base!r} is saved quantised; give the 16-bit base model")
    model = empty_model(config, name=base, **trust)
    num_embeddings = adapter_vocabulary(adapter, model)
    tokenizer = tokenizer_source(base, adapter_name_or_path)
    if (Path(tokenizer) / "tokenizer_config.json").is_file():
        check_vocabulary(load_tokenizer(tokenizer, **trust), num_embeddings, tokenizer)
    folder = base_folder(base)
    weights = check_weights(folder, model, config)
    in_files = names_in_files(model, set(weights.file_of))
    updates = read_updates(adapter, in_files)
    embedding, head = (in_files.get(name, name) for name in embedding_names(model))
    linear = [f"{name}.weight" for name in linear_layers(model)] if load_in_4bit else []
    in_nf4 = {in_files.get(name, name) for name in linear}
    is_tied = bool(getattr(config, "tie_word_embeddings", False)) and head is not None
    # Of tied embeddings safetensors' own save_model keeps the output's.
    stored = head if is_tied and embedding not in weights.file_of else embedding
    dtype = dtype or weights.headers[stored].dtype

    # Name in the merged model -> the base's weight that it is made from.
    known = model.state_dict().keys()
    source_of = {embedding if name == stored else name: name for name in weights.file_of
                 if name in known or not name.endswith(OLD_BUFFERS)}  # fmt: skip
    if is_tied:
        source_of[head] = stored

    def in_full(name: str, weight: torch.Tensor) -> torch.Tensor:
        return grown(weight, num_embeddings) if name in (embedding, head) and len(weight) < num_embeddings else weight

    def merged(name: str) -> torch.Tensor:
        weight = in_full(name, weights.read(source_of[name]))
        return merged_weight(name, weight, updates, dtype=dtype, in_nf4=name in in_nf4)

    if fused := sorted(({*updates.lora} | {*updates.replacements}) & {*known} - {*source_of}):
        text = f"{str(folder)!r} holds {fused[0]!r} fused with others, as {config.model_type} is saved"
        raise ValueError(f"model_name_or_path: {text}, which cannot be merged; use the adapter as it is")
    headers = {name: in_full(name, weights.headers[source]) for name, source in source_of.items()}
    updates.check(headers)
    if is_tied:
        # PEFT trains a copy of an embedding in modules_to_save, and the other keeps the old weight unless tying was
        # ensured; weights trained in place, as in trainable_params.bin, move both.
        follows = updates.keeps_tie and head not in {**updates.lora, **updates.replacements}
        is_tied = follows or torch.equal(merged(embedding), merged(head))
        headers = {name: header for name, header in headers.items() if name != head or not is_tied}
    headers = {name: header.to(dtype) if header.is_floating_point() else header for name, header in headers.items()}
    config.tie_word_embeddings = is_tied
    config.vocab_size = num_embeddings
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    with atomic_folder(save_path) as output:
        save_in_shards(output, headers, merged, max_shard_size=max_shard_size)
        save_config(config, output)
        copy_companions(folder, adapter, output, config, with_code=trust_remote_code)
        record = {
            "base_model_name_or_path": base,
            "adapter_name_or_path": str(adapter_name_or_path),
            "merged_into": "nf4" if load_in_4bit else "base weights",
            "dtype": str(dtype).removeprefix("torch."),
            "context_size": context_length(config),
            "rope_parameters": getattr(config, "rope_parameters", None),
            "num_lora_weights": len(updates.lora),
            "replaced_weights": sorted(updates.replacements),
            "tie_word_embeddings": config.tie_word_embeddings,
            "versions": software_versions(),
        }
        write_json(output / MERGE_RECORD, record)
    return record


def merged_weight(
    name: str, weight: torch.Tensor, updates: AdapterUpdates, *, dtype: torch.dtype, in_nf4: bool = False
) -> torch.Tensor:
    """The weight `name` after the merge, in `dtype`; `weight` [out, in] is the base's."""
    lora, is_replaced = updates.lora.get(name), name in updates.replacements
    if is_replaced:
        weight = updates.replacements[name]
    if not weight.is_floating_point():
        return weight
    if in_nf4 and not is_replaced:
        weight = through_nf4(weight.to(dtype))
    if lora is not None:
        weight = weight.float() + lora.scale * (lora.b.float() @ lora.a.float())
    result = weight.to(dtype)
    if not result.isfinite().all():
        kind = "overflows" if weight.isfinite().all() else "holds values that are not finite"
        raise ValueError(f"{name!r} {kind} in {str(dtype).removeprefix('torch.')}; try --dtype bf16 or fp32")
    return result


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """`weight` quantised as a 4-bit base is when loaded (blocks of 64, double quantisation), and dequantised to its
    dtype, which is the one that the model is loaded in."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = weight.contiguous().to(local_device())
    data, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(data, state).cpu()


def base_folder(base: str) -> Path:
    """Folder with the files of the base; a hub name is downloaded, .bin weights only where there are no others."""
    source = model_source(base)
    if Path(source).is_dir():
        return Path(source)
    others = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
    folder = Path(snapshot_download(source, allow_patterns=["model*.safetensors", *others]))
    if not list(folder.glob("model*.safetensors")):
        folder = Path(snapshot_download(source, allow_patterns=["pytorch_model*.bin", *others]))
    return folder


def copy_companions(base: Path, adapter: Path, output: Path, config: PretrainedConfig, *, with_code: bool) -> None:
    """Copy tokenizer (the adapter's where it has one), generation config and run record beside the weights."""
    tokenizer = Path(tokenizer_source(str(base), str(adapter)))
    # The sentencepiece model of the base too, which adapter folders of earlier versions lack.
    files = [*base.glob("tokenizer.model"), base / "generation_config.json"]
    files += [file for pattern in TOKENIZER_FILES for file in tokenizer.glob(pattern)]
    if with_code and getattr(config, "auto_map", None):
        files += base.glob("*.py")
    for file in files:
        if file.is_file():
            shutil.copyfile(file, output / file.name)
    run_record = read_run_record(adapter)
    if run_record is not None:
        write_json(output / RECORD_NAME, run_record)
    complete_tokenizer_config(output, model_max_length=context_length(config))
