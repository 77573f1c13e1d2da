"""Chat: history and commands without a model, then the script through a pipe and under Ctrl-C."""

import json
import os
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from live_script import LiveScript
from rigged_model import load_script, save_parrot

from longqlora.inference.chat.session import HELP, ChatSession
from longqlora.inference.generation import GenerationOptions

CHAT = "script/inference/chat.py"


class WordSession(ChatSession):
    """A token for each word and each role, which begins with a dot."""

    def encode(self, messages) -> list[str]:
        return [word for message in messages for word in (f".{message['role']}", *message["content"].split())]


def make_session(context_size=40, max_new_tokens=10, **kwargs) -> ChatSession:
    loaded = SimpleNamespace(context_size=context_size)
    return WordSession(loaded, "vicuna_v1.1", GenerationOptions(max_new_tokens=max_new_tokens), **kwargs)


def roles(prompt) -> str:
    return " ".join(word[1] for word in prompt.ids if word.startswith("."))


def test_oldest_whole_turns_are_left_out_and_it_is_said_once():
    session = make_session(system="be brief")
    for number in range(4):
        session.add_turn(f"question {number} " + "w " * 3, f"answer {number}")
    prompt = session.prompt("last question")
    assert len(prompt.ids) <= session.room == 30
    assert roles(prompt) == "s u a u a u" and prompt.ids[3:6] == [".user", "question", "2"]
    assert prompt.notice == "the context of 40 tokens is full: left out 2 oldest turns"
    assert session.prompt("last question").notice is None
    assert len(session.history) == 8, "left out of the prompt, yet still there for /save"


def test_window_is_as_large_as_fits():
    session = make_session(context_size=30)
    session.add_turn("a b c", "d e f")  # 8 tokens
    session.add_turn("a b c", "d e f")
    prompt = session.prompt("a b c")  # 8 + 8 + 4 = 20: exactly full
    assert session.room == len(prompt.ids) == 20 and roles(prompt) == "u a u a u" and prompt.notice is None
    assert prompt.ids[4:12] == [".assistant", "d", "e", "f", ".user", "a", "b", "c"]
    assert roles(session.prompt("a b c d")) == "u a u"
    session = make_session(max_new_tokens=1000)
    assert session.room == 20 and session.prompt("a").options.max_new_tokens == 38, "at most half for the answer"


def test_files_outlast_turns_and_the_system_message_outlasts_files(tmp_path):
    session = make_session(context_size=60, system="be brief")
    path = tmp_path / "my file.txt"
    path.write_text("material " * 20)
    assert session.run_command(f'/file "{path}"').startswith(f"read {path}: ")
    session.add_turn("old " * 5, "answer")
    for num_words, has_file, left_out in ((10, True, "1 oldest turn"), (40, False, "1 oldest file")):
        prompt = session.prompt("new " * num_words)
        assert roles(prompt) == "s u" and ("material" in prompt.ids) == has_file and prompt.ids[-1] == "new"
        assert prompt.notice.endswith(f"left out {left_out}")
    path.write_text("matter")
    session.run_command(f"/file {path}")
    assert "matter" in session.prompt("and now?").ids and session.documents == [(str(path), "matter")], "read again"
    assert session.run_command("/clear") == "cleared"
    session.add_turn("one", "two")
    with pytest.raises(ValueError, match="50 fit in the context of 60 .* shorten it"):
        session.prompt("new " * 60)
    assert roles(session.prompt("three")) == "s u a u", "nothing was dropped"


def test_commands_answer_in_one_line_and_mistakes_change_nothing(tmp_path):
    session = make_session()
    session.add_turn("one", "two")
    files = {"binary": b"\xff\xfd\x00\x01", "nul": b"a\0b", "empty": b" \n", "long": b"w " * 500}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    expected = {
        "/file": "give a path",
        "/save": "give a path",
        "/file  ": "give a path",
        f"/file {tmp_path}/missing": "no file",
        f"/file {tmp_path}": "no file",
        f"/file {tmp_path}/binary": "not UTF-8",
        f"/file {tmp_path}/nul": "not a text file",
        f"/file {tmp_path}/empty": "is empty",
        f"/file {tmp_path}/long": "too many for a context of 40",
        f"/save {tmp_path}": "is a folder",
        f"/save {tmp_path}/nul": "exists; give another name",
        f"/save {tmp_path}/pipe": "is a device",
        f"/save {tmp_path}/binary/x.json": "error",
        "/fiel x": "unknown command '/fiel'",
        "/": "unknown command '/'",
    }
    for line, message in expected.items():
        text = session.run_command(line)
        assert text.startswith("error: ") and message in text and "\n" not in text, line
    assert not session.documents and len(session.history) == 2
    assert session.run_command("/help") == HELP and session.run_command("/exit") is None
    documented = {line.split()[0] for line in HELP.splitlines() if line.startswith("/")}
    assert documented == {"/file", "/save", "/clear", "/help", "/exit"}


def test_ctrl_c_at_the_prompt_leaves_at_the_second(monkeypatch, capsys):
    keys = Mock(side_effect=[KeyboardInterrupt, "hello", KeyboardInterrupt, KeyboardInterrupt, "never read"])
    monkeypatch.setattr("builtins.input", keys)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert list(load_script(CHAT).read_lines()) == ["hello"]
    assert "again" in capsys.readouterr().err


def test_chat_through_a_pipe(tiny_tokenizer, tmp_path, run_in_process, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save_parrot(tmp_path / "model", tiny_tokenizer)
    (tmp_path / "paper.txt").write_text("wizards box")
    lines = [
        "hello", "/nonsense", "/file paper.txt", "/file missing.txt", "", "what does it say?", "/save full.json",
        "/clear", "/save empty.json", "/help", "long " * 600, " /not a command",
    ]  # fmt: skip
    flags = ["--context_size", 512, "--max_new_tokens", 3, "--no-do_sample", "--system", "für ü"]
    code, out, errors = run_in_process(CHAT, "--model_name_or_path", model, *flags, input="\n".join(lines))
    assert (code, out) == (0, "the the the\n" * 3)
    for message in ("unknown command '/nonsense'", "read paper.txt", "no file at 'missing.txt'", "cleared", "shorten"):
        assert errors.count(message) == 1, message
    saved = json.loads((tmp_path / "full.json").read_text(encoding="utf-8"))
    assert [tuple(message.values()) for message in saved["messages"]] == [
        ("system", "für ü"), ("user", "hello"), ("assistant", "the the the"), ("user", "what does it say?"),
        ("assistant", "the the the"),
    ]  # fmt: skip
    assert saved["documents"] == [{"path": "paper.txt", "text": "wizards box"}]
    empty = json.loads((tmp_path / "empty.json").read_text(encoding="utf-8"))
    assert empty == {"messages": saved["messages"][:1], "documents": []}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "paper.txt", "full.json", "empty.json"}


def test_ctrl_c_ends_the_answer_and_not_the_chat(tiny_tokenizer, tmp_path):
    model = save_parrot(tmp_path / "model", tiny_tokenizer)
    flags = ["--no-do_sample", "--context_size", 1000000, "--max_new_tokens", 500000]
    with LiveScript(CHAT, "--model_name_or_path", model, *flags, cwd=tmp_path) as chat:
        for number in (1, 2):
            already = len(chat.output)
            chat.process.stdin.write("hello\n")
            chat.wait_for(" the", after=already, num_times=3)
            chat.press_ctrl_c()
            chat.wait_for("(interrupted)", num_times=number)
        chat.process.stdin.write("/save chat.json\n")
        chat.process.stdin.close()
        assert chat.process.wait(timeout=60) == 0
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert all(message["content"].startswith("the the") for message in messages[1::2])
