"""Token ids and labels of conversations."""

from typing import Any

import numpy as np

from longqlora.data.prompt import encode_for_training


def encode_example(tokenizer: Any, messages: list[dict], template: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids and labels of a conversation, int32 [n]; None where an answer is empty.

    An empty answer would teach the model to stop at once. Labels are the answers and the EOS after each, -100
    elsewhere. Raises ValueError where the template refuses the conversation.
    """
    if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
        return None
    input_ids, labels = encode_for_training(tokenizer, messages, template=template)
    return np.array(input_ids, dtype=np.int32), np.array(labels, dtype=np.int32)
