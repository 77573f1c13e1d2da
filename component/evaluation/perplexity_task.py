"""Perplexity of a model on a file of token ids: one trial is a batch of windows.

The protocols are in perplexity.py, the forward passes in scoring.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from longqlora.data.token_file import TokenFile, sidecar_path
from longqlora.evaluation.frame import ModelSource, Task
from longqlora.evaluation.perplexity import WindowLoss, WindowPlan, batches, plan_windows, summarize
from longqlora.plot import plot_evaluation
from longqlora.table import grouped


@dataclass
class Windows:
    """How windows are laid over `data` (plan_windows), and how many are read at once."""

    data: TokenFile
    stride: int
    protocol: str = "longlora"
    max_windows: int | None = None
    batch_size: int = 1
    plans: dict[int, WindowPlan] = field(default_factory=dict, init=False)

    def plan(self, seq_len: int) -> WindowPlan:
        if seq_len not in self.plans:
            options = {"stride": self.stride, "protocol": self.protocol, "max_windows": self.max_windows}
            self.plans[seq_len] = plan_windows(self.data.num_tokens, seq_len=seq_len, **options)
        return self.plans[seq_len]

    def trials(self, seq_len: int) -> list[dict]:
        """A trial for each batch: the numbers of its windows in the plan."""
        return [{"length": seq_len, "windows": batch} for batch in batches(self.plan(seq_len).windows, self.batch_size)]

    def ask(self, scorer, trial: Mapping) -> dict:
        """Losses of the windows of a trial by `scorer` (TokenScorer), ready for JSON."""
        from longqlora.evaluation.scoring import score_windows

        losses = score_windows(scorer, self.data.tokens, self.plan(trial["length"]), trial["windows"])
        return {**trial, "losses": [asdict(loss) for loss in losses]}

    def summarize(self, results: Sequence[Mapping]) -> dict:
        """The numbers of one length from the results of all of its trials."""
        losses = [WindowLoss(**loss) for result in results for loss in result["losses"]]
        return summarize(self.plan(results[0]["length"]), losses)


@dataclass
class Perplexity(Task):
    """Perplexity, loss and accuracy at each window length in `lengths` (tokens; the model's context where None)."""

    windows: Windows
    lengths: Sequence[int] | None = None
    prefill_chunk_size: int | None = None
    flash_attn: bool = False
    name = "perplexity"

    def __post_init__(self) -> None:
        path = self.windows.data.path
        self.inputs = {"--data_path": [path, sidecar_path(path)]}

    def make_trials(self, source: ModelSource) -> list[list[Mapping]]:
        data = self.windows.data
        data.check_ids(source.config.get_text_config().vocab_size)
        self.settings = {
            "sliding_window": self.windows.stride,
            "batch_size": self.windows.batch_size,
            "prefill_chunk_size": self.prefill_chunk_size,
            "data_sha256": data.sha256,
            "protocol": self.windows.protocol,
            "max_windows": self.windows.max_windows,
        }
        lengths = list(dict.fromkeys(self.lengths or [source.context_size]))
        source.warn_beyond_context(lengths)
        return [self.windows.trials(length) for length in lengths]

    def use(self, loaded: Any) -> None:
        from longqlora.attention.binding import DENSE_DESCRIPTION, bind_inference_attention
        from longqlora.evaluation.scoring import TokenScorer
        from longqlora.inference.load import model_facts

        if self.flash_attn:
            if loaded.attention != DENSE_DESCRIPTION:
                raise ValueError("--flash_attn is for dense attention only; leave it out with --attention dca")
            loaded.model.set_attn_implementation("flash_attention_2")
            loaded.attention = "dense causal (flash-attn)"
        elif self.prefill_chunk_size:
            bind_inference_attention(loaded.model, is_chunked=True)
        self.scorer = TokenScorer(loaded.model, prefill_chunk_size=self.prefill_chunk_size)
        told = {name: self.settings[name] for name in ("sliding_window", "batch_size", "prefill_chunk_size")}
        data = {"data_file": self.windows.data.path.name, "data_sha256": self.windows.data.sha256}
        self.facts = {**told, **data, **model_facts(loaded)}

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
            plan = self.windows.plan(result["seq_len"])
            num_left_out = plan.num_windows_dropped + plan.num_windows_skipped
            lines += [
                f"protocol: {result['protocol']}",
                f"left out: {num_left_out} windows; {plan.num_uncovered_tokens} tokens of the file are in no window",
                f"seq_len {result['seq_len']}: perplexity {result['perplexity']:.4f}, loss {result['loss']:.6f}, "
                f"accuracy {result['accuracy']:.6f} ({result['num_windows']} windows, {result['num_tokens']} tokens "
                "scored)",
            ]
            if result["num_windows_nonfinite"]:
                lines.append(f"warning: the loss of {result['num_windows_nonfinite']} windows is inf or nan")
        return "\n".join(lines)

    def plot(self, record: Mapping, name: str, path: str) -> None:
        plot_evaluation(record["results"], name, path)
