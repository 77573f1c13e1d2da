"""Merge an adapter into its base model, shard by shard, and save a model that stock transformers loads.

W' = W + scale * B @ A in fp32, rounded once; scale = alpha / r, or alpha / sqrt(r) with rsLoRA
(arXiv 2106.09685 section 4.1, arXiv 2312.03732). Optionally W is first taken through NF4 with double
quantisation, so that the adapter meets exactly the weights it was trained against.

Every weight of the adapter is used exactly once, or the merge fails with its name. Tied embeddings
stay tied where input and output embedding end up equal, and are untied where they do not.
"""

import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import PretrainedConfig

from longqlora.distributed import is_main_process
from longqlora.files import atomic_folder, write_json
from longqlora.model.adapter_folder import adapter_vocabulary, embedding_names, grown
from longqlora.model.adapter_updates import AdapterUpdates, read_updates, updated
from longqlora.model.base import empty_model, linear_layers, load_config, load_tokenizer, model_source
from longqlora.model.context import ContextRequest, context_length, resolve_config, tokenizer_source
from longqlora.model.saved_folder import mend_tokenizer_config, save_config
from longqlora.model.weight_checks import check_vocabulary, check_weights, untie_where_saved_apart
from longqlora.model.weight_shards import CheckpointNames, SavedWeights, ShardWriter
from longqlora.outputs import OutputFolder, check_outputs
from longqlora.run_record import read_run_record, save_run_record, software_versions

MERGE_RECORD = "merge.json"
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template*", "*.tiktoken", "spiece.model", "sentencepiece*.model",
)  # fmt: skip
# What old checkpoints store besides weights: RoPE frequencies and causal masks, which follow from the config.
OLD_BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


def stays_tied(updates: AdapterUpdates, embedding: str, head: str) -> bool:
    """Whether tied embeddings are still equal after the merge.

    PEFT trains a copy of an embedding in modules_to_save, and the other keeps the old weight unless tying
    was ensured; weights trained in place, as in trainable_params.bin, move both.
    """
    if head in updates.matrices or embedding in updates.matrices:
        return False
    new_embedding, new_head = updates.replacements.get(embedding), updates.replacements.get(head)
    if new_head is None:
        return new_embedding is None or updates.keeps_tie
    return new_embedding is not None and torch.equal(new_embedding, new_head)


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

    context: for an adapter folder without config.json. dtype: of the saved weights, None
    for the base's. load_in_4bit: merge into the NF4 weights. max_shard_size: in bytes. Nothing that stood
    at `save_path` is touched before the merge is complete. Raises ValueError for whatever does not fit.
    """
    save_path = Path(os.path.expanduser(save_path))
    base, config = resolve_config(
        model_name_or_path, adapter_name_or_path, context, trust_remote_code=trust_remote_code
    )
    if (context is None or context.context_size is None) and not (Path(adapter_name_or_path) / "config.json").is_file():
        raise ValueError(
            f"--context_size: {str(adapter_name_or_path)!r} has no config.json, so give the context of its training, "
            f"in tokens (the base model has {context_length(config)})"
        )
    sources = {"model_name_or_path": base, "adapter_name_or_path": adapter_name_or_path}
    check_outputs({"--save_path": OutputFolder(save_path, MERGE_RECORD, overwrite=overwrite)}, sources)
    if getattr(load_config(base, trust_remote_code=trust_remote_code), "quantization_config", None):
        raise ValueError(f"model_name_or_path: {base!r} is saved quantised; give the 16-bit base model")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = empty_model(config, name=base, trust_remote_code=trust_remote_code)
    num_embeddings = adapter_vocabulary(adapter_name_or_path, model)
    tokenizer = Path(tokenizer_source(base, adapter_name_or_path))
    if (tokenizer / "tokenizer_config.json").is_file():
        check_vocabulary(
            load_tokenizer(str(tokenizer), trust_remote_code=trust_remote_code), num_embeddings, str(tokenizer)
        )
    updates = read_updates(adapter_name_or_path)
    folder = base_folder(base)
    weights = SavedWeights(folder)
    check_weights(weights, model, folder)
    untie_where_saved_apart(config, weights, model)
    embedding, head = embedding_names(model)
    names = CheckpointNames(model, set(weights.file_of))
    embedding, head = names.of(embedding), head and names.of(head)
    updates.rename(names.of)
    is_tied = bool(getattr(config, "tie_word_embeddings", False)) and head is not None
    is_untied_now = is_tied and not stays_tied(updates, embedding, head)
    # Of tied embeddings safetensors' own save_model keeps the output's.
    stored = head if is_tied and embedding not in weights.file_of else embedding
    headers = {**weights.headers, embedding: weights.headers[stored]}
    check_updates(updates, headers, embedding, head, num_embeddings=num_embeddings)
    dtype = dtype or weights.read(stored).dtype
    in_nf4 = {names.of(f"{name}.weight") for name in linear_layers(model)} if load_in_4bit else set()

    with atomic_folder(save_path) as output:
        writer = ShardWriter(output, max_shard_size)
        progress = tqdm(
            weights.tensors(), total=len(weights.file_of), desc="merge", disable=not is_main_process(), unit="tensor"
        )
        for name, weight in progress:
            is_old_buffer = name.endswith(OLD_BUFFERS) and name not in names.weights
            if is_old_buffer or (is_tied and name == head != stored):
                continue
            name = embedding if name == stored else name
            weight = grown(weight, num_embeddings) if name in (embedding, head) else weight
            writer.add(name, updated(name, weight, updates, dtype=dtype, in_nf4=name in in_nf4))
        if is_untied_now:
            old = grown(weights.read(stored), num_embeddings)
            writer.add(head, updated(head, old, updates, dtype=dtype, in_nf4=False).clone())
        writer.finish()
        config.tie_word_embeddings = is_tied and not is_untied_now
        config.vocab_size = num_embeddings
        config.dtype = dtype
        config.architectures = [type(model).__name__]
        save_config(config, output)
        copy_companions(folder, Path(adapter_name_or_path), output, config, with_code=trust_remote_code)
        record = {
            "base_model_name_or_path": base,
            "adapter_name_or_path": str(adapter_name_or_path),
            "merged_into": "nf4" if load_in_4bit else "base weights",
            "dtype": str(dtype).removeprefix("torch."),
            "context_size": context_length(config),
            "rope_parameters": config.rope_parameters,
            "num_lora_weights": len(updates.matrices),
            "replaced_weights": sorted(updates.replacements),
            "tie_word_embeddings": config.tie_word_embeddings,
            "versions": software_versions(),
        }
        write_json(output / MERGE_RECORD, record)
    return record


def check_updates(
    updates: AdapterUpdates, base: dict[str, torch.Tensor], embedding: str, head: str | None, *, num_embeddings: int
) -> None:
    """Raise ValueError for an update of a weight that the base does not have, or has in another shape.

    base: the headers of its weights; a tied output embedding `head` is not among them, and has the shape of
    `embedding`.
    """
    shapes = {name: list(tensor.shape) for name, tensor in base.items()}
    shapes[embedding] = [num_embeddings, *shapes[embedding][1:]]
    if head:
        shapes[head] = shapes[embedding]
    unmatched = sorted(updates.names - shapes.keys())
    if unmatched:
        raise ValueError(
            f"adapter_name_or_path: the adapter changes {unmatched[0]!r}, which the base model does not have "
            f"({len(unmatched)} such weights); give the base model of the adapter"
        )
    for name in sorted(updates.names):
        if not updates.fits(name, shapes[name]):
            raise ValueError(
                f"adapter_name_or_path: the adapter's weights for {name!r} do not fit the base model's {shapes[name]}; "
                "give the base model of the adapter"
            )


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
    tokenizer_source = adapter if (adapter / "tokenizer_config.json").is_file() else base
    # The sentencepiece model of the base too, which adapter folders of earlier versions lack.
    files = [*base.glob("tokenizer.model"), base / "generation_config.json"]
    files += [file for pattern in TOKENIZER_FILES for file in tokenizer_source.glob(pattern)]
    if with_code and getattr(config, "auto_map", None):
        files += base.glob("*.py")
    for file in files:
        if file.is_file():
            shutil.copyfile(file, output / file.name)
    run_record = read_run_record(adapter)
    if run_record is not None:
        save_run_record(output, run_record)
    mend_tokenizer_config(output, model_max_length=context_length(config))
