"""The models of a comparison, and its measurements on them: one model in memory at a time, changed in place."""

from collections.abc import Mapping

import torch

from longqlora.attention.binding import describe_inference_attention
from longqlora.data.token_file import TokenFile
from longqlora.distributed import local_device
from longqlora.evaluation.comparison import Comparison, passkey_trials, perplexity_trials, plans_of
from longqlora.evaluation.perplexity import WINDOW_FIELDS, WindowLoss, summarize
from longqlora.evaluation.retrieval.passkey import accuracy_cells, answer_trial
from longqlora.evaluation.scoring import TokenScorer, score_windows
from longqlora.evaluation.trials import run_trials
from longqlora.inference.arguments import dtype_of
from longqlora.inference.load import LoadedModel, folder_state, load_for_inference, set_context
from longqlora.model.context import context_length, resolve_config


def describe_models(settings: Comparison) -> dict[str, dict[int, dict]]:
    """{method: {length: context, RoPE and attention}}, from the configs alone.

    Raises ValueError, with the method's name, for one that the base model cannot be given.
    """
    found: dict[str, dict[int, dict]] = {}
    for name, method in settings.methods.items():
        for length in sorted(set(settings.lengths)):
            try:
                _, config = resolve_config(
                    settings.base_model,
                    method.peft_model,
                    method.request(length),
                    trust_remote_code=settings.trust_remote_code,
                )
            except (ValueError, OSError) as error:
                raise ValueError(f"methods: {name}: {error}") from None
            found.setdefault(name, {})[length] = {
                "peft_model": method.peft_model,
                "context_size": context_length(config),
                "rope_parameters": getattr(config, "rope_parameters", None),
                "attention": describe_inference_attention(config),
                "vocab_size": config.get_text_config().vocab_size,
            }
    return found


class MethodModels:
    """Gives the model of a method, ready for a length; loads weights only when base or adapter change."""

    def __init__(self, settings: Comparison):
        self.settings = settings
        self.loaded: LoadedModel | None = None
        self.scorer: TokenScorer | None = None
        self.current: tuple[str, int] | None = None

    def get(self, name: str, length: int) -> LoadedModel:
        """The model of the method `name`, set up to read `length` tokens."""
        if self.current == (name, length):
            return self.loaded
        method, settings = self.settings.methods[name], self.settings
        if self.loaded is None or self.loaded.adapter_name_or_path != method.peft_model:
            self.loaded = self.scorer = None  # two models at once may not fit
            self.loaded = load_for_inference(
                settings.base_model,
                adapter_name_or_path=method.peft_model,
                load_in_4bit=settings.load_in_4bit,
                dtype=dtype_of(settings.dtype),
                trust_remote_code=settings.trust_remote_code,
            )
            self.scorer = TokenScorer(self.loaded.model, prefill_chunk_size=settings.prefill_chunk_size)
        set_context(self.loaded, method.request(length), is_chunked=settings.prefill_chunk_size is not None)
        self.current = (name, length)
        return self.loaded

    def identified(self, trials: list[dict]) -> list[dict]:
        """The trials with all that their method decides, so that adding or changing one leaves the others done."""
        methods = self.settings.methods
        known = {name: {**vars(of), "adapter": folder_state(of.peft_model)} for name, of in methods.items()}
        return [{**trial, "settings": known[trial["method"]]} for trial in trials]

    def fingerprint(self) -> dict:
        """What decides a number and is not in the trials."""
        in_trials = ("lengths", "methods")
        return {
            "settings": {name: str(value) for name, value in vars(self.settings).items() if name not in in_trials},
            "base_model": folder_state(self.settings.base_model),
            "torch": torch.__version__,
        }


def compare_perplexity(settings: Comparison, data: TokenFile, models: MethodModels, output_file) -> dict:
    """{method: {length: result}}: perplexity, loss and protocol of every cell; the same on every rank."""
    plans = plans_of(settings, data.num_tokens)

    def run_one(trial: Mapping) -> dict:
        models.get(trial["method"], trial["length"])
        plan = plans[trial["length"]]
        losses = score_windows(models.scorer, data.tokens, plan, trial["windows"], local_device())
        return {"losses": [loss.row() for loss in losses]}

    trials = models.identified(perplexity_trials(settings, plans))
    fingerprint = {**models.fingerprint(), "data": data.sha256, "stored": WINDOW_FIELDS}
    done = run_trials(trials, run_one, output_file=output_file, fingerprint=fingerprint, desc="compare")
    losses: dict[tuple[str, int], dict[int, WindowLoss]] = {}
    for trial, result in zip(trials, done, strict=True):
        cell = losses.setdefault((trial["method"], trial["length"]), {})
        for index, row in zip(trial["windows"], result["losses"], strict=True):
            cell[index] = WindowLoss.of_row(row)
    cells: dict[str, dict[int, dict]] = {}
    for (name, length), by_index in losses.items():
        summary = summarize(plans[length], [by_index[index] for index in range(len(by_index))])
        cells.setdefault(name, {})[length] = {"protocol": plans[length].describe(), **summary}
    return cells


def compare_passkey(settings: Comparison, models: MethodModels, output_file) -> dict:
    """{method: [cell]}: passkey accuracy of every length and depth; the same on every rank."""

    def run_one(trial: Mapping) -> dict:
        return answer_trial(models.get(trial["method"], trial["length"]), trial)

    trials = models.identified(passkey_trials(settings))
    done = run_trials(trials, run_one, output_file=output_file, fingerprint=models.fingerprint(), desc="compare")
    return {name: accuracy_cells([r for r in done if r["method"] == name]) for name in settings.methods}
