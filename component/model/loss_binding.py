"""Bind the chunked loss to a transformers model, for any model with a decoder and a plain output layer.

The one method of transformers that this room replaces: `forward` of the loaded model, on the instance. No hook serves:
the stock forward pass projects every token before a hook sees its output, and PEFT, DeepSpeed and the Trainer call the
model, not a function of ours. What the replacement relies on: the arguments of forward, `get_decoder()` with its
`last_hidden_state`, `get_output_embeddings()`. Seen with transformers 5.20.2 and 5.23.0; each model is tried first,
on a small copy, and tests/model/test_library_internals.py says what another version changed.

Dimensions: B batch, S sequence.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from longqlora.attention.proof import tiny_copy, trial_inputs
from longqlora.device import is_out_of_memory
from longqlora.model.loss import next_token_loss

# Of the loss; float32 leaves 1e-7, a soft cap far above the logits 1e-4.
TOLERANCE = 1e-5


def bind_chunked_loss(model: PreTrainedModel) -> str:
    """Let `model(..., labels=...)` compute its loss without the logits of the whole sequence.

    Changes nothing for models that have another loss then, since their output layer is more than one matrix product
    (bias, soft-capped or scaled logits), or that cannot be tried. Returns a one-line description for the log.
    """
    try:
        small, ids = tiny_copy(model, num_layers=2), trial_inputs()["input_ids"]
        with torch.no_grad():
            stock = small(input_ids=ids, labels=ids, use_cache=False).loss
            chunked = chunked_loss_forward(small, small.forward, ids, labels=ids).loss
        is_same = torch.allclose(chunked, stock, rtol=TOLERANCE, atol=0)
    except Exception as error:
        # No copy is made of it, or the decoder or the output layer is not where the Llama family has it.
        if is_out_of_memory(error):
            raise
        is_same = False
    if not is_same:
        return f"stock loss: in chunks {model.config.model_type} was not seen to have the same"
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
    The Trainer drops columns of a batch that are not among the arguments here.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
    if labels is None:
        return stock_forward(**inputs)
    # With a cache transformers no longer sees from the position ids that rows are packed.
    inputs["use_cache"] = False
    head = model.get_output_embeddings()
    # An adapter on the head itself makes it more than one product; leave that case to the stock path.
    if hasattr(head, "lora_A"):
        shifted = {} if shift_labels is None else {"shift_labels": shift_labels}
        return stock_forward(**inputs, **shifted, labels=labels, num_items_in_batch=num_items_in_batch)
    hidden, weight = model.get_decoder()(**inputs).last_hidden_state, head.weight
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    is_shifted = shift_labels is not None
    targets = shift_labels if is_shifted else labels
    loss = next_token_loss(hidden, weight, targets, num_items=num_items_in_batch, is_shifted=is_shifted)
    return CausalLMOutputWithPast(loss=loss)
