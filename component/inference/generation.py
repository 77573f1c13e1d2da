"""Generate text: the options, the prompt as ids, and a streaming `generate_text`.

Streaming runs in the calling thread, as a stopping criterion that sees every new token. So there is no thread to leave
behind, and what was streamed is exactly what is returned. Rows of a batch are padded on the left: each answer is that
of its prompt alone, but for rounding.

torch is imported where it is used, which keeps --help and bad input fast.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longqlora.data.prompt import bos_ids, checked_text, encode_conversation, encode_text
from longqlora.settings.config import Section, at_least, key

NO_TEMPLATE = "none"
TEMPERATURE = "0 (greedy) or above", lambda value: 0 <= value < math.inf
MASS = "above 0 and at most 1", lambda value: 0 < value <= 1
POSITIVE = "above 0", lambda value: 0 < value < math.inf
SEED = "between 0 and 2**63 - 1", lambda value: 0 <= value < 2**63
TEXTS = "free of empty text, which would stop before the first token", lambda value: "" not in value
MAX_NEW_TOKENS = 2**24
# Tokens of the prompt that are decoded along with the answer.
NUM_PROMPT_TOKENS_DECODED = 4


@dataclass(frozen=True)
class GenerationOptions(Section):
    """How to sample, with the help text and the limit of each flag. Raises ValueError for a value beyond its limit.

    temperature 0 means greedy, as does do_sample False. The seed is set before every answer, so that each is
    reproducible by itself. `stop` strings end the text and are not part of it.
    """

    max_new_tokens: int = key(256, "longest answer in tokens (default: %(default)s)", at_least(1, MAX_NEW_TOKENS))
    temperature: float = key(0.35, "0 means greedy (default: %(default)s)", TEMPERATURE)
    top_p: float = key(0.9, "nucleus mass (default: %(default)s)", MASS)
    top_k: int = key(0, "most likely tokens to choose from, 0 for no limit (default: %(default)s)", at_least(0))
    repetition_penalty: float = key(1.0, "above 1 discourages repetition (default: %(default)s)", POSITIVE)
    do_sample: bool = key(True, "sample, or take the most likely token (default: sample)")
    seed: int | None = key(None, "makes every answer reproducible (default: none)", SEED)
    stop: Sequence[str] = key((), "end the answer before any of these", TEXTS)

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0


@dataclass(frozen=True)
class Generation:
    """One answer. finish_reason: eos, stop (a stop string), length (max_new_tokens) or interrupted.

    new_ids: what the model wrote, with the end token or stop string that `text` leaves out.
    """

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    finish_reason: str
    new_ids: tuple[int, ...]


def encode_prompt(tokenizer, text: str, *, template: str, system: str | None = None) -> list[int]:
    """Ids of a prompt: with template "none" raw text behind BOS, as in pretraining; else one user message.

    Raises ValueError for text that is no Unicode (half a surrogate pair, from JSON or the command line).
    """
    checked_text(f"{text}{system or ''}", "the prompt")
    if template == NO_TEMPLATE:
        return [*bos_ids(tokenizer), *encode_text(tokenizer, text)]
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return encode_conversation(tokenizer, messages, template=template)


class AnswerStream:
    """One answer: its new ids, and their text as they come.

    Text is given out once it is certain: an unfinished character waits for its other bytes, and an ending that may
    become a stop string for what follows. Ids are decoded with a few before them, since tokenizers drop the leading
    space of a first token.
    """

    def __init__(self, tokenizer, prompt_ids: Sequence[int], stop: Sequence[str], on_text, end_ids: Sequence[int] = ()):
        self.tokenizer, self.stop, self.on_text, self.end_ids = tokenizer, stop, on_text, end_ids
        self.ids, self.new_ids = list(prompt_ids[-NUM_PROMPT_TOKENS_DECODED:]), []
        self.start, self.num_decoded = 0, len(self.ids)
        self.text, self.num_given_out, self.is_stopped = "", 0, False

    @property
    def has_ended(self) -> bool:
        return self.is_stopped or any(token_id in self.end_ids for token_id in self.new_ids[-1:])

    def put(self, new_ids: Sequence[int], *, is_end: bool = False) -> None:
        """Take the next ids and give out the text that is certain now, at the end all of it."""
        if self.is_stopped:
            return
        self.ids += new_ids
        self.new_ids += new_ids
        known, text = (
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (self.ids[self.start : self.num_decoded], self.ids[self.start :])
        )
        if len(text) > len(known) and (is_end or not text.endswith("\ufffd")):
            self.start, self.num_decoded = self.num_decoded, len(self.ids)
            self.text += text[len(known) :]
        found = [place for stop in self.stop if (place := self.text.find(stop, self.num_given_out)) >= 0]
        if found:
            self.text, self.is_stopped = self.text[: min(found)], True
        beginnings = [] if is_end or found else [stop[:size] for stop in self.stop for size in range(1, len(stop))]
        num_held = max((len(start) for start in beginnings if self.text.endswith(start)), default=0)
        if piece := self.text[self.num_given_out : len(self.text) - num_held]:
            self.num_given_out += len(piece)
            self.on_text(piece)


class AnswerStreams:
    """Stopping criterion of `generate` that hands each row's new ids to its stream, until that has ended."""

    def __init__(self, streams: Sequence[AnswerStream], num_prompt_tokens: int, stop_event: threading.Event):
        self.streams, self.num_seen, self.stop_event = streams, num_prompt_tokens, stop_event

    def __call__(self, input_ids, scores, **kwargs):
        """input_ids [B, num_tokens] int64; returns [B] bool, True to end."""
        for stream, new_ids in zip(self.streams, input_ids[:, self.num_seen :].tolist(), strict=True):
            if not stream.has_ended:
                stream.put(new_ids)
        self.num_seen = input_ids.shape[1]
        ends = [stream.is_stopped or self.stop_event.is_set() for stream in self.streams]
        return input_ids.new_tensor(ends).bool()


def end_token_ids(model, tokenizer) -> list[int]:
    """Ids that end an answer: those of the model's generation config and the tokenizer's EOS."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token_id for token_id in [*ids, tokenizer.eos_token_id] if token_id is not None})


def generate_text(
    model,
    tokenizer,
    prompt_ids: Sequence[int],
    options: GenerationOptions,
    *,
    on_text: Callable[[str], None] | None = None,
    stop_event: threading.Event | None = None,
    past_key_values=None,
) -> Generation:
    """Continue `prompt_ids`; `on_text` gets each piece of the text as soon as it is certain.

    The other arguments are those of `generate_texts`.
    """
    options = {"options": options, "stop_event": stop_event, "past_key_values": past_key_values}
    return generate_texts(model, tokenizer, [prompt_ids], on_text=on_text, **options)[0]


def generate_texts(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    on_text: Callable[[str], None] | None = None,
    stop_event: threading.Event | None = None,
    past_key_values=None,
) -> list[Generation]:
    """Continue each of `prompts`, all at once; on_text: for one of them.

    Setting `stop_event`, from a signal handler or another thread, ends the answer after the current token.
    past_key_values: a transformers Cache that has seen the beginning of the one prompt, not all of it. It then holds
    all of it and the new ids but the last.
    """
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    if not all(prompts):
        raise ValueError("the prompt is empty and the tokenizer adds no token of its own; give some text")
    stop_event = stop_event or threading.Event()
    eos_ids = end_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos_ids or [0])[0]
    # Every value is given: what is None would be filled in from the generation config of the model.
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    if not options.is_greedy:
        sampling = {name: getattr(options, name) for name in sampling}
    config = GenerationConfig(
        do_sample=not options.is_greedy, num_beams=1, max_new_tokens=options.max_new_tokens,
        repetition_penalty=options.repetition_penalty, eos_token_id=eos_ids or None, pad_token_id=pad_id, **sampling,
    )  # fmt: skip
    if options.seed is not None:
        torch.manual_seed(options.seed)
    on_text = on_text or (lambda text: None)
    streams = [AnswerStream(tokenizer, prompt_ids, options.stop, on_text, eos_ids) for prompt_ids in prompts]
    width = max(map(len, prompts))
    padding = [width - len(prompt_ids) for prompt_ids in prompts]
    input_ids = [[pad_id] * num_pads + list(ids) for num_pads, ids in zip(padding, prompts, strict=True)]
    input_ids = torch.tensor(input_ids, device=model.device)
    mask = torch.tensor([[0] * num_pads + [1] * (width - num_pads) for num_pads in padding], device=model.device)
    try:
        with torch.inference_mode():
            model.generate(
                input_ids=input_ids, attention_mask=mask, generation_config=config, past_key_values=past_key_values,
                stopping_criteria=StoppingCriteriaList([AnswerStreams(streams, width, stop_event)]),
            )  # fmt: skip
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        text = f"{model.config.name_or_path!r} gives probabilities that are not finite, so no token can be drawn"
        raise ValueError(f"model_name_or_path: {text}; give --dtype bf16 or fp32, or a model that is whole") from error
    answers = []
    for stream, prompt_ids in zip(streams, prompts, strict=True):
        stream.put([], is_end=True)
        new_ids = tuple(stream.new_ids)
        ends = {"stop": stream.is_stopped, "eos": new_ids[-1] in eos_ids, "interrupted": stop_event.is_set()}
        reason = next((name for name, is_true in ends.items() if is_true), "length")
        answers.append(Generation(stream.text, len(prompt_ids), len(new_ids), reason, new_ids))
    return answers
