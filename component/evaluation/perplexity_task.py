"""Perplexity of a model on a file of token ids: its losses, the windows of the file, and the task.

Negative log-likelihoods are computed in fp32 from the output embedding applied to chunks of the sequence, so the fp32
logits of a whole window never exist. The protocols are in perplexity.py; a trial is a batch of windows.

Dimensions: B batch, S sequence, V vocabulary.
"""

import base64
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from tqdm import tqdm

from longqlora.attention.binding import bind_inference_attention
from longqlora.attention.chunked_prefill import states_in_blocks
from longqlora.attention.dual_chunk_binding import dual_chunk_sizes
from longqlora.data.token_file import TokenFile, sidecar_path
from longqlora.distributed import is_main_process
from longqlora.evaluation.frame import ModelSource, Task
from longqlora.evaluation.perplexity import Window, WindowPlan, batches, plan_windows, position_blocks, summarize
from longqlora.inference.load import LoadedModel, model_facts
from longqlora.model.context import rope_of
from longqlora.plot import plot_evaluation
from longqlora.settings.config import at_least, check_limit
from longqlora.table import grouped

CHUNK_FLOATS = 2**24
PROBE_TOKENS = 16


@dataclass
class TokenScorer:
    """Gives the negative log-likelihood of every token of a window under `model`, and whether it is the likeliest.

    `model`: a causal language model of transformers, with or without PEFT. Windows longer than
    prefill_chunk_size tokens are read in such blocks against a KV cache. Where its logits are the
    output embedding of its decoder's states, which a short forward pass decides, they are made chunk by
    chunk; a model that does more (soft-capping, scaling, prompts) is asked for its own logits.
    """

    model: torch.nn.Module
    prefill_chunk_size: int | None = None
    split: tuple[torch.nn.Module, torch.nn.Module] | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids int [B, S] -> losses fp32 and hits bool, [B, S - 1].

        Entry p is -log p(token p + 1 | tokens 0 .. p), in nats, and whether that token is the likeliest.
        """
        if not self.split:
            self.split = find_split(self.model, input_ids[:1, :PROBE_TOKENS]) or (self.model, torch.nn.Identity())
        module, head = self.split
        size, num_tokens = self.prefill_chunk_size, input_ids.shape[1]
        if not size or num_tokens <= size:
            blocks = [(0, module(input_ids=input_ids, use_cache=False)[0])]
        else:
            blocks = states_in_blocks(module, input_ids, config=self.model.config, block_size=size)
            hide = not is_main_process()
            blocks = tqdm(blocks, total=-(-num_tokens // size), desc="blocks", leave=False, disable=hide)
        pieces = []
        for first, states in blocks:
            # A block also predicts the first token of the next; the last one has none to predict.
            pieces += chunked_scores(states, input_ids[:, first : first + states.shape[1] + 1], head)
        return tuple(torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))


def find_split(model: torch.nn.Module, input_ids: torch.Tensor) -> tuple[torch.nn.Module, torch.nn.Module] | None:
    """(decoder, output embedding) whose composition gives `model`'s logits on `input_ids`, or None."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder, head = inner.get_decoder(), inner.get_output_embeddings()
    if decoder is None or head is None or decoder is inner:
        return None
    expected = model(input_ids=input_ids, use_cache=False).logits
    # On several GPUs the model's own output returns to the first.
    found = head(decoder(input_ids=input_ids, use_cache=False)[0]).to(expected.device)
    tolerance = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 1e-2
    same = found.shape == expected.shape and torch.allclose(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )
    return (decoder, head) if same else None


def chunked_scores(
    states: torch.Tensor, input_ids: torch.Tensor, head: torch.nn.Module
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield next-token losses fp32 and hits bool, [B, chunk], of `input_ids` [B, S] from `states` [B, S, any]."""
    targets = input_ids[:, 1:].to(states.device)
    step = max(1, CHUNK_FLOATS // (len(targets) * head(states[:, :1]).shape[-1]))
    for chunk, wanted in zip(states[:, : targets.shape[1]].split(step, 1), targets.split(step, 1), strict=True):
        logits = head(chunk).float()  # [B, chunk, V]
        # A head that is tied to the input embedding may be on another GPU than the last layer.
        wanted = wanted.to(logits.device)
        losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        yield losses.view_as(wanted), logits.argmax(-1) == wanted


@dataclass(frozen=True)
class Windows:
    """How windows are laid over `data` (plan_windows), and how they are read: so many at once, in blocks of tokens."""

    data: TokenFile
    sliding_window: int
    protocol: str = "longlora"
    max_windows: int | None = None
    batch_size: int = 1
    prefill_chunk_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("sliding_window", "max_windows", "batch_size", "prefill_chunk_size"):
            check_limit(name, getattr(self, name), at_least(1))

    def plan(self, seq_len: int) -> WindowPlan:
        options = {"stride": self.sliding_window, "protocol": self.protocol, "max_windows": self.max_windows}
        return plan_windows(self.data.num_tokens, seq_len=seq_len, **options)

    def trials(self, seq_len: int) -> list[dict]:
        """A trial for each batch: the numbers of its windows in the plan."""
        return [{"length": seq_len, "windows": batch} for batch in batches(self.plan(seq_len).windows, self.batch_size)]

    def ask(self, scorer: TokenScorer, trial: Mapping) -> dict:
        """Losses of the windows of a trial, in one forward pass, ready for JSON."""
        plan = self.plan(trial["length"])
        windows = [plan.windows[index] for index in trial["windows"]]
        rows = np.stack([self.data.tokens[window.start : window.start + window.length] for window in windows])
        nll, hits = scorer(torch.from_numpy(rows.astype(np.int64)).to(scorer.model.device))
        rows = zip(windows, nll.double().cpu().numpy(), hits.cpu().numpy(), strict=True)
        return {**trial, "losses": [window_loss(*row, plan.seq_len) for row in rows]}

    def summarize(self, results: Sequence[Mapping]) -> dict:
        """The numbers of one length from the results of all of its trials."""
        losses = [loss for result in results for loss in result["losses"]]
        for_reading = [{**loss, "block_totals": array("d", base64.b64decode(loss["block_totals"]))} for loss in losses]
        return summarize(self.plan(results[0]["length"]), for_reading)


def window_loss(window: Window, nll: np.ndarray, hits: np.ndarray, seq_len: int) -> dict:
    """Sum the token losses (float64) and hits (bool) of one window, [window length - 1], for `summarize`."""
    first = window.score_from - 1
    scored = np.zeros(seq_len - 1)
    scored[first : len(nll)] = nll[first:]
    starts = np.array(position_blocks(seq_len)[:-1]) - 1
    # As text, a third of what a list of numbers takes: the results of all windows stay in memory until the end.
    block_totals = base64.b64encode(np.add.reduceat(scored, starts)).decode()
    return {"total": float(scored.sum()), "block_totals": block_totals, "num_correct": int(hits[first:].sum())}


@dataclass
class Perplexity(Task):
    """Perplexity, loss and accuracy at each window length in `lengths` (tokens; the model's context where None)."""

    windows: Windows
    lengths: Sequence[int] | None = None
    flash_attn: bool = False
    name = "perplexity"

    def __post_init__(self) -> None:
        path = self.windows.data.path
        self.inputs = {"--data_path": [path, sidecar_path(path)]}

    def make_trials(self, source: ModelSource) -> list[list[Mapping]]:
        settings = dict(vars(self.windows))
        data = settings.pop("data")
        data.check_ids(source.config.get_text_config().vocab_size)
        self.settings = {**settings, "data_sha256": data.sha256, "block_totals": "base64"}
        lengths = list(dict.fromkeys(self.lengths or [source.context_size]))
        source.warn_beyond_context(lengths)
        return [self.windows.trials(length) for length in lengths]

    def use(self, loaded: LoadedModel) -> None:
        if self.flash_attn:
            if dual_chunk_sizes(loaded.config):
                raise ValueError("--flash_attn is for dense attention only; leave it out with --attention dca")
            loaded.model.set_attn_implementation("flash_attention_2")
            loaded.attention = "dense causal (flash-attn)"
        elif self.windows.prefill_chunk_size:
            bind_inference_attention(loaded.model, is_chunked=True)
        self.scorer = TokenScorer(loaded.model, prefill_chunk_size=self.windows.prefill_chunk_size)
        told = ("sliding_window", "batch_size", "prefill_chunk_size", "data_sha256")
        self.facts = {**{name: self.settings[name] for name in told}, "data_file": self.windows.data.path.name}
        self.facts |= model_facts(loaded)
        self.original_length = rope_of(loaded.config).original_length

    def ask(self, trial: Mapping) -> dict:
        return self.windows.ask(self.scorer, trial)

    def score(self, results: Sequence[dict]) -> dict:
        weights = f"{self.facts['dtype']} weights"
        if self.facts["load_in_4bit"]:
            weights = f"4-bit NF4 base, {self.facts['dtype']} products"
        records = []
        for (length,), of_length in grouped(results, "length").items():
            plan = self.windows.plan(length).describe()
            protocol = f"{plan}; {weights}, losses in float32; attention {self.facts['attention']}"
            summary = self.windows.summarize(of_length)
            records.append({"seq_len": length, "protocol": protocol, **summary, **self.facts})
        return {**(records[0] if len(records) == 1 else {}), "results": records}

    def table(self, record: Mapping) -> str:
        lines = []
        for result in record["results"]:
            lines += [
                f"protocol: {result['protocol']}",
                f"seq_len {result['seq_len']}: perplexity {result['perplexity']:.4f}, loss {result['loss']:.6f}, "
                f"accuracy {result['accuracy']:.6f} ({result['num_windows']} windows, {result['num_tokens']} tokens "
                "scored)",
            ]
            if result["num_windows_nonfinite"]:
                lines.append(f"warning: the loss of {result['num_windows_nonfinite']} windows is inf or nan")
        return "\n".join(lines)

    def plot(self, record: Mapping, name: str, path: str) -> None:
        plot_evaluation(record["results"], name, path, original_length=self.original_length)
