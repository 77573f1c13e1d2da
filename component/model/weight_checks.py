"""Whether the files of a saved model hold the weights that its config.json describes, before any of them is loaded."""

from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging
from transformers.core_model_loading import revert_weight_conversion

from longqlora.distributed import print_notice
from longqlora.model.adapter_folder import ADAPTER_CONFIG, embedding_names
from longqlora.model.base import check_loaded, empty_model, model_source
from longqlora.model.weight_shards import WEIGHT_LAYOUTS, CheckpointNames, SavedWeights


def check_base(
    name_or_path: str,
    config: PretrainedConfig,
    model: PreTrainedModel | None = None,
    *,
    trust_remote_code: bool = False,
    needs_weights: bool = True,
) -> PreTrainedModel:
    """Check the weights in a model folder against `config`; returns the model without weights.

    model: that model, where it was made before; needs_weights: whether a folder without any is an error. Weights of a
    hub name are not looked at, nor those of a base that is saved quantised, which have other names. Raises ValueError
    naming the first weight that is missing, damaged, of another shape or quantised.
    """
    if model is None:
        model = empty_model(config, name=name_or_path, trust_remote_code=trust_remote_code)
    folder = Path(model_source(name_or_path))
    if folder.is_dir() and not getattr(config, "quantization_config", None):
        if needs_weights or has_weights(folder):
            weights = SavedWeights(folder)
            check_weights(weights, model, folder)
            untie_where_saved_apart(config, weights, model)
    if config.tie_word_embeddings != model.config.tie_word_embeddings:
        model = empty_model(config, name=name_or_path, trust_remote_code=trust_remote_code)
    return model


def untie_where_saved_apart(config: PretrainedConfig, weights: SavedWeights, model: PreTrainedModel) -> None:
    """Where config.json ties embeddings that differ in the files, let `config` say what transformers loads: both."""
    embedding, head = embedding_names(model)
    if head is None or not config.tie_word_embeddings:
        return
    names = [CheckpointNames(model, set(weights.file_of)).of(name) for name in (embedding, head)]
    if weights.file_of.keys() >= set(names) and not torch.equal(*map(weights.read, names)):
        config.tie_word_embeddings = False
        print_notice(f"tie_word_embeddings in config.json has no effect: {names[1]!r} is saved apart, and differs")


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for layout in WEIGHT_LAYOUTS for name in layout)


def check_weights(weights: SavedWeights, model: PreTrainedModel, folder: Path) -> None:
    """Check the names, shapes and types of `weights` by loading them into `model` as transformers would, on meta."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"model_name_or_path: {str(folder)!r} holds an adapter ({ADAPTER_CONFIG}); give it as adapter_name_or_path"
        )
    of_integers = {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    usable = {name: w for name, w in weights.headers.items() if w.is_floating_point() or name in of_integers}
    is_quantised = any(name.endswith("weight") for name in weights.headers.keys() - usable.keys())
    hint = "; it is saved quantised (stored as integers): give the 16-bit model" if is_quantised else "; is it whole?"
    verbosity, shows_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        _, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=usable,
            dtype=model.dtype,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError as error:
        # Parts that transformers puts together (experts) do not fit: one is missing, or of another shape.
        lacking = sorted(revert_weight_conversion(model, model.state_dict()).keys() - usable.keys())
        cause = f"lacks {lacking[0]!r}" if lacking else f"has weights that do not fit together ({error})"
        raise ValueError(f"model_name_or_path: {str(folder)!r} {cause}{hint}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:
            transformers_logging.enable_progress_bar()
    check_loaded(info, model, str(folder), hint=hint)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, source: str) -> None:
    """Refuse a tokenizer whose ids go beyond the model's embeddings: it was made for another model."""
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= num_embeddings:
        raise ValueError(
            f"model_name_or_path: the tokenizer of {source!r} has ids up to {last} ({token!r}), beyond the model's "
            f"{num_embeddings} embeddings; give a folder whose tokenizer belongs to the model"
        )
