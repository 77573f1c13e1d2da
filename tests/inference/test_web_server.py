"""The web page's script: its flags, its server, and the page under Chromium."""

import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import REPO, save_tiny_model

from longqlora.inference.chat.web_server import available_port

WEB = "script/inference/web.py"


@pytest.fixture
def taken_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_bad_flags_end_before_the_model_is_looked_for(taken_port, monkeypatch, capsys):
    for arguments, message in (
        (["--port", "70000"], "--port: must be between 0 and 65535"),
        (["--port", "-1"], "--port: must be between 0 and 65535"),
        (["--port", str(taken_port)], f"--port {taken_port}: cannot listen there (Address already in use)"),
        (["--host", "no such host", "--port", "0"], "--host no such host"),
        (["--host", "", "--port", "0"], "--host"),
        (["--max_upload_mb", "0", "--port", "0"], "--max_upload_mb: must be at least 1"),
        (["--temperature", "-1", "--port", "0"], "--temperature"),
        (["--context_size", "0", "--port", "0"], "--context_size"),
    ):
        command = [WEB, "--model_name_or_path", "/no/such/model", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as outcome:
            runpy.run_path(str(REPO / WEB), run_name="__main__")
        error = capsys.readouterr().err
        assert outcome.value.code == 2 and message in error and error.count("\n") == 1, (arguments, error)


def test_port_zero_finds_a_free_one(taken_port):
    port = available_port("127.0.0.1", 0)
    assert 0 < port != taken_port and available_port("127.0.0.1", port) == port


@pytest.fixture(scope="module")
def server(tiny_tokenizer, tmp_path_factory):
    """The script with a model that writes " the" for ever: (URL, process, lines it printed)."""
    import torch
    from transformers import AutoModelForCausalLM

    pytest.importorskip("gradio", reason="gradio is not installed: requirements-extras.txt")
    folder = save_tiny_model(tmp_path_factory.mktemp("web") / "model", tiny_tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        model.lm_head.weight[tiny_tokenizer(" the", add_special_tokens=False)["input_ids"][0]] = 1.0
    model.save_pretrained(folder)
    command = [
        sys.executable, str(REPO / WEB), "--model_name_or_path", str(folder), "--context_size", "100000", "--port", "0",
        "--max_new_tokens", "50000", "--no-do_sample", "--max_upload_mb", "1",
    ]  # fmt: skip
    # A proxy that nobody can reach: the server must not be asked for through it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HTTP_PROXY": "http://127.0.0.1:9"}
    for name in ("NO_PROXY", "no_proxy"):
        environment.pop(name, None)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + 120
        while not any("chat page at" in line for line in lines) and process.poll() is None:
            assert time.monotonic() < deadline, "".join(lines)
            time.sleep(0.02)
        found = re.search(r"chat page at (http://127\.0\.0\.1:\d+/)", "".join(lines))
        assert found, "".join(lines)
        yield found[1], process, lines
    finally:
        # Not killed at once: it takes its folder of uploads with it.
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(timeout=10)


def http_status(url: str, data: bytes | None = None, headers: dict | None = None) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data, headers or {}), timeout=30) as reply:
            return reply.status, str(reply.headers)
    except urllib.error.HTTPError as error:
        return error.code, str(error.headers)


def test_server_gives_out_the_page_alone(server, tmp_path):
    url = server[0]
    status, headers = http_status(url)
    assert status == 200 and "content-security-policy: default-src 'self'" in headers
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    assert http_status(f"{url}gradio_api/file={secret}")[0] == 403
    for size, expected in ((2**19, 200), (2**20 + 2**16, 413)):
        head = b'--sep\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n'
        body = head + b"w" * size + b"\r\n--sep--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=sep"}
        assert http_status(f"{url}gradio_api/upload", body, kind)[0] == expected, size


def test_page_in_a_browser(server, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements-extras.txt")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no chromium on this machine (Debian: apt install chromium)")
    url, process, lines = server
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            use_page(browser.new_context(), url, tmp_path)
        finally:
            browser.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert "Traceback" not in "".join(lines) and len([line for line in lines if "http" in line]) == 1


def use_page(context, url: str, tmp_path: Path) -> None:
    """Upload, ask, watch the answer grow, stop, reset; nothing foreign is loaded and nothing is complained of."""
    foreign, complaints = [], []
    context.set_default_timeout(30_000)
    context.on("request", lambda request: None if request.url.startswith((url, "data:", "blob:")) else
               foreign.append(request.url))  # fmt: skip
    context.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page, other = context.new_page(), context.new_page()
    for tab in (page, other):
        tab.goto(url)
        tab.wait_for_selector("#meter .track")

    def text(selector: str) -> str:
        return page.inner_text(selector).replace("\u00a0", " ")

    def wait_for(selector: str, part: str) -> None:
        page.wait_for_function(
            "([selector, part]) => document.querySelector(selector)?.innerText.includes(part)", arg=[selector, part]
        )

    meter = text("#meter")
    assert re.search(r"\d+ of 100 000 tokens", meter) and "adapter none" in text("#facts")
    (tmp_path / "notes.txt").write_text("wizards box")
    page.set_input_files("input[type=file]", tmp_path / "notes.txt")
    wait_for("#documents", "notes.txt")
    assert "tokens" in text("#documents") and text("#meter") != meter
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfa\x00")
    page.set_input_files("input[type=file]", tmp_path / "bad.txt")
    wait_for("#status .error", "not UTF-8")

    question = "<img src=x onerror=alert(1)> [x](javascript:alert(2))\n    indented"
    page.fill("#question textarea", question)
    page.click("#send")
    wait_for("#chat", "the the")
    length = len(text("#chat"))
    page.wait_for_function("length => document.querySelector('#chat').innerText.length > length", arg=length)
    assert question in text("#chat"), "shown as it was written"
    assert page.input_value("#question textarea") == "" and not page.is_enabled("#send")
    page.click("#stop")
    wait_for("#status", "stopped")
    answered = text("#chat")
    time.sleep(0.3)
    assert text("#chat") == answered and "the the" in answered and page.is_enabled("#send")
    assert "the the" not in other.inner_text("#chat") and "notes.txt" not in other.inner_text("#documents")

    page.click("#reset")
    wait_for("#status", "cleared")
    assert text("#meter") == meter and "notes.txt" not in text("#documents") and "the the" not in text("#chat")

    # A tab that closes while it is answered leaves the model to others.
    other.fill("#question textarea", "hello")
    other.click("#send")
    other.wait_for_function("document.querySelector('#chat').innerText.includes('the the')")
    other.close()
    page.fill("#question textarea", "hello")
    page.press("#question textarea", "Enter")
    wait_for("#chat", "the the")
    page.click("#stop")
    wait_for("#status", "stopped")
    assert not foreign and not complaints

    # With Markdown, HTML is made harmless and pictures from elsewhere stay there.
    page.click("text=Settings")
    page.click("text=Show Markdown")
    page.fill("#question textarea", "**bold** <b onclick=alert(3)>b</b> ![x](http://192.0.2.1/a.png) <script>alert(4)")
    page.click("#send")
    page.wait_for_selector("#chat strong")
    page.click("#stop")
    wait_for("#status", "stopped")
    assert page.locator("#chat [onclick]").count() == 0 == page.locator("#chat script").count()
    assert all("Content Security Policy" in complaint for complaint in complaints)
