"""The web page's conversations, and what it shows of them, without a browser."""

import threading
import time
from types import SimpleNamespace

import pytest

from longqlora.inference.chat import web_chat
from longqlora.inference.chat.web_chat import Conversations, SharedModel
from longqlora.inference.chat.web_page import (
    documents_html,
    facts_line,
    meter_html,
    page_options,
    shown_messages,
    status_html,
)
from longqlora.inference.generation import Generation, GenerationOptions

OPTIONS = GenerationOptions(max_new_tokens=32)


class Writer:
    """Stands in for `generate_text`: gives out the next of `pieces` at each `release`, until it is stopped."""

    def __init__(self, *pieces: str):
        self.pieces, self.steps = pieces, threading.Semaphore(0)
        self.num_writing = self.most_writing = 0
        self.prompts, self.options = [], []

    def release(self, count: int = 1) -> None:
        self.steps.release(count)

    def __call__(self, model, tokenizer, prompt_ids, options, *, on_text, stop_event) -> Generation:
        self.num_writing += 1
        self.most_writing = max(self.most_writing, self.num_writing)
        self.prompts.append(tokenizer.decode(prompt_ids))
        self.options.append(options)
        text = ""
        try:
            for piece in self.pieces:
                deadline = time.monotonic() + 30
                while not self.steps.acquire(timeout=0.01):
                    assert time.monotonic() < deadline, "nobody released or stopped the answer"
                    if stop_event.is_set():
                        return Generation(text, len(prompt_ids), 1, "interrupted", ())
                if piece == "fail":
                    raise RuntimeError("the model\nbroke")
                text += piece
                on_text(piece)
            return Generation(text, len(prompt_ids), len(self.pieces), "eos", ())
        finally:
            self.num_writing -= 1


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.setattr(web_chat, "TURN_INTERVAL", 0.01)

    def install(*pieces: str) -> Writer:
        writer = Writer(*pieces)
        monkeypatch.setattr(web_chat, "generate_text", writer)
        return writer

    return install


@pytest.fixture
def conversations(tiny_tokenizer):
    def make(context_size: int = 400, **kwargs) -> Conversations:
        loaded = SimpleNamespace(model=None, tokenizer=tiny_tokenizer, context_size=context_size)
        return Conversations(SharedModel(loaded, "vicuna_v1.1"), OPTIONS, **kwargs)

    return make


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.005)


def contents(conversation) -> list[str]:
    return [message["content"] for message in conversation.messages()]


def ask_all(conversation, question: str, options: GenerationOptions = OPTIONS, system: str | None = None) -> None:
    finish(conversation.ask(question, options, system))


def finish(answer) -> None:
    # An answer whose turn never comes is to fail, not to hang.
    assert answer.is_done.wait(30)


def test_an_answer_streams_and_joins_the_history(conversations, writer):
    conversation = conversations().of("a")
    script = writer("  ", " one", " two")
    answer = conversation.ask(" hello ", OPTIONS)
    assert contents(conversation) == ["hello"]
    script.release(2)
    wait_until(lambda: len(contents(conversation)) == 2)
    assert contents(conversation) == ["hello", "one"], "no space before the answer"
    script.release()
    finish(answer)
    assert contents(conversation) == ["hello", "one two"] and conversation.answer is None and conversation.status == ""
    script.release(3)
    ask_all(conversation, "and now?")
    assert "USER: hello\nASSISTANT: one two</s>USER: and now?\nASSISTANT:" in script.prompts[1]


def test_a_stopped_answer_is_kept(conversations, writer):
    conversation = conversations().of("a")
    script = writer("some", " more")
    script.release()
    answer = conversation.ask("hello", OPTIONS)
    wait_until(lambda: contents(conversation) == ["hello", "some"])
    conversation.stop()
    assert conversation.status == "stopping"
    finish(answer)
    assert contents(conversation) == ["hello", "some"] and conversation.status == "stopped"
    assert not conversation.is_error and conversation.answer is None


def test_conversations_are_apart_and_the_model_answers_one_at_a_time(conversations, writer):
    both = conversations()
    first, second = both.of("a"), both.of("b")
    assert both.of("a") is first is not second
    script = writer("text")
    answer = first.ask("one", OPTIONS)
    wait_until(lambda: script.num_writing == 1)
    other = second.ask("two", OPTIONS)
    wait_until(lambda: second.answer.is_waiting)
    assert "waiting for the model" in status_html(second) and "waiting" not in status_html(first)
    script.release()
    finish(answer)
    wait_until(lambda: len(script.prompts) == 2)
    assert "waiting" not in status_html(second)
    script.release()
    finish(other)
    assert (contents(first), contents(second)) == (["one", "text"], ["two", "text"])
    assert script.most_writing == 1


def test_a_waiting_conversation_can_be_stopped(conversations, writer):
    both = conversations()
    first, second = both.of("a"), both.of("b")
    script = writer("text")
    answer = first.ask("one", OPTIONS)
    wait_until(lambda: script.num_writing == 1)
    other = second.ask("two", OPTIONS)
    second.stop()
    finish(other)
    assert contents(second) == [] and second.status == "stopped" and len(script.prompts) == 1
    script.release()
    finish(answer)
    assert contents(first) == ["one", "text"]


def test_reset_drops_the_answer_being_written_too(conversations, writer, tmp_path):
    conversation = conversations().of("a")
    empty = conversation.num_tokens()
    (tmp_path / "a.txt").write_text("wizards box")
    conversation.add_document(str(tmp_path / "a.txt"))
    script = writer("some", " more")
    script.release()
    answer = conversation.ask("hello", OPTIONS)
    wait_until(lambda: len(contents(conversation)) == 2)
    conversation.reset()
    finish(answer)
    assert contents(conversation) == [] == conversation.documents() and conversation.status == "cleared"
    assert conversation.num_tokens() == empty
    wait_until(lambda: script.num_writing == 0)
    script.release(2)
    ask_all(conversation, "again")
    assert contents(conversation) == ["again", "some more"], "the dropped answer did not come back"


def test_meter_counts_what_a_prompt_holds_and_changes_nothing(conversations, writer, tmp_path):
    conversation = conversations(system="be brief").of("a")
    count = conversation.shared.count_tokens
    system = {"role": "system", "content": "be brief"}
    assert conversation.num_tokens() == count([system, {"role": "user", "content": ""}])
    (tmp_path / "a.txt").write_text("wizards box " * 10)
    before = conversation.num_tokens()
    conversation.add_document(str(tmp_path / "a.txt"))
    [document] = conversation.documents()
    assert document.num_tokens == conversation.num_tokens() - before > 20 and not document.is_left_out
    assert conversation.status == f"read a.txt: {document.num_tokens} tokens"
    writer("x" * 150).release()
    ask_all(conversation, "w" * 150, system="be brief")
    # Full: the turn would be left out of the next prompt, but only asking says so.
    assert conversation.num_tokens() < before + document.num_tokens + 150
    assert conversation.session.num_dropped_turns == 0
    writer("y").release()
    ask_all(conversation, "z" * 100, system="be brief")
    assert conversation.status == "(the context of 400 tokens is full: left out 1 oldest turn)"
    assert len(contents(conversation)) == 4, "still shown"


def test_documents_go_by_their_names_and_bad_ones_change_nothing(conversations, writer, tmp_path):
    conversation = conversations().of("a")
    for folder, text in (("one", "first"), ("two", "wizards box")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "müsli <b>.txt").write_text(text)
        conversation.add_document(str(tmp_path / folder / "müsli <b>.txt"))
    assert [document.name for document in conversation.documents()] == ["müsli <b>.txt"], "replaced"
    used = conversation.num_tokens()
    for name, data, message in (
        ("binary.txt", b"\xff\xfa\x00\x01", "not UTF-8"),
        ("empty.txt", b" \n", "is empty"),
        ("long.txt", b"w " * 900, "too many for a context of 400"),
        ("broken.pdf", b"nothing of a pdf", "PDF"),
        ("broken.epub", b"PK\x03\x04 nothing of an epub", "EPUB"),
    ):
        (tmp_path / name).write_bytes(data)
        conversation.add_document(str(tmp_path / name))
        assert conversation.is_error and message in conversation.status, name
        assert name in conversation.status and str(tmp_path) not in conversation.status
    conversation.add_document(str(tmp_path / "missing.txt"))
    assert conversation.is_error and "missing.txt" in conversation.status
    assert len(conversation.documents()) == 1 and conversation.num_tokens() == used
    script = writer("yes")
    script.release()
    ask_all(conversation, "what does it say?")
    assert "wizards box" in script.prompts[0] and str(tmp_path) not in script.prompts[0]
    assert "müsli" in script.prompts[0] and "first" not in script.prompts[0]


def test_what_cannot_be_asked_is_refused_and_changes_nothing(conversations, writer):
    conversation = conversations().of("a")
    script = writer("text")
    for question, message in ((" \n", "is empty"), ("w " * 900, "shorten it"), ("\ud800", "not valid Unicode")):
        with pytest.raises(ValueError, match=message):
            conversation.ask(question, OPTIONS)
    answer = conversation.ask("one", OPTIONS)
    with pytest.raises(ValueError, match="an answer is being written"):
        conversation.ask("two", OPTIONS)
    script.release()
    finish(answer)
    assert contents(conversation) == ["one", "text"]


def test_a_failing_model_is_told_and_leaves_the_turn_free(conversations, writer, capsys):
    both = conversations()
    conversation = both.of("a")
    writer("some", "fail").release(2)
    ask_all(conversation, "hello")
    assert conversation.is_error and conversation.status == "the model broke"
    assert "RuntimeError" in capsys.readouterr().err, "the log has it in full"
    writer("fine").release()
    ask_all(both.of("b"), "hello")
    assert contents(both.of("b")) == ["hello", "fine"]


def test_settings_of_the_page(conversations, writer):
    options = page_options(GenerationOptions(seed=3, do_sample=False), 7.0, 0.5, 0.8)
    assert options == GenerationOptions(max_new_tokens=7, temperature=0.5, top_p=0.8, seed=3)
    assert page_options(options, 7, 0, 0.8).is_greedy
    for values in ((None, 0.5, 0.8), (7, None, 0.8), (0, 0.5, 0.8), (7, -1, 0.8), (7, 0.5, 0)):
        with pytest.raises(ValueError):
            page_options(options, *values)
    conversation = conversations().of("a")
    script = writer("text")
    script.release()
    ask_all(conversation, "hello", options, "be a wizard")
    assert script.options[0] == options and "be a wizard" in script.prompts[0]
    script.release()
    ask_all(conversation, "hello", GenerationOptions(max_new_tokens=10_000))
    assert script.options[1].max_new_tokens + len(conversation.shared.encoder(script.prompts[1]).input_ids) <= 402


def test_oldest_conversation_is_forgotten(conversations, monkeypatch):
    monkeypatch.setattr(web_chat, "MAX_CONVERSATIONS", 2)
    many = conversations()
    first, second = many.of("a"), many.of("b")
    many.of("a")
    many.of("c")
    assert many.of("a") is first and many.of("b") is not second


def test_nothing_that_is_shown_is_read_as_html(conversations, writer, tmp_path):
    conversation = conversations().of("a")
    evil = "<img src=x onerror=alert(1)>"
    (tmp_path / f"{evil}.txt").write_text("text")
    conversation.add_document(str(tmp_path / f"{evil}.txt"))
    writer(f"a & b {evil}").release()
    ask_all(conversation, f"{evil}\n  a\n\tb")
    assert [message["content"] for message in shown_messages(conversation)] == [
        "&lt;img src=x onerror=alert(1)&gt;\n&#32; a\n&#9;b", "a &amp; b &lt;img src=x onerror=alert(1)&gt;",
    ]  # fmt: skip
    conversation.tell(evil, is_error=True)
    for page in (documents_html(conversation), status_html(conversation)):
        assert "<img" not in page and "&lt;img" in page
    conversation.shows_markdown = True
    assert shown_messages(conversation)[1]["content"] == f"a & b {evil}", "Markdown is for the page to sanitise"


def test_meter_and_facts():
    assert "1\u00a0234 of 8\u00a0192 tokens" in meter_html(1234, 8192) and "width: 15%" in meter_html(1234, 8192)
    assert "width: 100%" in meter_html(9000, 8192)
    facts = {
        "base_model": "base", "peft_model": None, "context_size": 8192, "attention": "dense", "dtype": "bfloat16",
        "load_in_4bit": True, "device": "cpu",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    }  # fmt: skip
    line = facts_line(facts, "vicuna_v1.1")
    for part in (
        "model base",
        "adapter none",
        "8\u00a0192",
        "RoPE linear (factor 2, rope_theta 10000)",
        "dense",
        "NF4",
    ):
        assert part in line
    assert "RoPE as the model has it" in facts_line({**facts, "rope_parameters": None}, "x")
