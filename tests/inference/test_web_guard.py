"""Whom the web page answers, and how much it takes: over ASGI, without a browser or a model."""

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: requirements-extras.txt")

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse

from longqlora.inference.chat.web_chat import Conversations, SharedModel
from longqlora.inference.chat.web_guard import OwnPageOnly, ServerNames, UploadLimit
from longqlora.inference.chat.web_page import build_page
from longqlora.inference.chat.web_server import layers
from longqlora.inference.generation import GenerationOptions

LOCAL, NETWORK, BEHIND_PROXY = ("127.0.0.1", []), ("0.0.0.0", []), ("127.0.0.1", ["Chat.example.org"])
HOSTS = [
    *[(LOCAL, host, True) for host in ("127.0.0.1:7860", "localhost:7860", "LocalHost", "[::1]:7860", "127.0.0.1")],
    *[(LOCAL, host, False) for host in ("evil.example:7860", "evil.example", "127.0.0.1.evil.example", "192.168.1.5",
                                        "[2001:db8::1]:7860", "", "localhost:7860@evil.example",
                                        "localhost.evil.example", "evil.example/localhost", "[::1", "0.0.0.0:7860")],
    *[(NETWORK, host, True) for host in ("localhost:7860", "192.168.1.5:7860", "[2001:db8::1]:7860", "0.0.0.0:7860")],
    *[(NETWORK, host, False) for host in ("evil.example:7860", "192.168.1.5.evil.example", "")],
    (("::1", []), "[::1]:80", True), (("[::1]", []), "[::1]:80", True), (("::1", []), "192.168.1.5", False),
    (("192.168.1.5", []), "192.168.1.5:7860", True), (("myserver", []), "myserver:7860", True),
    (("myserver", []), "evil.example:7860", False), (("localhost", []), "192.168.1.5", False),
    (BEHIND_PROXY, "chat.example.org", True), (BEHIND_PROXY, "www.example.org", False),
    *[(("127.0.0.1", [other]), "chat.example.org:8443", True) for other in ("chat.example.org:8443",
                                                                           "https://chat.example.org/chat/")],
    (("127.0.0.1", ["fd00::2"]), "[fd00::2]", True),
]  # fmt: skip

HERE = "http://localhost:7860"
FOREIGN_SITE = {"sec-fetch-site": "cross-site"}
# (headers beside a good host, whether it may be read, whether it may be written to)
SENDERS = [
    ({}, True, True),
    ({"origin": HERE}, True, True),
    ({"origin": HERE, "sec-fetch-site": "same-origin"}, True, True),
    ({"referer": f"{HERE}/?x=1"}, True, True),
    ({"sec-fetch-site": "none", "sec-fetch-dest": "document"}, True, True),
    ({"origin": "http://evil.example"}, False, False),
    ({"origin": "http://localhost:3000"}, False, False),
    ({"origin": "http://localhost"}, False, False),
    ({"origin": "http://127.0.0.1:7860"}, False, False),
    ({"origin": "null"}, False, False),
    ({"origin": "http://[::1"}, False, False),
    ({"origin": HERE, "sec-fetch-site": "cross-site"}, False, False),
    ({"referer": "http://evil.example/localhost:7860"}, True, False),
    ({"sec-fetch-site": "same-site"}, False, False),
    (FOREIGN_SITE, False, False),
    ({**FOREIGN_SITE, "sec-fetch-dest": "script"}, False, False),
    ({**FOREIGN_SITE, "sec-fetch-dest": "iframe"}, False, False),
    # A link to the page.
    ({**FOREIGN_SITE, "sec-fetch-dest": "document", "referer": "http://evil.example"}, True, False),
]


def small_app(host: str, others: list[str]) -> TestClient:
    async def answer(request):
        return PlainTextResponse("a chat")

    async def events(request):
        return StreamingResponse(iter(["data: a chat\n\n"]), media_type="text/event-stream")

    async def talk(websocket):
        await websocket.accept()
        await websocket.send_text("a chat")
        await websocket.close()

    routes = [Route("/", answer, methods=["GET", "POST", "DELETE"]), Route("/events", events)]
    app = Starlette(routes=[*routes, WebSocketRoute("/ws", talk)])
    return TestClient(OwnPageOnly(app, ServerNames(host, others)))


def hears_websocket(client: TestClient, headers: dict) -> bool:
    try:
        with client.websocket_connect("/ws", headers=headers) as websocket:
            return websocket.receive_text() == "a chat"
    except WebSocketDenialResponse as refusal:
        assert refusal.status_code == 403
        return False


@pytest.mark.parametrize(("bound", "host", "is_known"), HOSTS)
def test_only_names_of_the_server_are_answered(bound, host, is_known):
    client, headers = small_app(*bound), {"host": host}
    for reply in (client.get("/", headers=headers), client.get("/events", headers=headers),
                  client.post("/", headers=headers)):  # fmt: skip
        assert (reply.status_code, "a chat" in reply.text) == ((200, True) if is_known else (403, False))
    assert hears_websocket(client, headers) == is_known


@pytest.mark.parametrize(("headers", "may_read", "may_write"), SENDERS)
def test_other_pages_neither_read_nor_write(headers, may_read, may_write):
    client, headers = small_app(*LOCAL), {"host": "localhost:7860", **headers}
    for path in ("/", "/events"):
        assert (client.get(path, headers=headers).status_code == 200) == may_read
    assert (client.post("/", headers=headers).status_code == 200) == may_write
    assert (client.delete("/", headers=headers).status_code == 200) == may_write
    assert hears_websocket(client, headers) == may_write


@pytest.mark.parametrize("host", ["chat.example.org", "127.0.0.1:7860"], ids=["nginx $host", "the server's own"])
def test_a_proxy_may_change_the_host(host):
    """gradio's example for nginx leaves the port out; nginx and Apache put the server's address on their own."""
    client, headers = small_app(*BEHIND_PROXY), {"host": host, "sec-fetch-site": "same-origin"}
    for origin, is_own in (("https://chat.example.org:8443", True), ("https://chat.example.org", True),
                           ("https://chat.example.org.evil.example", False), ("https://x@evil.example", False),
                           ("http://localhost:3000", False), ("null", False)):  # fmt: skip
        for send in (client.get, client.post):
            assert (send("/", headers={**headers, "origin": origin}).status_code == 200) == is_own, origin
    other_port = {"host": host, "origin": "https://chat.example.org:9000", "sec-fetch-site": "same-site"}
    assert client.post("/", headers=other_port).status_code == 403


@pytest.mark.parametrize("other", ["*", "*.example.org", "", "https://", "chat example.org", "[::1"])
def test_what_is_no_name_is_refused(other):
    with pytest.raises(ValueError, match="--allowed_hosts: .* is no host name"):
        ServerNames("127.0.0.1", [other])


def test_the_shared_name_is_added_when_it_is_known():
    names = ServerNames("127.0.0.1")
    assert "abc.gradio.live" not in names
    names.add("https://abc.gradio.live")
    assert "abc.gradio.live" in names and "def.gradio.live" not in names


@pytest.fixture
def page(tiny_tokenizer, tmp_path, monkeypatch):
    """The page's own app, with room for 3 MiB of uploads, its conversations and blocks."""
    import gradio as gr

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    (tmp_path / "uploads").mkdir()
    loaded = SimpleNamespace(model=None, tokenizer=tiny_tokenizer, context_size=400)
    conversations = Conversations(SharedModel(loaded, "vicuna_v1.1"), GenerationOptions(max_new_tokens=8))
    blocks = build_page(conversations, "facts").queue(api_open=False)
    # As launch() leaves it: only then are the paths of files checked.
    blocks.max_file_size, blocks.has_launched = 2**20, True
    middleware = layers(ServerNames("127.0.0.1"), max_upload_mb=1, max_total_upload_mb=3)
    app = gr.routes.App.create_app(blocks, app_kwargs={"middleware": middleware})
    with TestClient(app, base_url=HERE) as client:
        yield client, tmp_path / "uploads", conversations, blocks


def upload(client: TestClient, *sizes: int, headers: dict | None = None):
    files = [("files", (f"{number}.txt", bytes([97 + number]) * size)) for number, size in enumerate(sizes)]
    return client.post("/gradio_api/upload", files=files, headers=headers)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_gradio_itself_is_behind_the_guard(page):
    client, folder, *_ = page
    assert client.get("/config").status_code == 200
    rebound = {"host": "evil.example:7860", "origin": "http://evil.example:7860", "sec-fetch-site": "same-origin"}
    foreign = {"origin": "http://evil.example", **FOREIGN_SITE}
    join = {"data": [], "fn_index": 0, "session_hash": "abc"}
    for headers in (rebound, foreign):
        for path in ("/", "/config", "/gradio_api/queue/data?session_hash=abc", "/gradio_api/heartbeat/abc",
                     "/gradio_api/upload_progress?upload_id=a"):  # fmt: skip
            assert client.get(path, headers=headers).status_code == 403, path
        for path in ("queue/join", "run/predict", "cancel", "reset"):
            assert client.post(f"/gradio_api/{path}", json=join, headers=headers).status_code == 403, path
        assert upload(client, 10, headers=headers).status_code == 403
    assert not files_in(folder)
    assert upload(client, 10, headers={"origin": HERE}).status_code == 200 and len(files_in(folder)) == 1


def test_uploads_are_limited_in_total_and_leave_nothing_when_refused(page):
    client, folder, *_ = page
    assert upload(client, 2**20 + 1).status_code == 413 and not files_in(folder)
    assert upload(client, *[2**20] * 4).status_code == 413 and not files_in(folder)
    assert upload(client, 2**20, 2**20).status_code == 200
    assert upload(client, 2**20 - 1, 2**20).status_code == 413 and len(files_in(folder)) == 2
    assert upload(client, 2**19).status_code == 200
    for path in files_in(folder):
        path.unlink()
    assert upload(client, 2**20, 2**20).status_code == 200, "room again"
    files = {"video": ("a.mp4", b"a")}
    assert client.post("/gradio_api/process_recording", files=files).status_code == 404
    assert client.post("/gradio_api/queue/join", content=b" " * (2**20 + 1)).status_code == 400


def test_an_upload_that_is_cut_off_leaves_nothing(page):
    client, folder, *_ = page
    head = b'--sep\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n'
    messages = iter([{"type": "http.request", "body": head + b"w" * 2**18, "more_body": True},
                     {"type": "http.disconnect"}])  # fmt: skip
    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=sep")]
    path = "/gradio_api/upload"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": headers, "scheme": "http", "server": ("localhost", 80), "root_path": ""}  # fmt: skip

    async def receive():
        return next(messages)

    async def send(message):
        pass

    asyncio.run(client.app(scope, receive, send))
    assert not files_in(folder)


def test_a_file_goes_when_it_is_read_and_no_other_can_be_named(page, tmp_path):
    import gradio as gr

    client, folder, conversations, blocks = page
    [event] = [fn for fn in blocks.fns.values() if any(name == "upload" for _, name in fn.targets)]
    outside = tmp_path / "private.txt"
    outside.write_text("private")

    def read(path: str, **facts) -> None:
        file = {"path": path, "orig_name": "0.txt", **facts}
        asyncio.run(blocks.process_api(event, [[file]], request=gr.Request(session_hash="abc")))

    [path] = upload(client, 20).json()
    read(path, meta={"_type": "gradio.FileData"})
    assert [document.name for document in conversations.of("abc").documents()] == ["0.txt"]
    assert not [found for found in files_in(folder) if found.stat().st_size]
    for facts in ({"meta": {"_type": "gradio.FileData"}}, {}, {"meta": {"_type": "x"}}):
        with pytest.raises((gr.exceptions.InvalidPathError, ValueError)):
            read(str(outside), **facts)
    assert outside.read_text() == "private" and len(conversations.of("abc").documents()) == 1


def test_many_uploads_at_once_share_the_limit(tmp_path):
    """Two uploads of 80 bytes under way, of which 100 fit together."""
    from starlette.formparsers import MultiPartException

    outcomes = []

    async def app(scope, receive, send):
        try:
            while (await receive()).get("more_body"):
                pass
            outcomes.append("taken")
        except MultiPartException:
            outcomes.append("refused")

    limit = UploadLimit(app, tmp_path, 100, 10)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/upload",
        "headers": [(b"content-type", b"multipart/form-data")],
    }

    async def one():
        parts = iter([True, False])

        async def receive():
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b"w" * 40, "more_body": next(parts)}

        await limit(scope, receive, None)

    async def both():
        await asyncio.gather(one(), one())
        await one()

    asyncio.run(both())
    assert sorted(outcomes[:2]) == ["refused", "taken"] and outcomes[2] == "taken" and limit.num_arriving == 0


def test_a_limit_in_total_below_that_of_a_file_is_refused(repo, monkeypatch, capsys):
    import runpy

    words = ["--model_name_or_path", "/no/such/model", "--port", "0", "--max_upload_mb", "9"]
    monkeypatch.setattr(sys, "argv", ["web.py", *words, "--max_total_upload_mb", "8"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(repo / "script/inference/web.py"), run_name="__main__")
    assert "--max_total_upload_mb: 8 is less than --max_upload_mb 9" in capsys.readouterr().err
