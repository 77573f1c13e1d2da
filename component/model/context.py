"""Give a config the context that a run or a command line asks for: RoPE scaling, and dual chunk attention on top.

Both are written into the config and travel with every saved model: RoPE in `rope_parameters`, dual chunk
attention in `dual_chunk_attention_config`, the key and the names of Qwen2.5-1M's configs.
"""

from dataclasses import fields, replace
from pathlib import Path

from transformers import PretrainedConfig

from longqlora.attention.dual_chunk import DualChunkSizes
from longqlora.attention.dual_chunk_binding import CONFIG_KEY as DUAL_CHUNK_KEY
from longqlora.attention.dual_chunk_binding import set_dual_chunk
from longqlora.attention.model_internals import config_of_full_layers, has_sliding_window
from longqlora.distributed import print_notice
from longqlora.model.adapter_folder import base_model_of
from longqlora.model.base import load_config
from longqlora.model.context_request import ContextRequest
from longqlora.model.rope_scaling import Rope, scale_rope
from longqlora.reading import cause_of
from longqlora.settings.config import Settings

# The shortest length that a released model was pretrained with (Llama).
SHORTEST_PRETRAINING = 2048
ROPE_KEYS = tuple(field.name for field in fields(Rope))
# Whatever config.json says of these, in the config itself or a part of it, is a positive number.
LENGTHS = {
    *ROPE_KEYS[1:], "rope_theta", "factor", "chunk_size", "local_size", "partial_rotary_factor", "attention_factor",
    "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor",
}  # fmt: skip
LARGEST_LENGTH = 1e15
# The kind of layers whose RoPE is scaled, where rope_parameters are given by kind (Gemma 3, OLMo 3): of sliding-window
# layers no distance grows.
SCALED_LAYERS = "full_attention"
# Models whose full-attention layers have no RoPE, where others have a window (`if self.sliding_window` around RoPE in
# their modeling files): every distance that RoPE sees fits the window.
ROPE_IN_WINDOWS = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone4_5_text", "exaone_moe", "flint", "kolibri1")


def rope_of(config: PretrainedConfig) -> Rope:
    """What `config` says of RoPE; of the full-attention layers', where it differs by kind of layer."""
    values = {key: getattr(config, key, None) for key in ROPE_KEYS}
    parameters = values["rope_parameters"] or {}
    if isinstance(parameters, dict) and SCALED_LAYERS in parameters:
        parameters = parameters[SCALED_LAYERS] or {}
    return Rope(**{**values, "rope_parameters": parameters})


def rope_that_follows_length(config: PretrainedConfig) -> str | None:
    """The type of RoPE, where its angles depend on the length of the text that is read; None for others."""
    rope_type = rope_of(config).rope_parameters.get("rope_type")
    return rope_type if rope_type in ("dynamic", "longrope") else None


def set_rope(config: PretrainedConfig, rope: Rope) -> None:
    """Let `config` say `rope`, as `rope_of` reads it."""
    if SCALED_LAYERS in config.rope_parameters:
        rope = replace(rope, rope_parameters={**config.rope_parameters, SCALED_LAYERS: rope.rope_parameters})
    for key in ROPE_KEYS:
        setattr(config, key, getattr(rope, key))


def context_length(config: PretrainedConfig) -> int:
    """Tokens that the model reads with the attention and RoPE its config names."""
    dual_chunk = getattr(config, DUAL_CHUNK_KEY, None) or {}
    return dual_chunk.get("max_position_embeddings") or rope_of(config).context_length


def apply_context(config: PretrainedConfig, request: ContextRequest) -> str:
    """Set RoPE and dual chunk attention in `config`; returns a one-line description for the log. Twice is the same as
    once. Raises ValueError, naming the setting, for what the model cannot be given."""
    check_lengths_of(config)
    complete_lengths(config)
    is_dual_chunk = getattr(config, DUAL_CHUNK_KEY, None) is not None
    if request.attention == "dca" or (request.attention == "auto" and is_dual_chunk):
        return apply_dual_chunk(config, request)
    for name in ("pretraining_length", "dca_chunk_size", "dca_local_window", "dca_mscale"):
        if getattr(request, name):
            raise ValueError(f"{name}: has an effect with attention: dca only")
    if is_dual_chunk:
        delattr(config, DUAL_CHUNK_KEY)
    return extend_rope(config, request.context_size, request.rope_type, request.rope_theta)


def check_lengths_of(config: PretrainedConfig) -> None:
    """Raise ValueError for a length, factor or base in `config` that is no positive number."""
    dual_chunk = getattr(config, DUAL_CHUNK_KEY, None) or {}
    source = f"model_name_or_path: config.json of {config.name_or_path!r}"
    if not isinstance(dual_chunk, dict):
        raise ValueError(f"{source} has {DUAL_CHUNK_KEY} {dual_chunk!r:.200}, not its sizes; correct it")
    rope = vars(rope_of(config))
    if not isinstance(rope["rope_parameters"], dict):
        raise ValueError(f"{source} has rope_parameters {rope['rope_parameters']!r:.200}, not its settings; correct it")
    parts = {"": rope, "rope_parameters.": rope["rope_parameters"], f"{DUAL_CHUNK_KEY}.": dual_chunk}
    for part, values in parts.items():
        for name in {*values} & LENGTHS:
            value = values[name]
            if value is not None and not (isinstance(value, int | float) and 0 < value < LARGEST_LENGTH):
                raise ValueError(f"{source} has {part}{name} {value!r:.200}, no positive number; correct it")


def complete_lengths(config: PretrainedConfig) -> None:
    """Where config.json gives one length for two things, take the other from what it implies.

    Qwen2.5-1M's max_position_embeddings is what chunks reach: RoPE reaches the original length. Linear RoPE without an
    original length is read as LongLoRA writes it; a notice says so where it can be read the other way.
    """
    known, rope = getattr(config, DUAL_CHUNK_KEY, None), rope_of(config)
    if known and "max_position_embeddings" not in known and "original_max_position_embeddings" in known:
        setattr(config, DUAL_CHUNK_KEY, {**known, "max_position_embeddings": config.max_position_embeddings})
        config.max_position_embeddings = known["original_max_position_embeddings"]
    parameters, length = rope.rope_parameters, config.max_position_embeddings
    says_original = "original_max_position_embeddings" in (*parameters, *config.to_dict())
    factor = parameters.get("factor") or 1
    original = int(length / factor)
    if parameters.get("rope_type") == "linear" and not says_original and original >= SHORTEST_PRETRAINING:
        print_notice(
            f"config.json says {length} tokens and linear RoPE x{factor:g}, read as {rope_of(config).context_length} "
            f"tokens; if {length} is what it reaches, add original_max_position_embeddings: {original} to it"
        )


def apply_dual_chunk(config: PretrainedConfig, request: ContextRequest) -> str:
    known = getattr(config, DUAL_CHUNK_KEY, None) or {}
    own_length = rope_of(config).context_length
    pretraining = request.pretraining_length or known.get("original_max_position_embeddings") or own_length
    text = "RoPE kept"
    if request.rope_type is not None:
        if not request.pretraining_length:
            raise ValueError("pretraining_length: missing; with dca, a rope_type scales RoPE that far, and no further")
        text = extend_rope(config, pretraining, request.rope_type, request.rope_theta)
    elif pretraining > own_length:
        raise ValueError(f"pretraining_length: beyond the model's {own_length} tokens; lower it, or give a rope_type")
    # Sizes that a config names belong to its own pretraining length.
    known_sizes = known if pretraining == known.get("original_max_position_embeddings", pretraining) else {}
    try:
        sizes = DualChunkSizes(
            pretraining_length=pretraining,
            chunk_size=request.dca_chunk_size or known_sizes.get("chunk_size"),
            local_window=request.dca_local_window or known_sizes.get("local_size"),
        )
    except ValueError as error:
        raise ValueError(f"{'' if str(error).startswith('pretraining_length') else 'dca_'}{error}") from None
    context_size = request.context_size or (context_length(config) if known else pretraining)
    set_dual_chunk(config, sizes, context_size, request.dca_mscale or known.get("mscale"))
    return f"context of {context_length(config)} tokens by dual chunk attention over {pretraining}; {text}"


def extend_rope(
    config: PretrainedConfig, target: int | None, rope_type: str | None = None, rope_theta: float | None = None
) -> str:
    """Set RoPE for `target` tokens in `config`; returns a one-line description for the log.

    The original length and base are remembered in the config, as `original_max_position_embeddings` and
    `original_rope_theta`, and travel with every saved config. None leaves the config as it is.
    """
    rope = rope_of(config)
    if target is None:
        if rope_type is not None:
            raise ValueError(f"rope_type: {rope_type} has no effect without a context to reach; give its length too")
        return f"context of {rope.context_length} tokens, RoPE unchanged"
    if "rope_theta" not in rope.rope_parameters:
        has = "no single set of RoPE parameters" if rope.rope_parameters else "no rotary position embeddings"
        raise ValueError(f"model_max_length: {config.model_type} has {has} to scale")
    layers = config_of_full_layers(config)
    head_dim = getattr(layers, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary_dim = int(head_dim * rope.rope_parameters.get("partial_rotary_factor", 1.0))
    if rope_type is None and config.model_type in ROPE_IN_WINDOWS and has_sliding_window(config):
        if target > rope.context_length:
            set_rope(config, replace(rope, max_position_embeddings=target))
        return f"context of {target} tokens, RoPE unchanged: {config.model_type} has it in sliding windows only"
    scaled = scale_rope(rope, target, rotary_dim=rotary_dim, rope_type=rope_type, rope_theta=rope_theta)
    parameters = scaled.rope_parameters
    if scaled.context_length == rope.context_length and parameters == rope.rope_parameters:
        return f"context of {target} tokens fits the model's {rope.context_length}, RoPE unchanged"
    set_rope(config, scaled)
    if getattr(layers, "head_dim", 0) is None:
        # transformers 5.23 multiplies it by the part that is rotated in YaRN and dynamic NTK (Mixtral).
        config.head_dim = head_dim
    try:
        # What transformers would refuse when it loads or saves the config.
        config.validate_rope()
    except Exception as error:
        kind = f"{config.model_type} takes no RoPE of type {parameters['rope_type']}"
        raise ValueError(f"rope_type: {kind} ({cause_of(error)}); use ntk, or theta") from error
    factor = parameters.get("factor")
    how = f"{parameters['rope_type']} x{factor:g}" if factor else f"base {parameters['rope_theta']:g}"
    return f"context {scaled.original_length} -> {target} tokens, RoPE {how}"


def copy_context(source: PretrainedConfig, target: PretrainedConfig) -> None:
    """Give the config `target` all that says how far the model of `source` reads."""
    for name in (*ROPE_KEYS, DUAL_CHUNK_KEY):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
        elif hasattr(target, name):
            delattr(target, name)


def load_extended_config(settings: Settings) -> tuple[PretrainedConfig, str]:
    """Config of the base model with the context of the run, and a one-line description for the log."""
    attention = "dca" if settings.attention.attention == "dca" else "full"
    values = {**vars(settings.context), **vars(settings.attention), "attention": attention}
    values["context_size"] = settings.context.model_max_length
    if values["context_size"] is None and attention != "dca":
        # Without a length to reach they have no effect, which the checks say.
        values |= {"rope_type": None, "rope_theta": None}
    request = ContextRequest(**{field.name: values[field.name] for field in fields(ContextRequest)})
    config = load_config(settings.model.model_name_or_path, trust_remote_code=settings.model.trust_remote_code)
    return config, apply_context(config, request)


def resolve_config(
    model_name_or_path: str | None,
    adapter_name_or_path: str | None = None,
    context: ContextRequest | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[str, PretrainedConfig]:
    """Base model and its config with the context of the adapter, changed as `context` asks."""
    # Read where the base is given too: a folder that is no adapter is refused here.
    named_base = base_model_of(adapter_name_or_path) if adapter_name_or_path else None
    base = model_name_or_path or named_base
    if not base:
        raise ValueError("model_name_or_path: name the base model; the adapter folder does not")
    config = load_config(base, trust_remote_code=trust_remote_code)
    if adapter_name_or_path and (Path(adapter_name_or_path) / "config.json").is_file():
        saved = load_config(adapter_name_or_path, trust_remote_code=trust_remote_code)
        for name in ("model_type", "hidden_size", "num_hidden_layers"):
            if getattr(saved, name, None) != getattr(config, name, None):
                raise ValueError(
                    f"model_name_or_path: {base!r} has {name} {getattr(config, name, None)}, but the adapter was "
                    f"trained on {getattr(saved, name, None)}; give the base model of the adapter"
                )
        # Folders written by other tools may carry it; it describes their loading, not the base checkpoint.
        if hasattr(saved, "quantization_config"):
            del saved.quantization_config
        # The base is loaded with its own vocabulary; `adapter_vocabulary` says what becomes of it.
        saved.vocab_size = config.vocab_size
        config = saved
    apply_context(config, context or ContextRequest())
    return base, config


def tokenizer_source(base: str, adapter_name_or_path: str | None) -> str:
    """Where the tokenizer is read from: the adapter folder where it has one, else the base."""
    has_own = adapter_name_or_path and (Path(adapter_name_or_path) / "tokenizer_config.json").is_file()
    return adapter_name_or_path if has_own else base
