"""Token ids of pretraining documents."""

from typing import Any

import numpy as np

from longqlora.data.prompt import bos_ids, encode_text, eos_id


def encode_document(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids and labels (the ids) of BOS + text + EOS, int32 [n]; None for a text without content."""
    if not text.strip():
        return None
    input_ids = np.array([*bos_ids(tokenizer), *encode_text(tokenizer, text), eos_id(tokenizer)], dtype=np.int32)
    return input_ids, input_ids.copy()
