"""Losses and hits of a causal language model on windows of a token file: scoring, resuming, splitting over processes.

Attention is the model's own, dense. Negative log-likelihoods are computed in fp32 from the output
embedding applied to chunks of the sequence, so the fp32 logits of a whole window never exist.

Dimensions: B batch, S sequence, V vocabulary.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from longqlora.attention.chunked_prefill import states_in_blocks
from longqlora.distributed import barrier, gather_objects, is_main_process, rank, world_size
from longqlora.evaluation.perplexity import WINDOW_FIELDS, WindowLoss, WindowPlan, batches, position_blocks
from longqlora.files import atomic_file

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
        if self.prefill_chunk_size and input_ids.shape[1] > self.prefill_chunk_size:
            return self.score_in_blocks(input_ids)
        if self.split is None:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
            return chunked_scores(logits, input_ids, lambda chunk: chunk)
        decoder, head = self.split
        return chunked_scores(decoder(input_ids=input_ids, use_cache=False)[0], input_ids, head)

    def score_in_blocks(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `__call__`, in blocks of prefill_chunk_size tokens against a KV cache."""
        module, head = self.split or (self.model, lambda chunk: chunk)
        blocks = states_in_blocks(module, input_ids, config=self.model.config, block_size=self.prefill_chunk_size)
        progress = tqdm(
            blocks,
            total=-(-input_ids.shape[1] // self.prefill_chunk_size),
            desc="blocks",
            leave=False,
            disable=not is_main_process(),
        )
        # Each block also predicts the first token of the next; the last one has none to predict.
        pieces = [
            chunked_scores(states, input_ids[:, first : first + states.shape[1] + 1], head)
            for first, states in progress
        ]
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


class WindowLedger:
    """Finished windows of a run, kept on disk so that a killed run can go on.

    One JSON-lines file per process beside `output_file` (hidden, `.X.json.windows-RANK.jsonl`): first
    the fingerprint of the run, then a line per batch. Lines reach the file as soon as the batch is done;
    a line cut short by a kill is passed over. Floats are written so that they read back identical. With
    `output_file` None nothing is kept.
    """

    def __init__(self, output_file: Path | None, fingerprint: dict):
        self.output_file = output_file
        decisive = {**fingerprint, "stored": WINDOW_FIELDS}
        self.fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        self.done: dict[tuple[int, int], WindowLoss] = {}
        self.file = None
        self.num_foreign = 0

    def path(self, number: int) -> Path:
        return self.output_file.with_name(f".{self.output_file.name}.windows-{number}.jsonl")

    def paths(self) -> list[Path]:
        pattern = f".{glob.escape(self.output_file.name)}.windows-*.jsonl"
        return sorted(self.output_file.parent.glob(pattern))

    def start(self) -> None:
        """Take up what earlier processes finished, the same on every rank, and begin this rank's file."""
        if self.output_file is None:
            return
        if is_main_process():
            self.output_file.parent.mkdir(parents=True, exist_ok=True)
            self._read()
            # One compact file replaces those of the earlier processes, whose number may have been another.
            with atomic_file(self.path(0)) as file:
                file.write(json.dumps({"fingerprint": self.fingerprint}) + "\n")
                for (seq_len, index), loss in self.done.items():
                    file.write(self._line(seq_len, [index], [loss]))
            for path in self.paths():
                if path != self.path(0):
                    path.unlink()
        self.done = gather_objects(self.done)[0]
        self.file = self.path(rank()).open("a", encoding="utf-8")
        if rank() > 0:
            self.file.write(json.dumps({"fingerprint": self.fingerprint}) + "\n")

    def _read(self) -> None:
        for path in self.paths():
            header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            if header != json.dumps({"fingerprint": self.fingerprint}):
                self.num_foreign += 1
                continue
            for line in lines:
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                for index, *window in row["windows"]:
                    self.done[row["seq_len"], index] = WindowLoss.of_row(window)

    @staticmethod
    def _line(seq_len: int, indices: Sequence[int], losses: Sequence[WindowLoss]) -> str:
        windows = [[index, *loss.row()] for index, loss in zip(indices, losses, strict=True)]
        return json.dumps({"seq_len": seq_len, "windows": windows}) + "\n"

    def add(self, seq_len: int, indices: Sequence[int], losses: Sequence[WindowLoss]) -> None:
        if self.file is not None:
            self.file.write(self._line(seq_len, indices, losses))
            self.file.flush()

    def remove(self) -> None:
        """Close this rank's file and, once all ranks did, delete the files of all."""
        if self.file is not None:
            self.file.close()
            barrier()
            if is_main_process():
                for path in self.paths():
                    path.unlink()


def measure(
    scorer: TokenScorer,
    tokens: np.ndarray,
    plan: WindowPlan,
    *,
    batch_size: int,
    device: torch.device,
    ledger: WindowLedger,
) -> list[WindowLoss]:
    """Losses of all windows of `plan`, in order, on every rank.

    tokens: int [num_tokens]. Batches are dealt out to the ranks whole, so a batch has the same shape, and
    with it the same rounding, whatever the number of processes.
    """
    done = {index: loss for (seq_len, index), loss in ledger.done.items() if seq_len == plan.seq_len}
    todo = [batch for batch in batches(plan.windows, batch_size) if not all(index in done for index in batch)]
    finished: dict[int, WindowLoss] = {}
    own = todo[rank() :: world_size()]
    for batch in tqdm(own, desc=f"seq_len {plan.seq_len}", unit="batch", disable=not is_main_process()):
        losses = score_windows(scorer, tokens, plan, batch, device)
        ledger.add(plan.seq_len, batch, losses)
        finished.update(zip(batch, losses, strict=True))
    for part in gather_objects(finished):
        done.update(part)
    return [done[index] for index in range(len(plan.windows))]


def score_windows(
    scorer: TokenScorer, tokens: np.ndarray, plan: WindowPlan, indices: Sequence[int], device: torch.device
) -> list[WindowLoss]:
    """Losses of the windows `indices` of `plan`, in one forward pass; tokens: int [num_tokens]."""
    windows = [plan.windows[index] for index in indices]
    rows = np.stack([tokens[window.start : window.start + window.length] for window in windows])
    nll, hits = scorer(torch.from_numpy(rows.astype(np.int64)).to(device))
    rows = zip(nll.double().cpu().numpy(), hits.cpu().numpy(), windows, strict=True)
    return [window_loss(losses, right, window.score_from, plan.seq_len) for losses, right, window in rows]


def window_loss(nll: np.ndarray, hits: np.ndarray, score_from: int, seq_len: int) -> WindowLoss:
    """Sum the token losses (float64) and hits (bool) of one window, [window length - 1], from `score_from` on."""
    scored = np.zeros(seq_len - 1)
    scored[score_from - 1 : len(nll)] = nll[score_from - 1 :]
    starts = np.array(position_blocks(seq_len)[:-1]) - 1
    block_totals = tuple(np.add.reduceat(scored, starts).tolist())
    return WindowLoss(float(scored.sum()), block_totals, int(hits[score_from - 1 :].sum()))
