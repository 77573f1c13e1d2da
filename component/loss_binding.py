"""Bind the chunked loss to a transformers model, for any model with a decoder and a plain output layer.

Dimensions: B batch, S sequence.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from component.loss import next_token_loss, token_loss


def bind_chunked_loss(model: PreTrainedModel) -> str:
    """Let `model(..., labels=...)` compute its loss without the logits of the whole sequence.

    Changes nothing for models whose head is more than one matrix product (bias, soft-capped or scaled
    logits). Returns a one-line description for the log.
    """
    head, config = model.get_output_embeddings(), model.config
    extra = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    if head is None or getattr(head, "bias", None) is not None or any(getattr(config, name, None) for name in extra):
        return f"stock loss: the output layer of {config.model_type} is more than one matrix product"
    model.forward = partial(chunked_loss_forward, model, model.forward)
    return "loss in chunks: the logits of the whole sequence are never held"


def chunked_loss_forward(
    model: PreTrainedModel,
    stock_forward: Callable,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> CausalLMOutputWithPast:
    """Forward pass of a causal language model; with labels int [B, S] it returns the loss and no logits.

    shift_labels int [B, S]: each token's next one, where several processes share a row; it takes the place of labels.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
    if labels is None:
        return stock_forward(**inputs)
    # With a cache transformers no longer sees from the position ids that rows are packed.
    inputs["use_cache"] = False
    head = model.get_output_embeddings()
    # An adapter on the head itself makes it more than one product; leave that case to the stock path.
    if hasattr(head, "lora_A"):
        if shift_labels is not None:
            inputs["shift_labels"] = shift_labels
        return stock_forward(**inputs, labels=labels, num_items_in_batch=num_items_in_batch)
    hidden = model.get_decoder()(**inputs).last_hidden_state
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    targets = {"labels": labels} if shift_labels is None else {"targets": shift_labels}
    loss = call_with(active_module(head), loss_of_head, hidden, num_items=num_items_in_batch, **targets)
    return CausalLMOutputWithPast(loss=loss)


def loss_of_head(head: nn.Module, hidden: torch.Tensor, **targets) -> torch.Tensor:
    weight = head.weight.to(hidden.dtype) if torch.is_autocast_enabled(hidden.device.type) else head.weight
    return (next_token_loss if "labels" in targets else token_loss)(hidden, weight, **targets)


def active_module(head: nn.Module) -> nn.Module:
    """The output layer itself where PEFT has wrapped it to train a copy."""
    return head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head


def call_with(module: nn.Module, function: Callable, *args, **kwargs) -> torch.Tensor:
    """function(module, ...) in the place of the module's own forward pass, with all its hooks.

    DeepSpeed ZeRO-3 has a weight in full only while its module is called.
    """
    own = module.__dict__.get("forward")
    module.forward = partial(function, module)
    try:
        return module(*args, **kwargs)
    finally:
        del module.forward
        if own is not None:
            module.forward = own
