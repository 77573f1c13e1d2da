"""A conversation without an end: its tokens go through the model once each, and a cache of constant size remembers.

What the model has read is a stream of ids. Text is never encoded a second time, so neither a stop string nor a template
that would write an answer differently can change what was said. Of the stream, attention reaches the sinks and the
latest tokens (component/inference/sink_cache.py); nothing has to fit into a context.
"""

import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from longqlora.data.documents import with_documents
from longqlora.inference.chat.session import ChatSession
from longqlora.inference.generation import end_token_ids, generate_text
from longqlora.inference.sink_cache import SinkCache

# Seconds of reading after which its progress is shown.
PROGRESS_DELAY = 2.0


@dataclass
class StreamingSession(ChatSession):
    """History and commands of `ChatSession`, with the cache that the conversation lives in.

    ids: of what the cache has seen since it last counted from 0, and of at most one answer's end beyond it. Raises
    ValueError for a template in which the ids of a next turn cannot be told.
    """

    cache: SinkCache = field(kw_only=True)
    ids: list[int] = field(default_factory=list)
    # Nothing is ever too long.
    context_size = sys.maxsize

    def __post_init__(self):
        self.end_ids = set(end_token_ids(self.loaded.model, self.loaded.tokenizer))
        self.next_turn_ids("a")
        # It warns where the stream outgrows the model's context, which no distance in the cache does.
        logging.getLogger("transformers.generation.stopping_criteria").setLevel(logging.ERROR)

    @property
    def greeting(self) -> str:
        return (
            f"template {self.template}, streaming with a window of {self.cache.window} tokens; /help lists the commands"
        )

    def clear(self) -> None:
        super().clear()
        self.cache.reset()
        self.ids = []

    def reply(self, question: str, on_text: Callable[[str], None], stop_event: threading.Event) -> bool:
        """Read the new files and `question`, and answer; returns whether they are part of the conversation now.

        They are not where Ctrl-C came before the answer: `stop_event` while reading, or KeyboardInterrupt. Then,
        and when anything else is raised, everything is as it was before.
        """
        snapshot, is_kept = self.cache.snapshot(), False
        try:
            text = with_documents(question, self.documents[self.num_past_documents :])
            new_ids = self.next_turn_ids(text) if self.ids else self.encode(self.messages(text))
            ids = self._read(self.ids + new_ids, stop_event)
            if ids is not None:
                answer = generate_text(
                    self.loaded.model, self.loaded.tokenizer, ids, self.options,
                    on_text=on_text, stop_event=stop_event, past_key_values=self.cache,
                )  # fmt: skip
                # The end token of an answer is not in the cache yet: the next turn begins with that of the template.
                is_ended = answer.new_ids[-1] in self.end_ids
                ids = [*ids, *answer.new_ids[: len(answer.new_ids) - is_ended]]
                self.ids, self.num_past_documents, is_kept = ids, len(self.documents), True
        except KeyboardInterrupt:
            stop_event.set()
        finally:
            if not is_kept:
                self.cache.restore(snapshot)
        return is_kept

    def next_turn_ids(self, question: str) -> list[int]:
        """Ids from the end of an answer to the start of the next, told from a stand-in conversation of one turn."""
        before = self.messages("a")
        prompt = self.encode(before)
        ids = self.encode([*before, {"role": "assistant", "content": "b"}, {"role": "user", "content": question}])
        after_prompt = ids[len(prompt) :]
        end = next((position for position, token in enumerate(after_prompt) if token in self.end_ids), None)
        if end is None or ids[: len(prompt)] != prompt:
            reason = "does not end an answer with a token of its own" if end is None else "rewrites earlier turns"
            raise ValueError(
                f"--streaming: the template {self.template!r} {reason}, so a next turn cannot be read by itself; leave "
                "out --system where given, or use --prompt_template vicuna_v1.1"
            )
        return after_prompt[end:]

    @torch.inference_mode()
    def _read(self, ids: list[int], stop_event: threading.Event) -> list[int] | None:
        """Feed all of `ids` that the cache has not seen but the last block; returns the ids to generate from, `ids` or
        what a cache that counted from 0 again keeps of them, and None where `stop_event` ended it."""
        cache, model = self.cache, self.loaded.model
        num_unread = len(ids) - cache.get_seq_length()
        with tqdm(total=num_unread, desc="reading", unit="token", delay=PROGRESS_DELAY, leave=False) as progress:
            while True:
                if cache.num_evicted >= cache.window:
                    ids = cache.rebase(ids)
                first = cache.get_seq_length()
                block = ids[first : first + cache.block_size]
                if first + len(block) == len(ids):
                    return ids
                if stop_event.is_set():
                    return None
                input_ids = torch.tensor([block], device=model.device)
                model.get_decoder()(input_ids=input_ids, past_key_values=cache, use_cache=True)
                progress.update(len(block))
