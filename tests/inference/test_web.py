"""The web page: whom its server answers, what it makes of gradio's history, its script, and the page in Chromium."""

import asyncio
import os
import re
import shutil
import socket
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("gradio", reason="gradio is not installed: requirements-extras.txt")

import httpx
from live_script import LiveScript
from rigged_model import save_parrot
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from longqlora.inference.chat.web import OwnPageOnly, PageSession, build_page
from longqlora.inference.generation import GenerationOptions
from longqlora.inference.load import LoadedModel

WEB = "script/inference/web.py"
HERE = "http://localhost:7860"
SITE, DESTINATION = "sec-fetch-site", "sec-fetch-dest"
# Headers, and whether such a request may read and may write.
REQUESTS = [
    *[({"host": host}, True, True) for host in (
        "localhost:7860", "LocalHost", "127.0.0.1:7860", "[::1]:7860", "192.168.1.5:7860", "chat.example.org",
    )],
    *[({"host": host}, False, False) for host in (
        "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example", "localhost:7860@evil.example",
        "evil.example/localhost", "[::1", "", "www.example.org",
    )],
    *[({"origin": origin}, True, True) for origin in (HERE, "https://chat.example.org:8443")],
    *[({"origin": origin}, False, False) for origin in (
        "http://evil.example", "http://localhost:3000", "http://localhost", "http://127.0.0.1:7860", "null",
        "http://[::1", "https://chat.example.org.evil.example", "https://x@evil.example",
    )],
    ({"origin": HERE, SITE: "same-origin"}, True, True),
    ({SITE: "none", DESTINATION: "document"}, True, True),
    *[({SITE: site, DESTINATION: kind}, False, False) for site in ("cross-site", "same-site")
      for kind in ("script", "iframe", "empty")],
    ({"origin": HERE, SITE: "cross-site"}, False, False),
    # A link to the page.
    ({SITE: "cross-site", DESTINATION: "document"}, True, False),
]  # fmt: skip


@pytest.fixture
def guarded(tmp_path):
    """A client of a server that says "a chat" behind the guard, whose folder of uploads is tmp_path."""
    return TestClient(OwnPageOnly(PlainTextResponse("a chat"), {"localhost"}, {"chat.example.org"}, tmp_path, 1000))


@pytest.mark.parametrize(("headers", "may_read", "may_write"), REQUESTS, ids=str)
def test_only_its_own_page_reaches_the_server(guarded, headers, may_read, may_write):
    headers = {"host": "localhost:7860", **headers}
    for reply, is_allowed in (
        (guarded.get("/", headers=headers), may_read), (guarded.post("/", headers=headers), may_write),
    ):  # fmt: skip
        assert (reply.status_code, "a chat" in reply.text) == ((200, True) if is_allowed else (403, False))
        assert reply.headers["content-security-policy"].startswith("default-src 'self'")


def test_uploads_are_limited_in_total(guarded, tmp_path):
    (tmp_path / "kept").mkdir()
    for num_bytes, num_kept, path, status in (
        (500, 0, "/upload", 200), (1000, 0, "/upload", 413), (10, 0, "/other", 404), (500, 600, "/upload", 413),
    ):  # fmt: skip
        (tmp_path / "kept/a.txt").write_bytes(b"w" * num_kept)
        files = {"files": ("a.txt", b"w" * num_bytes)}
        assert guarded.post(path, files=files, headers={"host": "localhost"}).status_code == status


def user(text: str, *paths) -> dict:
    files = [{"type": "file", "file": {"path": str(path)}} for path in paths]
    return {"role": "user", "content": [*files, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_the_history_of_gradio_becomes_a_conversation(tiny_tokenizer, tmp_path):
    for folder, text in (("one", "first"), ("two", "wizards")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    history = [
        user("never answered", tmp_path / "one/a.txt"), user("hello"), assistant("the fox"),
        user("and", tmp_path / "two/a.txt"), assistant("the dog"),
    ]  # fmt: skip
    loaded = SimpleNamespace(tokenizer=tiny_tokenizer, context_size=600)
    session = PageSession(loaded, "vicuna_v1.1", GenerationOptions(max_new_tokens=9), "be brief")
    session.restore(history)
    assert session.documents == [("a.txt", "wizards")], "a file of the same name is replaced"
    assert [message["content"] for message in session.history] == ["hello", "the fox", "and", "the dog"]
    text = tiny_tokenizer.decode(session.prompt("why?").ids)
    assert "be brief" in text and "Below is the text of a.txt." in text and text.endswith("USER: why?\nASSISTANT: ")


@pytest.fixture
def page(tiny_tokenizer):
    """The page of a model with a context of 600 tokens."""
    config = SimpleNamespace(rope_parameters={"rope_type": "linear"})
    facts = {"model": None, "attention": "dense", "dtype": torch.float32, "load_in_4bit": False}
    loaded = LoadedModel(tiny_tokenizer, config, "<base>", None, 600, **facts)
    return build_page(loaded, template="vicuna_v1.1", options=GenerationOptions(max_new_tokens=9), system=None)


@pytest.mark.parametrize(
    ("text", "document", "message"),
    [
        (" ", "wizards", "write a question"),
        ("hello", "\0", "notes.txt"),
        ("hello", " \n", "notes.txt"),
        ("hello", "w " * 900, "too long for the context of 600"),
        ("w " * 900, None, "shorten it"),
        ("\ud800", None, "surrogate"),
        ("hello", "wizards", None),
    ],
)
def test_what_cannot_be_asked_is_refused_before_it_is_sent(page, tmp_path, text, document, message):
    (tmp_path / "notes.txt").write_text(document or "")
    [check] = {handler.validator for handler in page.fns.values() if handler.validator}
    answer = check({"text": text, "files": [str(tmp_path / "notes.txt")] if document else []})
    assert answer["is_valid"] == (message is None) and (message or "") in answer["message"]
    assert str(tmp_path) not in answer["message"]


def test_no_file_but_an_upload_can_be_named(page, tmp_path):
    import gradio as gr

    [handler] = [handler for handler in page.fns.values() if handler.name == "count"]
    (tmp_path / "private.txt").write_text("private")
    page.has_launched = True
    for facts in ({"meta": {"_type": "gradio.FileData"}}, {}, {"meta": {"_type": "x"}}):
        history = [user("what?"), assistant("x")]
        history[0]["content"].append({"type": "file", "file": {"path": str(tmp_path / "private.txt"), **facts}})
        with pytest.raises((gr.exceptions.InvalidPathError, ValueError)):
            asyncio.run(page.process_api(handler, [history, ""], request=gr.Request(session_hash="abc")))


def test_bad_flags_end_before_the_model_is_looked_for(run_in_process):
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for flags, message in (
        ("--port 70000", "--port 70000: cannot listen there"),
        (f"--port {port}", f"--port {port}: cannot listen there: Address already in use"),
        ("--host no.such.host", "--host no.such.host"),
        ("--max_upload_mb 0", "--max_upload_mb: must be from 1 to"),
        ("--max_upload_mb 9 --max_total_upload_mb 8", "--max_upload_mb: must be from 1 to the 8 MiB"),
        ("--allowed_hosts https://chat.example.org/", "--allowed_hosts: 'https://chat.example.org/' is no host name"),
    ):
        code, _, error = run_in_process(WEB, "--model_name_or_path", "/no/such/model", "--port", 0, *flags.split())
        assert code == 2 and message in error and error.count("\n") == 1, (flags, error)
    taken.close()


@pytest.fixture(scope="module")
def server(tiny_tokenizer, tmp_path_factory):
    """URL of the script's page, whose model writes " the" for ever; it must end in order at Ctrl-C."""
    folder = save_parrot(tmp_path_factory.mktemp("web") / "model", tiny_tokenizer)
    # A proxy that nobody can reach: the server must not be asked for through it.
    environment = {name: value for name, value in os.environ.items() if name.upper() != "NO_PROXY"}
    environment |= {"HTTP_PROXY": "http://127.0.0.1:9", "TMPDIR": str(folder)}
    flags = ["--context_size", 100000, "--port", 0, "--max_new_tokens", 50000, "--no-do_sample", "--max_upload_mb", 1]
    with LiveScript(WEB, "--model_name_or_path", folder, *flags, cwd=folder, environment=environment) as script:
        script.wait_for("(Ctrl-C ends it)\n")
        yield re.search(r"chat page at (http://127\.0\.0\.1:\d+/)", script.output)[1]
        script.press_ctrl_c()
        assert script.process.wait(timeout=60) == 0 and not list(folder.glob("longqlora-web-*"))
        assert "Traceback" not in script.output and script.output.count("http") == 1


def test_server_gives_out_the_page_alone(server, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    with httpx.Client(base_url=server, trust_env=False, timeout=30) as client:
        assert client.get("").status_code == 200
        for method, path in (("GET", ""), ("GET", "config"), ("POST", "gradio_api/queue/join")):
            assert client.request(method, path, headers={"Origin": "http://evil.example"}).status_code == 403, path
        assert client.get(f"gradio_api/file={tmp_path}/secret.txt").status_code == 403
        for size, expected in ((2**19, 200), (2**20 + 2**16, 413)):
            files = {"files": ("a.txt", b"w" * size)}
            assert client.post("gradio_api/upload", files=files).status_code == expected, size


DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def browser_context(request):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements-extras.txt")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no chromium on this machine (Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_context(**request.param)


class Tab:
    """A browser tab with the page, and what a user does there."""

    def __init__(self, context, url: str):
        self.page = context.new_page()
        self.page.goto(url)
        self.page.wait_for_selector("#meter progress")

    def text(self, selector: str = "#chat") -> str:
        return self.page.inner_text(selector)

    def tokens(self) -> int:
        return int(re.search(r"Context: ([\d,]+) of 100,000 tokens", self.text("#meter"))[1].replace(",", ""))

    def wait_for(self, part: str, selector: str = "#chat") -> None:
        self.wait_until(lambda: part in self.text(selector))

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, self.text("body")[-600:]
            self.page.wait_for_timeout(50)

    def upload(self, path) -> None:
        self.page.set_input_files("#question input[type=file]", path)
        self.page.wait_for_selector("#question .thumbnail-item")

    def send(self, text: str) -> None:
        self.page.fill("#question textarea", text)
        self.page.click("#question .submit-button")

    def stop(self) -> None:
        self.page.click("#question .stop-button")
        # At a person's pace: the page takes the answer into its history by requests of its own.
        self.page.wait_for_selector("#question textarea:enabled")
        self.page.wait_for_timeout(1500)

    def press(self, label: str) -> None:
        self.page.click(f"#chat button[aria-label={label}]")


@pytest.mark.slow
def test_undo_behind_a_stop_takes_the_last_question_back_alone(browser_context, server, tmp_path):
    """Now and then gradio writes an older history back after a Stop, and the whole chat is gone (docs/log.md)."""
    browser_context.set_default_timeout(120_000)
    tab = Tab(browser_context, server)
    (tmp_path / "notes.txt").write_text("wizards box " * 50)
    tab.upload(tmp_path / "notes.txt")
    for question in ("what is it?", "and then?"):
        tab.send(question)
        tab.wait_until(lambda question=question: "the the" in tab.text().partition(question)[2])
        tab.stop()
    tab.press("Undo")
    tab.wait_until(lambda: "and then?" not in tab.text() and "notes.txt" in tab.text())
    assert tab.page.input_value("#question textarea") == "and then?"


def test_page_in_a_browser(browser_context, server, tmp_path):
    """Upload, ask, watch the answer grow, stop, retry, clear; two tabs; nothing foreign is loaded."""
    context, foreign, complaints = browser_context, [], []
    context.set_default_timeout(120_000)
    context.on("requestfinished", lambda request: None if request.url.startswith((server, "data:", "blob:")) else
               foreign.append(request.url))  # fmt: skip
    context.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    tab, other = Tab(context, server), Tab(context, server)
    empty = tab.tokens()
    assert "peft_model None" in tab.text("#facts") and "linear" in tab.text("#facts")

    (tmp_path / "notes.txt").write_text("wizards box " * 50)
    tab.upload(tmp_path / "notes.txt")
    tab.send("what is it? **bold** <b onclick=alert(1)>b</b> ![x](http://192.0.2.1/a.png) <script>alert(2)</script>")
    tab.wait_for("the the")
    assert tab.tokens() > empty + 100, "while it is answered"
    length = len(tab.text())
    tab.wait_until(lambda: len(tab.text()) > length)
    assert "notes.txt" in tab.text() and tab.page.locator("#chat strong").count() == 1
    assert tab.page.locator("#chat [onclick]").count() == 0 == tab.page.locator("#chat script").count()
    assert tab.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"

    assert tab.page.locator("[aria-label=Share]:visible").count() == 0
    # One answer at a time: the other tab waits, and can be stopped meanwhile.
    other.send("hello")
    other.wait_for("queue")
    length = len(tab.text())
    tab.wait_until(lambda: len(tab.text()) > length)
    assert "the the" not in other.text() and "notes.txt" not in other.text()
    other.stop()

    tab.stop()
    answered = tab.text()
    tab.page.wait_for_timeout(300)
    assert tab.text() == answered and "the the" in answered
    other.send("hello again")
    other.wait_for("the the")
    # A tab that closes while it is answered leaves the model to others.
    other.page.close()

    tab.press("Retry")
    tab.wait_until(lambda: "the the" in tab.text() and len(tab.text()) < len(answered))
    tab.stop()
    tab.press("Clear")
    tab.wait_until(lambda: tab.tokens() == empty and "notes.txt" not in tab.text())

    (tmp_path / "bad.txt").write_bytes(b"\xff\xfa\x00")
    tab.upload(tmp_path / "bad.txt")
    tab.send("what is it?")
    tab.wait_for("not UTF-8", "#question")
    assert tab.tokens() == empty and not foreign
    assert all("Content Security Policy" in line or "422" in line for line in complaints), complaints
