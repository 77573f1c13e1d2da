"""Dual chunk attention (DCA): a model reads far beyond its pretraining length with no training (arXiv 2402.17463).

The sequence is cut into chunks of s tokens, s = chunk_size - local_window. A key has the position j mod s, so that
no position exceeds what pretraining showed. A query has three positions, by the chunk of the key:

    same chunk        i mod s
    the chunk before  min(i mod s + s, chunk_size): distances to the last local_window tokens stay exact
    earlier chunks    min(2 s - 1, chunk_size), the largest one

as in the authors' code (HKUNLP/ChunkLlama, chunkllama_attn_replace.py, commit 15c5787c79ee726d6edeaae838f5d8cb5adb3187;
section 3 of the paper counts one less at the upper end). Each of the three is an attention of its own, merged by
log-sum-exp: memory is linear in the length, gradients are exact, and a key/value cache holds each key once. Query and
key come rotated by RoPE at position mod s; the other two queries are that query rotated further.

Pure maths: knows nothing of Hugging Face.
Dimensions: B batch, H query heads, K key/value heads (K divides H), Q queries, S keys, D head dim, R frequencies.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from longqlora.attention import merged
from longqlora.attention.merged import KeyRange, QueryBlock, merged_attention
from longqlora.attention.rotation import LLAMA_LAYOUT, QueryRotation, query_rotation
from longqlora.attention.sdpa import sum_dtype
from longqlora.attention.segments import segment_runs
from longqlora.settings.config import DEFAULT_MSCALE, MSCALES

# Rows computed together: enough to fill a GPU, few enough that what is held beside the output stays small.
ROWS_PER_BLOCK = 8192


@dataclass(frozen=True)
class DualChunkSizes:
    """Sizes in tokens: chunk_size and local_window are 3/4 and 1/8 of pretraining_length unless given.

    Raises ValueError, naming the setting, unless 0 < local_window < chunk_size <= pretraining_length.
    """

    pretraining_length: int
    chunk_size: int | None = None
    local_window: int | None = None

    def __post_init__(self) -> None:
        self.settle("pretraining_length", None, 8, None, "the tokens that the model reads without dual chunk attention")
        length = self.pretraining_length
        self.settle("chunk_size", length * 3 // 4, 1, length, "so that no distance is new; the authors use 3/4 of it")
        self.settle("local_window", length // 8, 1, self.chunk_size - 1, "less than chunk_size")

    def settle(self, name: str, default: int | None, least: int, most: int | None, reason: str) -> None:
        """Check one size and fill in its default; the dataclass is frozen so that it can be a key."""
        value = default if getattr(self, name) is None else getattr(self, name)
        if not isinstance(value, int) or value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"{least} to {most}"
            raise ValueError(f"{name}: must be a whole number of tokens, {limits} ({reason}), got {value!r}")
        object.__setattr__(self, name, value)

    @property
    def stride(self) -> int:
        """Tokens per chunk: s."""
        return self.chunk_size - self.local_window

    @property
    def inter_position(self) -> int:
        """The query position towards all chunks before the previous one."""
        return min(2 * self.stride - 1, self.chunk_size)


def dual_chunk_attention(
    query, key, value, *, inv_freq, sizes: DualChunkSizes, layout=LLAMA_LAYOUT, scaling: float | None = None,
    segment_ids=None,
) -> torch.Tensor:  # fmt: skip
    """DCA of the last Q of S positions: a whole prompt, a later block of it, or one decoded token.

    query [B, H, Q, D] and key [B, K, S, D], rotated at (position in the sequence) mod `sizes.stride`; value
    [B, K, S, D]. inv_freq: [R], radians per position, as the model's own RoPE has it; layout: of its pairs.
    scaling: factor of the logits, 1 / sqrt(D) by default.
    segment_ids: int [B, S], for padded batches and packed rows: each run of equal ids in a row is a sequence that
        starts at position 0; negative ids are padding, whose output is zero and has no gradient.
    Returns [B, H, Q, D] in the dtype of query, laid out in memory as [B, Q, H, D].
    """
    num_keys, past, inv_freq = key.shape[2], key.shape[2] - query.shape[2], inv_freq.to(query.device)
    assert past >= 0, "more queries than keys"
    # Tells the cache of rotations that frequencies were changed in place; inference tensors do not count changes.
    version = None if inv_freq.is_inference() else inv_freq._version
    rotation = partial(chunk_rotation, sizes, inv_freq, version, layout, sum_dtype(query))
    if segment_ids is None and num_keys <= sizes.stride:
        return merged.causal_attention_with_past(query, key, value, scaling=scaling)
    blocks: list[QueryBlock] = []
    for row, runs in enumerate([[(0, num_keys)]] if segment_ids is None else segment_runs(segment_ids)):
        start, batch = 0, merged.ALL if segment_ids is None else slice(row, row + 1)
        for segment_id, length in runs:
            first, places = max(past - start, 0), {"query_shift": start - past, "key_shift": start}
            if segment_id >= 0:
                blocks += sequence_blocks(first, length, sizes, rotation, batch=batch, **places)
            start += length
    return merged_attention(query, key, value, blocks, scaling=scaling)


def sequence_blocks(
    first: int, end: int, sizes: DualChunkSizes, rotation: Callable, *, query_shift: int, key_shift: int, batch: slice
) -> Iterator[QueryBlock]:
    """Blocks for positions [first, end) of a sequence, of which p is query row p + query_shift and key p + key_shift.

    rotation: `chunk_rotation` with its first arguments; batch: the range of batch rows.
    """
    s, start = sizes.stride, first
    while start < end:
        chunk, offset = divmod(start, s)
        num_rows = min(s - offset, end - start)  # of each chunk
        num_chunks = max(1, min((end - start) // s, ROWS_PER_BLOCK // s)) if offset == 0 else 1
        stop, next_chunk = start + num_chunks * num_rows, chunk + num_chunks
        if num_rows == 1 and offset:
            seen = [((start, stop), (chunk * s, stop), {})]
        else:
            seen = [((start, stop), (start, stop), {"is_causal": True, "num_chunks": num_chunks})]
            seen += [((start, stop), (chunk * s, start), {})] if offset else []
        if next_chunk > 1:
            first_next = max(chunk, 1)
            options = {"num_chunks": next_chunk - first_next, "rotation": rotation(offset, num_rows, "previous")}
            seen.append(((max(start, s), stop), ((first_next - 1) * s, (next_chunk - 1) * s), options))
        for later in range(max(chunk, 2), next_chunk):
            begin, options = max(start, later * s), {"rotation": rotation(offset, num_rows, "earlier")}
            seen.append(((begin, begin + num_rows), (0, (later - 1) * s), options))
        key_ranges = [
            KeyRange(slice(*(x - start for x in rows)), slice(*(x + key_shift for x in keys)), **options)
            for rows, keys, options in seen
        ]
        yield QueryBlock(batch, slice(start + query_shift, stop + query_shift), key_ranges)
        start = stop


# Every layer asks for the same few: those of whole chunks, and those of a shorter end or a decoded token.
@lru_cache(maxsize=4)
def chunk_rotation(
    sizes: DualChunkSizes, inv_freq, version, layout, dtype, offset: int, num_rows: int, keys: str
) -> QueryRotation:
    """From the positions offset, ..., offset + num_rows - 1 in a chunk to those towards `keys` (previous, earlier)."""
    positions = torch.arange(offset, offset + num_rows, device=inv_freq.device)
    targets = (positions + sizes.stride).clamp_max(sizes.chunk_size) if keys == "previous" else sizes.inter_position
    return query_rotation(targets - positions, inv_freq.detach(), dtype, layout)


def attention_mscale(num_tokens: int, pretraining_length: int, name: str = DEFAULT_MSCALE) -> float:
    """Factor of the logits for long inputs, to be multiplied into `scaling`; the paper's figures are without it.

    Query and key are each scaled by c ln(num_tokens / pretraining_length) + 1 (1 up to that length), c being
    MSCALES[name]. One number of tokens must serve a whole text, decoding included.
    """
    scale = num_tokens / pretraining_length
    return 1.0 if scale <= 1 else (MSCALES[name] * math.log(scale) + 1.0) ** 2
