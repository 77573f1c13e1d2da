"""config.json and tokenizer files that transformers 5 and 4, vLLM, SGLang and llama.cpp read alike (docs/serving.md).

Every folder with a model or an adapter is written through `save_config` and `save_tokenizer`.
"""

import shutil
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from longqlora.files import read_json, write_json
from longqlora.model.rope_scaling import Rope

# transformers 4's names of what transformers 5 keeps in `rope_parameters`, by model type; others are the same.
OLD_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
# How the tokenizer was loaded, which transformers 5 writes beside what it is.
LOADING = ("backend", "is_local", "local_files_only")


def save_config(config: PretrainedConfig, folder: str | Path) -> None:
    """Write config.json to `folder`."""
    config.save_pretrained(folder)
    path = Path(folder) / "config.json"
    values = read_json(path)
    # transformers would take the base checkpoint, quantised when it was loaded, for one that is stored in 4 bit.
    values.pop("quantization_config", None)
    write_json(path, {**values, **keys_of_other_readers(values)})


def keys_of_other_readers(values: dict) -> dict:
    """What to add to the values of a config.json that transformers 5 wrote, so that others read the same from it.

    transformers 4 knows `rope_theta` and `rope_scaling` only. max_position_embeddings becomes the length reached, but
    with dynamic RoPE, which transformers scales from there. vLLM and SGLang multiply by a linear factor, and take the
    length to multiply from `max_seq_len` where there is one.
    """
    rope, added = values.get("rope_parameters") or {}, {}
    is_gemma, is_by_layer_type = values["model_type"].startswith("gemma3"), "full_attention" in rope
    if is_gemma and is_by_layer_type:
        added["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = (rope["full_attention"] or {}) if is_by_layer_type else rope
    # Cohere Compass is no type of theirs, and its own config would take `rope_scaling` for all that there is.
    if "rope_theta" not in rope or (is_by_layer_type and "mrope_section" in rope):
        return {}
    old_names = OLD_NAMES.get(values["model_type"], {})
    plain = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    added |= {old_names.get(name, name): value for name, value in plain.items()}
    scaling = {name: value for name, value in rope.items() if name not in plain}
    if scaling.keys() > {"rope_type"}:
        added["rope_scaling"] = scaling
    length = values.get("max_position_embeddings")
    if is_gemma or length is None or rope["rope_type"] == "dynamic":
        return added
    original = values.get("original_max_position_embeddings")
    added["max_position_embeddings"] = Rope(rope, length, original).context_length
    if rope["rope_type"] == "linear":
        added["original_max_position_embeddings"] = original or length
        added["max_seq_len"] = int(added["max_position_embeddings"] / rope["factor"])
    return added


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the tokenizer's files to `folder`, and the sentencepiece model that it was read with."""
    tokenizer.save_pretrained(folder)
    changes = {}
    if isinstance(tokenizer, PreTrainedTokenizerFast) and type(tokenizer).__module__.startswith("transformers."):
        # The named classes of transformers 4 add BOS to whatever tokenizer.json says; this one follows it.
        added = {str(token_id): token.__getstate__() for token_id, token in tokenizer.added_tokens_decoder.items()}
        changes = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added}
    complete_tokenizer_config(folder, **changes)
    source = Path(getattr(tokenizer, "vocab_file", None) or "")
    if source.suffix == ".model" and source.is_file():
        shutil.copyfile(source, Path(folder) / source.name)


def complete_tokenizer_config(folder: str | Path, **changes) -> None:
    """Put tokenizer_config.json, where `folder` has one, into words that transformers 4 knows too, with `changes`."""
    path = Path(folder) / "tokenizer_config.json"
    if not path.is_file():
        return
    values = {name: value for name, value in read_json(path).items() if name not in LOADING} | changes
    if values.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        # transformers 4 would add token_type_ids, which generate() refuses for these models.
        values.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    write_json(path, values)
