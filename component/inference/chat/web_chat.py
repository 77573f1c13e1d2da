"""A chat that several browser tabs hold with one model: conversations apart from each other, one answer at a time.

Knows no page: `longqlora.inference.chat.web_page` shows a conversation, the tests drive it without a browser.
"""

import copy
import threading
import traceback
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path

from longqlora.cli import USER_ERRORS, one_line
from longqlora.data.prompt import encode_conversation
from longqlora.inference.chat.session import ChatSession
from longqlora.inference.generation import Generation, GenerationOptions, generate_text

# Seconds between two looks at whether a waiting answer was stopped.
TURN_INTERVAL = 0.1
# Conversations that are kept; the one that was quiet for longest is forgotten first.
MAX_CONVERSATIONS = 256


class SharedModel:
    """The model behind all conversations. `loaded` is a longqlora.inference.load.LoadedModel."""

    def __init__(self, loaded, template: str):
        self.loaded, self.template = loaded, template
        # Encoding switches a fast tokenizer's modes, which fails while another thread uses it: an answer is decoded
        # with the model's own tokenizer, and everything is encoded with this copy, one thread at a time.
        self.encoder = copy.deepcopy(loaded.tokenizer)
        self.encoder_lock, self.turn = threading.Lock(), threading.Lock()

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        with self.encoder_lock:
            return encode_conversation(self.encoder, messages, template=self.template, add_generation_prompt=True)

    def count_tokens(self, messages: list[dict[str, str]]) -> int:
        return len(self.encode(messages))

    def wait_for_turn(self, stop_event: threading.Event) -> bool:
        """Take `turn`, which the caller releases; False where `stop_event` is set first."""
        while not stop_event.is_set():
            if self.turn.acquire(timeout=TURN_INTERVAL):
                return True
        return False


@dataclass
class Answer:
    """An answer while it is written: by one thread, read by others."""

    question: str
    notice: str | None
    text: str = ""
    is_waiting: bool = False
    stop_event: threading.Event = field(default_factory=threading.Event)
    is_done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class ListedDocument:
    """A document as the page lists it. is_left_out: the context has no room for it any more."""

    name: str
    num_tokens: int
    is_left_out: bool


class Conversation:
    """What one browser tab says to the model and hears from it.

    `status` is a line on what happened last, an error where `is_error`; shows_markdown is the page's choice.
    """

    def __init__(self, shared: SharedModel, options: GenerationOptions, system: str | None = None):
        self.shared = shared
        size = {"context_size": shared.loaded.context_size, "max_new_tokens": options.max_new_tokens}
        self.session = ChatSession(shared.count_tokens, **size, system=system)
        self.answer: Answer | None = None
        self.lengths: dict[str, int] = {}
        self.lock = threading.Lock()
        self.status, self.is_error = "", False
        self.shows_markdown = False

    def tell(self, status: str, *, is_error: bool = False) -> None:
        self.status, self.is_error = status, is_error

    def messages(self) -> list[dict[str, str]]:
        """Every question and answer, also those that the context has no room for any more."""
        with self.lock:
            answer = self.answer
            pairs = [(turn.question, turn.answer) for turn in self.session.turns]
            pairs += [(answer.question, answer.text)] if answer else []
        roles = ("user", "assistant")
        shown = [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]
        return shown[:-1] if answer and not answer.text else shown

    def documents(self) -> list[ListedDocument]:
        num_left_out = self.session.num_dropped_documents
        return [
            ListedDocument(document.path, self.lengths[document.path], position < num_left_out)
            for position, document in enumerate(self.session.documents)
        ]

    def num_tokens(self) -> int:
        """Tokens that a next prompt takes before its question: template, system message, documents, turns."""
        # Of a copy: the session itself would take note of the turns that it leaves out.
        try:
            return replace(self.session).prompt("").num_tokens
        except ValueError:
            return self.session.context_size

    def add_document(self, path: str) -> None:
        """Read the file at `path`, which goes by its file name from then on. Errors are told, not raised."""
        path, name = Path(path), Path(path).name
        try:
            # Read apart from the conversation, which may go on meanwhile.
            alone = replace(self.session, documents=[], turns=[], num_dropped_turns=0, num_dropped_documents=0)
            num_tokens = alone.prompt("").num_tokens
            alone.add_document(str(path))
            # Where the page keeps uploads is not the model's business; a file of the same name is replaced.
            alone.documents = [replace(alone.documents[0], path=name)]
            self.lengths[name] = alone.prompt("").num_tokens - num_tokens
            with self.lock:
                kept = self.session.documents[self.session.num_dropped_documents :]
                self.session.documents = [*(known for known in kept if known.path != name), *alone.documents]
                self.session.num_dropped_documents = 0
            self.tell(f"read {name}: {self.lengths[name]} tokens")
        except USER_ERRORS as error:
            self.tell(one_line(error).removeprefix("/file: ").replace(f"{path.parent}/", ""), is_error=True)

    def ask(self, question: str, options: GenerationOptions, system: str | None = None) -> Answer:
        """Begin to write an answer, in a thread of its own; raises ValueError for what cannot be asked."""
        question = question.strip()
        try:
            f"{question}{system or ''}".encode()
        except UnicodeEncodeError:
            raise ValueError("the message is not valid Unicode text (it holds half a surrogate pair)") from None
        if not question:
            raise ValueError("the message is empty; write something")
        with self.lock:
            if self.answer:
                raise ValueError("an answer is being written; wait for it or stop it")
            self.session.max_new_tokens, self.session.system = options.max_new_tokens, system
            prompt = self.session.prompt(question)
            ids = self.shared.encode(prompt.messages)
            self.answer = answer = Answer(question, prompt.notice)
        self.tell(f"({prompt.notice})" if prompt.notice else "")
        fitted = replace(options, max_new_tokens=prompt.max_new_tokens)
        threading.Thread(target=self._write, args=(answer, ids, fitted), daemon=True).start()
        return answer

    def stop(self) -> None:
        """End the answer after its current token; what there is of it stays."""
        with self.lock:
            if self.answer:
                self.answer.stop_event.set()
                self.tell("stopping")

    def reset(self) -> None:
        """Forget turns and documents; an answer that is being written is dropped."""
        self.stop()
        with self.lock:
            self.answer = None
            self.session.clear()
            self.tell("cleared")

    def _write(self, answer: Answer, ids: list[int], options: GenerationOptions) -> None:
        """The thread of an answer: wait for the model, generate, add the turn."""
        status, is_error, is_whole = "stopped", False, False
        try:
            generation = self._generate(answer, ids, options)
            if generation and generation.finish_reason != "interrupted":
                status, is_whole = "", True
                if generation.finish_reason == "length":
                    status = f"the answer was cut off at {generation.num_new_tokens} tokens"
        # Whatever goes wrong in a model ends this answer and not the page.
        except Exception as error:
            traceback.print_exc()
            status, is_error = one_line(error), True
            if type(error).__name__ == "OutOfMemoryError":
                status = "out of GPU memory; a reset, shorter documents or --load_in_4bit help"
        with self.lock:
            # After a reset the answer belongs to nothing.
            if self.answer is answer:
                if answer.text or is_whole:
                    self.session.add_turn(answer.question, answer.text.strip())
                notice = f"({answer.notice})" if answer.notice else ""
                self.tell("; ".join(filter(None, (status, notice))), is_error=is_error)
                self.answer = None
        answer.is_done.set()

    def _generate(self, answer: Answer, ids: list[int], options: GenerationOptions) -> Generation | None:
        """None where the answer was stopped before the model was free."""

        def on_text(text: str) -> None:
            # What stands between "ASSISTANT:" and the answer is the template's matter, not the reader's.
            answer.text += text if answer.text else text.lstrip()

        answer.is_waiting = self.shared.turn.locked()
        if not self.shared.wait_for_turn(answer.stop_event):
            return None
        try:
            answer.is_waiting = False
            model, tokenizer = self.shared.loaded.model, self.shared.loaded.tokenizer
            return generate_text(model, tokenizer, ids, options, on_text=on_text, stop_event=answer.stop_event)
        finally:
            self.shared.turn.release()


class Conversations:
    """The conversation of each tab, by the key that its page carries."""

    def __init__(self, shared: SharedModel, options: GenerationOptions, system: str | None = None):
        self.shared, self.options, self.system = shared, options, system
        self.by_key: OrderedDict[str, Conversation] = OrderedDict()
        self.lock = threading.Lock()

    def of(self, key: str) -> Conversation:
        with self.lock:
            if key not in self.by_key:
                self.by_key[key] = Conversation(self.shared, self.options, self.system)
            self.by_key.move_to_end(key)
            if len(self.by_key) > MAX_CONVERSATIONS:
                self.by_key.popitem(last=False)[1].stop()
            return self.by_key[key]

    def stop_all(self) -> None:
        with self.lock:
            for conversation in self.by_key.values():
                conversation.stop()
