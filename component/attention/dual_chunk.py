"""Dual chunk attention (DCA): a model reads far beyond its pretraining length with no training (arXiv 2402.17463).

The sequence is cut into chunks of s tokens, s = chunk_size - local_window. A key has the position j mod s, so
no position ever exceeds what pretraining showed. A query has three positions, by the chunk of the key:

    same chunk        i mod s
    the chunk before  min(i mod s + s, chunk_size): distances to the last local_window tokens stay exact
    earlier chunks    min(2 s - 1, chunk_size), the largest one

as in the authors' code (HKUNLP/ChunkLlama, chunkllama_attn_replace.py, commit 15c5787c79ee726d6edeaae838f5d8cb5adb3187;
section 3 of the paper counts one less at the upper end). Within one chunk it is plain causal attention. Each of the
three is an attention of its own, merged by log-sum-exp: memory is linear in the length, gradients are exact, and
a key/value cache holds the same keys whatever is asked of it later.

Query and key come rotated by RoPE at position mod s; the other two queries are that query rotated further.
Pure torch; the binding to transformers is in attention.py.

Dimensions: B batch, H query heads, K key/value heads (K divides H), Q queries, S keys, D head dim,
R frequencies (2 R <= D; `RotaryLayout` says which dimensions are pairs).

Pure maths: knows nothing of Hugging Face.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from longqlora.attention.merged import Block, Part, causal_attention_with_past, check_lengths, merged_attention
from longqlora.attention.sdpa import sum_dtype
from longqlora.attention.segments import segment_runs

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
        for name in ("pretraining_length", "chunk_size", "local_window"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (value is None and name != "pretraining_length"):
                raise ValueError(f"{name}: must be a whole number of tokens, got {value!r}")
        if self.pretraining_length < 8:
            raise ValueError(f"pretraining_length: must be at least 8 tokens, got {self.pretraining_length}")
        # The dataclass is frozen so that it can be a key; the defaults are filled in once, here.
        if self.chunk_size is None:
            object.__setattr__(self, "chunk_size", self.pretraining_length * 3 // 4)
        if self.local_window is None:
            object.__setattr__(self, "local_window", self.pretraining_length // 8)
        if not 0 < self.chunk_size <= self.pretraining_length:
            raise ValueError(
                f"chunk_size: must be positive and at most pretraining_length {self.pretraining_length}, "
                f"so that no distance is new to the model, got {self.chunk_size}; the authors use 3/4 of it"
            )
        if not 0 < self.local_window < self.chunk_size:
            raise ValueError(
                f"local_window: must be positive and less than chunk_size {self.chunk_size}, got {self.local_window}; "
                "the authors use 1/8 of pretraining_length"
            )

    @property
    def stride(self) -> int:
        """Tokens per chunk: s."""
        return self.chunk_size - self.local_window

    @property
    def inter_position(self) -> int:
        """The query position towards all chunks before the previous one."""
        return min(2 * self.stride - 1, self.chunk_size)


@dataclass(frozen=True)
class RotaryLayout:
    """Where RoPE's pairs lie in a head: pair d is (start + d, start + R + d) as in Llama, or, interleaved,
    (start + 2 d, start + 2 d + 1)."""

    start: int = 0
    is_interleaved: bool = False

    def pairs(self, x: torch.Tensor, num_freqs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [..., R] on the first and the second dimensions of all pairs of x [..., D]."""
        rotary = x[..., self.start : self.start + 2 * num_freqs]
        if self.is_interleaved:
            return rotary[..., 0::2], rotary[..., 1::2]
        return rotary[..., :num_freqs], rotary[..., num_freqs:]


LLAMA_LAYOUT = RotaryLayout()


def dual_chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    inv_freq: torch.Tensor,
    sizes: DualChunkSizes,
    layout: RotaryLayout = LLAMA_LAYOUT,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """DCA of the last Q of S positions: a whole prompt, a later piece of it, or one decoded token.

    query [B, H, Q, D] and key [B, K, S, D], rotated at position mod `sizes.stride`; value [B, K, S, D].
    inv_freq: [R], radians per position, as the model's own RoPE has it; layout: of its pairs.
    scaling: factor of the logits, 1 / sqrt(D) by default.
    Returns [B, H, Q, D] in the dtype of query, laid out in memory as [B, Q, H, D].

    Raises ValueError for more queries than keys, for dropout, or where inv_freq does not fit the head dim.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    check_inputs(query, key, inv_freq, dropout)
    if num_keys <= sizes.stride:
        return causal_attention_with_past(query, key, value, scaling)
    first, inv_freq = num_keys - num_queries, inv_freq.to(query.device)
    blocks = sequence_blocks(first, num_keys, sizes, inv_freq, layout, sum_dtype(query), query_shift=-first)
    return merged_attention(query, key, value, list(blocks), scaling=scaling)


def segment_dual_chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment_ids: torch.Tensor,
    *,
    inv_freq: torch.Tensor,
    sizes: DualChunkSizes,
    layout: RotaryLayout = LLAMA_LAYOUT,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """DCA for padded batches and packed rows: each run of equal ids in a row is a sequence that starts at 0.

    query [B, H, Q, D], the last Q of the S slots; key and value [B, K, S, D]; segment_ids int [B, S], negative
    on padding. Query and key are rotated at (position in the run) mod `sizes.stride`. Otherwise as
    `dual_chunk_attention`; rows of padding are zero and have no gradient.
    """
    check_inputs(query, key, inv_freq, dropout)
    if segment_ids.shape != (key.shape[0], key.shape[2]):
        raise ValueError(f"segment_ids: must be {[key.shape[0], key.shape[2]]}, got {list(segment_ids.shape)}")
    past, inv_freq, blocks = key.shape[2] - query.shape[2], inv_freq.to(query.device), []
    for row, runs in enumerate(segment_runs(segment_ids)):
        start = 0
        for segment_id, length in runs:
            first = max(past - start, 0)
            if segment_id >= 0 and first < length:
                places = {"batch": slice(row, row + 1), "query_shift": start - past, "key_shift": start}
                blocks += sequence_blocks(first, length, sizes, inv_freq, layout, sum_dtype(query), **places)
            start += length
    return merged_attention(query, key, value, blocks, scaling=scaling)


def check_inputs(query: torch.Tensor, key: torch.Tensor, inv_freq: torch.Tensor, dropout: float) -> None:
    check_lengths(query, key)
    if dropout:
        raise ValueError(
            f"dual chunk attention has no dropout, got {dropout}; set attention_dropout to 0 in config.json"
        )
    if inv_freq.ndim != 1 or 2 * len(inv_freq) > query.shape[-1]:
        raise ValueError(f"inv_freq: shape {list(inv_freq.shape)} does not fit a head dim of {query.shape[-1]}")


def sequence_blocks(
    first: int,
    end: int,
    sizes: DualChunkSizes,
    inv_freq: torch.Tensor,
    layout: RotaryLayout,
    dtype: torch.dtype,
    *,
    batch: slice = slice(None),
    query_shift: int,
    key_shift: int = 0,
) -> Iterator[Block]:
    """Blocks for positions [first, end) of a sequence; p has query row p + query_shift and key p + key_shift."""
    s, start = sizes.stride, first
    # Tells the cache of turns that frequencies were changed in place; inference tensors do not count changes.
    version = None if inv_freq.is_inference() else inv_freq._version

    def part(rows: tuple[int, int], keys: tuple[int, int], **options) -> Part:
        queries, keys = (slice(a + by, b + by) for (a, b), by in ((rows, query_shift), (keys, key_shift)))
        return Part(queries, keys, **options)

    while start < end:
        chunk, offset = divmod(start, s)
        num_rows = min(s - offset, end - start)  # of each chunk
        num_chunks = max(1, min((end - start) // s, ROWS_PER_BLOCK // s)) if offset == 0 else 1
        stop, next_chunk = start + num_chunks * num_rows, chunk + num_chunks
        if num_rows == 1 and offset:
            parts = [part((start, stop), (chunk * s, stop))]
        else:
            parts = [part((start, stop), (start, stop), is_causal=True, num_chunks=num_chunks)]
            parts += [part((start, stop), (chunk * s, start))] if offset else []
        turn_to = partial(query_turn, sizes, offset, num_rows, inv_freq, version, layout, dtype)
        if next_chunk > 1:
            has_previous = max(chunk, 1)
            rows, keys = (max(start, s), stop), ((has_previous - 1) * s, (next_chunk - 1) * s)
            parts.append(part(rows, keys, num_chunks=next_chunk - has_previous, turn=turn_to("previous")))
        for later in range(max(chunk, 2), next_chunk):
            begin = max(start, later * s)
            parts.append(part((begin, begin + num_rows), (0, (later - 1) * s), turn=turn_to("earlier")))
        yield Block(slice(start + query_shift, stop + query_shift), parts, batch)
        start = stop


@dataclass(frozen=True)
class RotaryTurn:
    """Rotation of queries [..., Q, D] by an angle per row and frequency: cos and sin [Q, R]."""

    cos: torch.Tensor
    sin: torch.Tensor
    layout: RotaryLayout = LLAMA_LAYOUT

    def apply(self, query: torch.Tensor) -> torch.Tensor:
        return self.rotated(query, self.sin)

    def undo(self, gradient: torch.Tensor) -> torch.Tensor:
        return self.rotated(gradient, -self.sin)

    def rotated(self, x: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Computed in the dtype of cos, returned in that of x; dimensions that are in no pair pass through."""
        num_freqs, turned = self.cos.shape[-1], torch.empty_like(x)
        begin, end = self.layout.start, self.layout.start + 2 * num_freqs
        turned[..., :begin], turned[..., end:] = x[..., :begin], x[..., end:]
        first, second = self.layout.pairs(x, num_freqs)
        turned_first, turned_second = self.layout.pairs(turned, num_freqs)
        turned_first.copy_((first * self.cos).addcmul_(second, sin, value=-1))
        turned_second.copy_((second * self.cos).addcmul_(first, sin))
        return turned


def rotate(
    query: torch.Tensor, delta_positions: torch.Tensor, inv_freq: torch.Tensor, layout: RotaryLayout = LLAMA_LAYOUT
) -> torch.Tensor:
    """Move queries [..., Q, D] that RoPE has rotated by `delta_positions` [Q] further; inv_freq [R].

    Angles are in fp32 (fp64 for fp64 queries), the result in the dtype of query. Norms stay as they are.
    """
    return rotary_turn(delta_positions, inv_freq, layout, sum_dtype(query)).apply(query)


def rotary_turn(
    delta_positions: torch.Tensor, inv_freq: torch.Tensor, layout: RotaryLayout, dtype: torch.dtype
) -> RotaryTurn:
    angles = torch.outer(delta_positions.to(inv_freq.device, dtype), inv_freq.to(dtype))
    return RotaryTurn(angles.cos(), angles.sin(), layout)


# Every layer asks for the same few: those of whole chunks, and those of a ragged end or a decoded token.
@lru_cache(maxsize=4)
def query_turn(sizes: DualChunkSizes, offset, num_rows, inv_freq, version, layout, dtype, keys: str) -> RotaryTurn:
    """From the positions offset, ..., offset + num_rows - 1 in a chunk to those towards `keys` (previous, earlier)."""
    positions = torch.arange(offset, offset + num_rows, device=inv_freq.device)
    targets = torch.full_like(positions, sizes.inter_position)
    if keys == "previous":
        targets = (positions + sizes.stride).clamp_max(sizes.chunk_size)
    return rotary_turn(targets - positions, inv_freq.detach(), layout, dtype)


def attention_mscale(num_tokens: int, pretraining_length: int, *, coefficient: float = 0.1) -> float:
    """Factor of the logits for long inputs, to be multiplied into `scaling`; the paper's figures are without it.

    Query and key are each scaled by coefficient * ln(num_tokens / pretraining_length) + 1 (1 up to that length).
    The authors' coefficient is 0.1 in flash_decoding_chunkllama.py (ChunkLlama commit 4bee63c, as in YaRN) and 0.05
    in later chunkllama_attn_replace.py (847ae71). One number of tokens must serve a whole text, decoding included.
    """
    scale = num_tokens / pretraining_length
    return 1.0 if scale <= 1 else (coefficient * math.log(scale) + 1.0) ** 2
