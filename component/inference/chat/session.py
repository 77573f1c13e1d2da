"""A conversation with a model: its history, what of it fits into the context, and the commands of the chat."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from longqlora.cli import USER_ERRORS, one_line
from longqlora.data.documents import read_document, with_documents
from longqlora.data.prompt import checked_text, encode_conversation
from longqlora.files import write_json
from longqlora.inference.generation import GenerationOptions, generate_text
from longqlora.outputs import check_outputs

HELP = """\
/file PATH   read a document (pdf, epub, html, md, txt) into the conversation
/clear       forget the conversation and its files
/save PATH   write the conversation as JSON
/help        show this
/exit        leave (so does Ctrl-D)
Ctrl-C ends an answer. A line that begins with a space is never a command."""

Messages = list[dict[str, str]]


class Prompt(NamedTuple):
    """What to send: ids, how to answer within the context, and a line on what was left out."""

    ids: list[int]
    options: GenerationOptions
    notice: str | None


@dataclass
class ChatSession:
    """One conversation with the model of `loaded`, a longqlora.inference.load.LoadedModel.

    template: as for `encode_conversation`. documents: (name, text) of each. history: question and answer in turn. The
    oldest of both, as many as `num_past_...` say, are not sent any more.
    """

    loaded: object
    template: str
    options: GenerationOptions
    system: str | None = None
    documents: list[tuple[str, str]] = field(default_factory=list)
    history: Messages = field(default_factory=list)
    num_past_turns: int = 0
    num_past_documents: int = 0

    @property
    def context_size(self) -> int:
        return self.loaded.context_size

    @property
    def room(self) -> int:
        """Most tokens that a prompt may have: max_new_tokens are kept for an answer, at most half of the context."""
        return self.context_size - min(self.options.max_new_tokens, self.context_size // 2)

    @property
    def greeting(self) -> str:
        """The first line of a chat."""
        return f"template {self.template}, context of {self.context_size} tokens; /help lists the commands"

    def encode(self, messages: Messages) -> list[int]:
        """Ids of a prompt that ends where the answer begins."""
        return encode_conversation(self.loaded.tokenizer, messages, template=self.template)

    def ask(self, question: str, on_text: Callable[[str], None], stop_event: threading.Event) -> bool:
        """Answer `question`; returns whether both are part of the conversation now.

        on_text gets each piece of the answer. `stop_event` ends it after a token, KeyboardInterrupt at once.
        """
        pieces: list[str] = []

        def give_out(text: str) -> None:
            # Space between "ASSISTANT:" and the answer belongs to the template.
            if text := text if pieces else text.lstrip():
                pieces.append(text)
                on_text(text)

        is_kept = self.reply(question, give_out, stop_event)
        if is_kept and (pieces or not stop_event.is_set()):
            self.add_turn(question, "".join(pieces).strip())
        return is_kept

    def reply(self, question: str, on_text: Callable[[str], None], stop_event: threading.Event) -> bool:
        """Send the whole conversation, as far as it fits; the part of an answer before Ctrl-C is kept."""
        try:
            prompt = self.prompt(question)
            if prompt.notice:
                print(f"({prompt.notice})", file=sys.stderr, flush=True)
            model, tokenizer = self.loaded.model, self.loaded.tokenizer
            generate_text(model, tokenizer, prompt.ids, prompt.options, on_text=on_text, stop_event=stop_event)
        except KeyboardInterrupt:
            stop_event.set()
        return True

    def add_turn(self, question: str, answer: str) -> None:
        self.history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def prompt(self, question: str) -> Prompt:
        """What asks `question`, without the oldest turns, then files, where all do not fit.

        The system message and the question always stay. Raises ValueError when these two alone are too long.
        """
        all_turns, all_documents = len(self.history) // 2, len(self.documents)
        without_turns = [(num, self.num_past_documents) for num in range(self.num_past_turns, all_turns + 1)]
        without_files = [(all_turns, num) for num in range(self.num_past_documents + 1, all_documents + 1)]
        for num_turns, num_documents in without_turns + without_files:
            ids = self.encode(self.messages(question, self.history[2 * num_turns :], self.documents[num_documents:]))
            if len(ids) <= self.room:
                break
        else:
            raise ValueError(
                f"the message makes a prompt of {len(ids)} tokens, but {self.room} fit in the context of "
                f"{self.context_size} beside an answer; shorten it"
            )
        new = {"turn": num_turns - self.num_past_turns, "file": num_documents - self.num_past_documents}
        dropped = " and ".join(f"{num} oldest {noun}{'s' * (num > 1)}" for noun, num in new.items() if num)
        notice = f"the context of {self.context_size} tokens is full: left out {dropped}" if dropped else None
        self.num_past_turns, self.num_past_documents = num_turns, num_documents
        max_new_tokens = min(self.options.max_new_tokens, self.context_size - len(ids))
        return Prompt(ids, replace(self.options, max_new_tokens=max_new_tokens), notice)

    def messages(self, question: str, history: Sequence = (), documents: Sequence = ()) -> Messages:
        """System message, `history` and `question`, with the documents in the first question: templates know no role
        for them."""
        first, *others = [*history, {"role": "user", "content": checked_text(question, "the message")}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {**first, "content": with_documents(first["content"], documents)}, *others]

    def clear(self) -> None:
        """Forget turns and files; the system message stays."""
        self.history, self.documents = [], []
        self.num_past_turns = self.num_past_documents = 0

    def add_document(self, path: str, *, flag: str = "/file") -> int:
        """Read a document of any known format into the conversation; returns its length in tokens, as part of a prompt.

        A file read before is replaced. Raises ValueError or OSError for what cannot be read or is too long.
        """
        document = (str(path), read_document(path, flag=flag))
        num_prompt_tokens = len(self.encode(self.messages("", documents=[document])))
        num_tokens = num_prompt_tokens - len(self.encode(self.messages("")))
        if num_prompt_tokens > self.room:
            raise ValueError(
                f"{flag}: {path!r} has {num_tokens} tokens, too many for a context of {self.context_size} with an "
                f"answer of up to {self.context_size - self.room}; split the file or raise --context_size"
            )
        self.num_past_documents -= any(known[0] == document[0] for known in self.documents[: self.num_past_documents])
        self.documents = [*(known for known in self.documents if known[0] != document[0]), document]
        return num_tokens

    def save(self, path: str) -> None:
        """Write system message, files and all turns, dropped ones too, as {"messages": [...], "documents": [...]}."""
        target = Path(os.path.expanduser(path))
        check_outputs({"/save": target}, {})
        if target.exists():
            raise ValueError(f"/save: {path!r} exists; give another name")
        documents = [{"path": name, "text": text} for name, text in self.documents]
        write_json(target, {"messages": self.messages("", self.history)[:-1], "documents": documents})

    def run_command(self, line: str) -> str | None:
        """Carry out a line that begins with "/"; returns what to show, mistakes too, or None to leave."""
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip().strip("\"'")
        try:
            if name in ("/file", "/save") and not argument:
                raise ValueError(f"{name}: give a path, as in {name} PATH")
            if name == "/file":
                return f"read {argument}: {self.add_document(argument)} tokens"
            if name == "/save":
                self.save(argument)
                return f"saved {argument}"
            if name == "/clear":
                self.clear()
                return "cleared"
            if name not in ("/help", "/exit"):
                raise ValueError(f"unknown command {name!r}; /help lists the commands")
        except USER_ERRORS as error:
            return f"error: {one_line(error)}"
        return HELP if name == "/help" else None
