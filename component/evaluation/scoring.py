"""Losses and hits of a causal language model on windows of a token file.

Attention is the model's own, dense. Negative log-likelihoods are computed in fp32 from the output
embedding applied to chunks of the sequence, so the fp32 logits of a whole window never exist.

Dimensions: B batch, S sequence, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from longqlora.attention.chunked_prefill import states_in_blocks
from longqlora.distributed import is_main_process
from longqlora.evaluation.perplexity import WindowLoss, WindowPlan, position_blocks

CHUNK_FLOATS = 2**24
PROBE_TOKENS = 16

Project = Callable[[torch.Tensor], torch.Tensor]


class TokenScorer:
    """Gives the negative log-likelihood of every token of a window under `model`, and whether it is the likeliest.

    `model`: a causal language model of transformers, with or without PEFT. Windows longer than
    prefill_chunk_size tokens are read in such blocks against a KV cache. Where its logits are the
    output embedding of its decoder's states, which a short forward pass decides, they are made chunk by
    chunk; a model that does more (soft-capping, scaling, prompts) is asked for its own logits.
    """

    def __init__(self, model: torch.nn.Module, *, prefill_chunk_size: int | None = None):
        self.model = model
        self.prefill_chunk_size = prefill_chunk_size
        self.split: tuple[torch.nn.Module, torch.nn.Module] | None = None
        self.probed = False

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids int [B, S] -> losses fp32 and hits bool, [B, S - 1].

        Entry p of the losses is -log p(token p + 1 | tokens 0 .. p), in nats; of the hits, whether that token is
        the likeliest.
        """
        if not self.probed:
            self.split, self.probed = find_split(self.model, input_ids[:1, :PROBE_TOKENS]), True
        module, head = self.split or (self.model, lambda logits: logits)
        size, num_tokens = self.prefill_chunk_size, input_ids.shape[1]
        if not size or num_tokens <= size:
            output = module(input_ids=input_ids, use_cache=False)
            return chunked_scores(output[0] if self.split else output.logits, input_ids, head)
        blocks = states_in_blocks(module, input_ids, config=self.model.config, block_size=size)
        hide = not is_main_process()
        progress = tqdm(blocks, total=-(-num_tokens // size), desc="blocks", leave=False, disable=hide)
        # Each block also predicts the first token of the next; the last one has none to predict.
        pieces = [chunked_scores(states, input_ids[:, first : first + states.shape[1] + 1], head)
                  for first, states in progress]  # fmt: skip
        nll, hits = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
        return nll, hits


def find_split(model: torch.nn.Module, input_ids: torch.Tensor) -> tuple[torch.nn.Module, torch.nn.Module] | None:
    """(decoder, output embedding) whose composition gives `model`'s logits on `input_ids`, or None."""
    peft_config = getattr(model, "active_peft_config", None)
    if peft_config is not None and peft_config.is_prompt_learning:
        return None
    inner = model.get_base_model() if peft_config is not None else model
    if not (hasattr(inner, "get_decoder") and hasattr(inner, "get_output_embeddings")):
        return None
    decoder, head = inner.get_decoder(), inner.get_output_embeddings()
    if decoder is None or head is None or decoder is inner:
        return None
    expected = model(input_ids=input_ids, use_cache=False).logits
    found = head(decoder(input_ids=input_ids, use_cache=False)[0])
    tolerance = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 1e-2
    same = found.shape == expected.shape and torch.allclose(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )
    return (decoder, head) if same else None


def chunked_scores(
    states: torch.Tensor, input_ids: torch.Tensor, project: Project
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token losses fp32 and hits bool, [B, S - 1], from `states` [B, S, any].

    `project` makes logits [B, chunk, V] of a chunk of the states.
    """
    num_rows, num_tokens = input_ids.shape
    vocab_size = project(states[:, :1]).shape[-1]
    step = max(1, CHUNK_FLOATS // (num_rows * vocab_size))
    nll = torch.empty(num_rows, num_tokens - 1, dtype=torch.float32, device=states.device)
    hits = torch.empty(num_rows, num_tokens - 1, dtype=torch.bool, device=states.device)
    targets = input_ids[:, 1:].to(states.device)
    for first in range(0, num_tokens - 1, step):
        end = min(first + step, num_tokens - 1)
        logits = project(states[:, first:end]).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets[:, first:end].flatten(), reduction="none")
        nll[:, first:end] = losses.view(num_rows, -1)
        hits[:, first:end] = logits.argmax(-1) == targets[:, first:end]
    return nll, hits


def score_windows(
    scorer: TokenScorer, tokens: np.ndarray, plan: WindowPlan, indices: Sequence[int]
) -> list[WindowLoss]:
    """Losses of the windows `indices` of `plan`, in one forward pass; tokens: int [num_tokens]."""
    windows = [plan.windows[index] for index in indices]
    rows = np.stack([tokens[window.start : window.start + window.length] for window in windows])
    nll, hits = scorer(torch.from_numpy(rows.astype(np.int64)).to(scorer.model.device))
    rows = zip(nll.double().cpu().numpy(), hits.cpu().numpy(), windows, strict=True)
    return [window_loss(losses, right, window.score_from, plan.seq_len) for losses, right, window in rows]


def window_loss(nll: np.ndarray, hits: np.ndarray, score_from: int, seq_len: int) -> WindowLoss:
    """Sum the token losses (float64) and hits (bool) of one window, [window length - 1], from `score_from` on."""
    scored = np.zeros(seq_len - 1)
    scored[score_from - 1 : len(nll)] = nll[score_from - 1 :]
    starts = np.array(position_blocks(seq_len)[:-1]) - 1
    block_totals = tuple(np.add.reduceat(scored, starts).tolist())
    return WindowLoss(float(scored.sum()), block_totals, int(hits[score_from - 1 :].sum()))
