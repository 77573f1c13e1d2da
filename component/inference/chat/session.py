"""A conversation: its history, what of it fits in the context, and the commands of the chat.

Knows neither a terminal nor a model: the caller gives a function that counts the tokens of a list of
messages, prints what comes back and generates the answers.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from longqlora.cli import one_line
from longqlora.data.documents import read_document, with_documents
from longqlora.files import write_json
from longqlora.outputs import check_outputs

HELP = """\
/file PATH   read a document (pdf, epub, html, md, txt) into the conversation
/clear       forget the conversation and its files
/save PATH   write the conversation as JSON
/help        show this
/exit        leave (so does Ctrl-D)
Ctrl-C ends an answer. A line that begins with a space is never a command."""


@dataclass(frozen=True)
class Document:
    path: str
    text: str


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """What to send: messages, their length in tokens, the longest answer, and a line on what was left out."""

    messages: list[dict[str, str]]
    num_tokens: int
    max_new_tokens: int
    notice: str | None


@dataclass(frozen=True)
class CommandResult:
    """Text to show (None: nothing); is_exit ends the chat."""

    text: str | None = None
    is_exit: bool = False


@dataclass
class ChatSession:
    """History of one conversation and its window onto the context.

    count_tokens: length in tokens of a list of {"role", "content"} messages as a prompt.
    context_size: in tokens. max_new_tokens: longest answer; room is kept for it, though never more than
    half of the context.
    """

    count_tokens: Callable[[list[dict[str, str]]], int]
    context_size: int
    max_new_tokens: int
    system: str | None = None
    documents: list[Document] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    num_dropped_turns: int = 0
    num_dropped_documents: int = 0

    @property
    def room(self) -> int:
        """Most tokens that a prompt may have."""
        return self.context_size - min(self.max_new_tokens, self.context_size // 2)

    def prompt(self, question: str) -> Prompt:
        """The messages that ask `question`, without the oldest turns, then files, where all do not fit.

        The system message and the question always stay. Raises ValueError when these two alone are too
        long; nothing is dropped then.
        """
        turns_left, documents_left = self.num_dropped_turns, self.num_dropped_documents
        while True:
            messages = self._messages(question, turns_left, documents_left)
            num_tokens = self.count_tokens(messages)
            if num_tokens <= self.room:
                break
            if turns_left < len(self.turns):
                turns_left += 1
            elif documents_left < len(self.documents):
                documents_left += 1
            else:
                raise ValueError(
                    f"the message makes a prompt of {num_tokens} tokens, but {self.room} fit in the context of "
                    f"{self.context_size} beside an answer; shorten it"
                )
        notice = self._notice(turns_left - self.num_dropped_turns, documents_left - self.num_dropped_documents)
        self.num_dropped_turns, self.num_dropped_documents = turns_left, documents_left
        return Prompt(messages, num_tokens, min(self.max_new_tokens, self.context_size - num_tokens), notice)

    def add_turn(self, question: str, answer: str) -> None:
        self.turns.append(Turn(question, answer))

    def clear(self) -> None:
        """Forget turns and files; the system message stays."""
        self.turns, self.documents = [], []
        self.num_dropped_turns = self.num_dropped_documents = 0

    def add_document(self, path: str, *, flag: str = "/file") -> int:
        """Read a document of any known format into the conversation; returns its length in tokens, as part of a prompt.

        A file read before is replaced. Raises ValueError or OSError for what cannot be read or is too long.
        """
        document = Document(str(path), read_document(path, flag=flag).text)
        num_tokens = self.count_tokens(self._compose([document], [], "")) - self.count_tokens(self._compose([], [], ""))
        if self.count_tokens(self._compose([document], [], "")) > self.room:
            raise ValueError(
                f"{flag}: {path!r} has {num_tokens} tokens, too many for a context of {self.context_size} with an "
                f"answer of up to {self.context_size - self.room}; split the file or raise --context_size"
            )
        kept = self.documents[self.num_dropped_documents :]
        self.documents = [known for known in kept if known.path != document.path] + [document]
        self.num_dropped_documents = 0
        return num_tokens

    def save(self, path: str) -> None:
        """Write system message, files and all turns, dropped ones too, as {"messages": [...], "documents": [...]}."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages += _as_messages(turn.question, turn.answer)
        documents = [{"path": document.path, "text": document.text} for document in self.documents]
        target = Path(os.path.expanduser(path))
        check_outputs({"/save": target}, {})
        if target.exists():
            raise ValueError(f"/save: {path!r} exists; give another name")
        write_json(target, {"messages": messages, "documents": documents})

    def run_command(self, line: str) -> CommandResult:
        """Carry out a line that begins with "/"; mistakes come back as text, so that the chat goes on."""
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip().strip("\"'")
        try:
            if name in ("/file", "/save") and not argument:
                return CommandResult(f"error: {name}: give a path, as in {name} PATH")
            if name == "/file":
                return CommandResult(f"read {argument}: {self.add_document(argument)} tokens")
            if name == "/save":
                self.save(argument)
                return CommandResult(f"saved {argument}")
        except (ValueError, OSError) as error:
            return CommandResult(f"error: {one_line(error)}")
        if name == "/clear":
            self.clear()
            return CommandResult("cleared")
        if name == "/help":
            return CommandResult(HELP)
        if name == "/exit":
            return CommandResult(is_exit=True)
        return CommandResult(f"error: unknown command {name!r}; /help lists the commands")

    def _messages(self, question: str, num_turns_left: int, num_documents_left: int) -> list[dict[str, str]]:
        return self._compose(self.documents[num_documents_left:], self.turns[num_turns_left:], question)

    def _compose(self, documents: list[Document], turns: list[Turn], question: str) -> list[dict[str, str]]:
        """Documents go before the first question there is: templates know no role for them."""
        messages = [message for turn in turns for message in _as_messages(turn.question, turn.answer)]
        messages.append({"role": "user", "content": question})
        material = [(document.path, document.text) for document in documents]
        messages[0] = {"role": "user", "content": with_documents(messages[0]["content"], material)}
        return ([{"role": "system", "content": self.system}] if self.system else []) + messages

    def _notice(self, num_turns: int, num_documents: int) -> str | None:
        dropped = [
            f"{count} oldest {noun}{'s' if count > 1 else ''}"
            for count, noun in ((num_turns, "turn"), (num_documents, "file"))
            if count
        ]
        return (
            f"the context of {self.context_size} tokens is full: left out {' and '.join(dropped)}" if dropped else None
        )


def _as_messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
