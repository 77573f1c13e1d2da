"""Proof that what replaces a part of a model computes the same: on a small copy and a short input, before it is used.

A binding replaces attention or whole decoder layers. A model type may do there what the replacement does not (sinks,
soft caps, another RoPE layout), and training would go on, silently wrong. So each binding is refused by name where it
differs from stock transformers on a copy.

The copy has the model's class, layer kinds and RoPE, few heads, narrow MLPs and random float32 weights, on the CPU.
In float32 two ways to compute the same agree to 1e-5, where the rounding of a deep 16-bit model would hide a soft cap.
The model may be on the meta device, in NF4 or split by ZeRO-3; nothing of it changes. It takes 0.05 s for the demo's
model and 1 s for a Llama-2-7B. What the copy does not show is the kernel of another device or dtype.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from transformers import PretrainedConfig, PreTrainedModel

from longqlora.attention.model_internals import check_heads, uses_attention_interface
from longqlora.device import is_out_of_memory

Bind = Callable[[torch.nn.Module], None]

# Of the largest value; float32 leaves 1e-5, a missing soft cap 5e-3.
TOLERANCE = 1e-3
NUM_TOKENS = 12
FIRST_DOCUMENT = 7

# Of each attribute that a config has, the largest value; head dims and all that RoPE reads stay.
LARGEST = {
    "vocab_size": 64, "vocab_size_per_layer_input": 64, "intermediate_size": 32, "ffn_hidden_size": 32, "ffn_dim": 32,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "intermediate_size_mlp": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
    # As many experts as a token takes, so that rounding cannot change which.
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2, "num_experts_per_tok": 2,
    "moe_k": 2, "n_group": 1, "topk_group": 1, "zero_expert_num": 0,
    # Shorter than an input, so that a layer without its window or its choice of keys shows.
    "sliding_window": 4, "index_topk": 4, "keep_window_size": 4, "index_block_size": 4, "index_topk_blocks": 2,
    "index_kpool": 2,
    # The vocabulary is smaller than their ids.
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NUM_HEADS = 4
DROPOUTS = ("dropout", "pdrop", "jitter_noise", "jitter_eps")


def prove_attention(
    model: PreTrainedModel, method: str, bind: Bind, *, fix: str, is_packed: bool = False, reads_blocks: bool = False
) -> None:
    """Raise ValueError unless a copy of `model` has the stock logits after `bind(copy)`, in training and evaluation.

    method: the binding's name in the message; fix: what to use instead. is_packed: a row of two documents must equal
    each alone; reads_blocks: an input, longer too, must read the same in two blocks against the cache.
    """
    small, inputs, longer = tiny_copy(model), trial_inputs(is_packed=is_packed), trial_inputs(2 * NUM_TOKENS)
    ids, pairs = inputs["input_ids"], []
    with torch.no_grad(), refusing(model, method, fix):
        documents = ids.split([FIRST_DOCUMENT, NUM_TOKENS - FIRST_DOCUMENT], dim=1) if is_packed else [ids]
        stock, alone = logits(small, ids), torch.cat([logits(small, document) for document in documents], dim=1)
        bind(small)
        for is_training in (True, False):
            small.train(is_training)
            pairs.append((logits(small, ids), stock))
            if is_packed:
                pairs.append((logits(small, **inputs), alone))
        if reads_blocks:
            pairs.append((logits_in_blocks(small, ids), stock))
            pairs.append((logits_in_blocks(small, **longer), logits(small, **longer)))
        check_equal(pairs)


@contextmanager
def refusing(model: PreTrainedModel, method: str, fix: str) -> Iterator[None]:
    """Turn what goes wrong within into one ValueError that names model type, method and fix."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{method} does not suit {model.config.model_type}: {text}; {fix}") from error


def check_equal(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Raise ValueError where ours and stock, float32 of equal shapes, differ by more than TOLERANCE."""
    worst = max(float((ours - stock).abs().max() / stock.abs().max()) for ours, stock in pairs)
    if not worst <= TOLERANCE:
        raise ValueError(
            f"on {NUM_TOKENS} tokens it differs from the stock model by {worst:.2g} of the largest value "
            f"(at most {TOLERANCE:g} is rounding)"
        )


def trial_inputs(num_tokens: int = NUM_TOKENS, *, is_packed: bool = False) -> dict[str, torch.Tensor]:
    """Fixed random input_ids [1, num_tokens] for a copy, and where is_packed the position_ids of two documents."""
    inputs = {"input_ids": torch.randint(3, 60, (1, num_tokens), generator=torch.Generator().manual_seed(0))}
    return {**inputs, "position_ids": torch.arange(num_tokens)[None] % FIRST_DOCUMENT} if is_packed else inputs


def logits(model: torch.nn.Module, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
    return model(input_ids=input_ids, use_cache=False, **inputs).logits


def logits_in_blocks(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of input_ids read in two blocks against the cache."""
    first = model(input_ids=input_ids[:, :FIRST_DOCUMENT], use_cache=True)
    rest = model(input_ids=input_ids[:, FIRST_DOCUMENT:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat((first.logits, rest.logits), dim=1)


def outputs_and_gradients(model: torch.nn.Module, **inputs) -> list[torch.Tensor]:
    """Logits, and the gradients of a sum over them with respect to all that is trained."""
    found = logits(model, **inputs)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [found.detach(), *torch.autograd.grad(found.sin().sum(), trained)]


def tiny_copy(model: PreTrainedModel, *, num_layers: int | None = None, drops: bool = False) -> PreTrainedModel:
    """A random float32 model on the CPU in eval mode, of the class of `model`: all its layers, 4 heads, narrow MLPs.

    Only the config of `model` is read. num_layers: the first ones only; drops: keep the dropout rates, which are 0
    otherwise. Raises ValueError where the model's class does not take such a config.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    for name in [] if drops else [name for name in config.to_dict() if name.endswith(DROPOUTS)]:
        setattr(config, name, 0.0)
    trial = refusing(model, "model_name_or_path: a trial on a small copy", "give another model_name_or_path")
    with trial, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        shrink(config)
        small = type(model)(config).float().eval()
        randomise(small)
    if uses_attention_interface(model):
        small.set_attn_implementation("eager")
    return small


def shrink(config: PretrainedConfig) -> None:
    """Make `config` that of a narrow model; the number of layers, head dim and RoPE stay."""
    check_heads(config)
    num_heads = config.num_attention_heads
    config.num_attention_heads = min(NUM_HEADS, num_heads)
    config.hidden_size = config.hidden_size // num_heads * config.num_attention_heads
    for name in ("num_key_value_heads", "num_kv_heads"):
        num_kv_heads = getattr(config, name, None)
        if num_kv_heads:
            # Keys are shared by two heads, by all or by none, as in the model.
            setattr(config, name, config.num_attention_heads if num_kv_heads == num_heads else min(num_kv_heads, 2))
    if getattr(config, "mamba_d_head", None) and not getattr(config, "mamba_d_ssm", None):
        # Mamba's heads make up a multiple of the width.
        config.mamba_n_heads = config.mamba_expand * config.hidden_size // config.mamba_d_head
    parts = [part for key in config.sub_configs if (part := getattr(config, key, None)) is not None]
    for part in (config, *parts):
        for name, largest in LARGEST.items():
            value = getattr(part, name, None)
            if (isinstance(value, int) and value > largest) or (isinstance(value, list) and name.endswith("_token_id")):
                setattr(part, name, largest)
    for part in parts:
        # Encoders of images and sound (Phi-4), which see nothing of a text.
        for name in {"num_hidden_layers", "num_blocks"} & {*part.to_dict()}:
            setattr(part, name, min(2, getattr(part, name)))
        if config.model_type == "dbrx":
            # They repeat sizes of the whole.
            sizes = {"kv_n_heads": config.num_key_value_heads, "hidden_size": config.hidden_size}
            for name in sizes.keys() & {*part.to_dict()}:
                setattr(part, name, sizes[name])


def randomise(model: PreTrainedModel) -> None:
    """Give every parameter random values of a size at which attention is neither flat nor sharp, biases included."""
    parameters = list(model.parameters())
    # Slices of one draw: a model of 80 layers has as many numbers as take seconds to draw.
    largest = max(p.numel() for p in parameters)
    noise = torch.randn(largest + 2**16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for index, p in enumerate(parameters):
            values = noise[index * 997 % 2**16 :][: p.numel()].view_as(p)
            # Vectors stay around what the class starts from: norm weights are 1, or 0 where they are added to 1.
            p.add_(values, alpha=0.2) if p.ndim < 2 else p.copy_(values).mul_(1.5 * p.shape[-1] ** -0.5)
