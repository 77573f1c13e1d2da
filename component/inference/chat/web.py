"""A chat in the browser: gradio's ChatInterface around our generation, and a guard in front of its server.

The page itself is gradio's: upload, stop, retry, undo, clear, and the queue in which one tab after the other is
answered. Ours are the prompt, which leaves out what the context has no room for, the meter that shows how full it is,
and the guard. gradio comes with requirements-extras.txt.
"""

import argparse
import copy
import html
import ipaddress
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import torch
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from longqlora.cli import USER_ERRORS, one_line
from longqlora.data.documents import read_document
from longqlora.inference.chat.session import ChatSession
from longqlora.inference.generation import GenerationOptions, generate_text
from longqlora.inference.load import LoadedModel, model_facts

# Seconds between two looks at a growing answer.
STREAM_INTERVAL = 0.2
# The browser loads nothing from elsewhere, whatever an answer's Markdown names.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)

# gradio offers to share a message with files through the Hugging Face hub.
NO_SHARING = "#chat button[aria-label=Share] {display: none}"


class PageSession(ChatSession):
    """The conversation of a tab, made from gradio's record of it for every request."""

    # A fast tokenizer fails where two threads encode with it.
    encoder_lock = threading.Lock()

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        with self.encoder_lock:
            return super().encode(messages)

    def restore(self, history: list[dict], files: Sequence[str | dict] = ()) -> "PageSession":
        """Take turns and documents from gradio's messages, and the `files` of the next one: paths, or {"path": ...}.

        A question without an answer is left out.
        """
        documents, question = {}, ""
        for message in history:
            parts = message["content"]
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            documents.update(uploaded_document(part["file"]["path"]) for part in parts if part["type"] == "file")
            if message["role"] == "assistant":
                self.add_turn(question, text)
            question = text
        documents.update(uploaded_document(file if isinstance(file, str) else file["path"]) for file in files)
        self.documents = list(documents.items())
        return self


@lru_cache(maxsize=256)
def uploaded_document(path: str) -> tuple[str, str]:
    """(file name, text) of an upload. Raises ValueError for one that cannot be read."""
    folder, name = os.path.split(path)
    try:
        return name, read_document(path)
    except USER_ERRORS as error:
        raise ValueError(one_line(error).removeprefix("document: ").replace(f"{folder}/", "")) from None


def build_page(loaded: LoadedModel, *, template: str, options: GenerationOptions, system: str | None):
    """The page of a chat with `loaded`, a gradio.Blocks; its settings begin with `options` and `system`."""
    import gradio as gr

    # Answers are decoded with the model's own tokenizer while other tabs encode.
    encoding = replace(loaded, tokenizer=copy.deepcopy(loaded.tokenizer))
    # One thread: after a stop, the last token is done before the next answer begins.
    writer = ThreadPoolExecutor(max_workers=1)

    def meter(num_tokens: int) -> str:
        size = loaded.context_size
        return f"Context: {num_tokens:,} of {size:,} tokens <progress value={num_tokens} max={size}></progress>"

    def count(history: list[dict], system: str) -> str:
        return meter(len(PageSession(encoding, template, options, system).restore(history).prompt("").ids))

    def count_before_last(history: list[dict], system: str) -> str:
        last = max((index for index, message in enumerate(history) if message["role"] == "user"), default=0)
        return count(history[:last], system)

    def check(message: dict) -> dict:
        """Refuse what can never be asked, before it becomes part of the conversation."""
        try:
            if not message["text"].strip():
                raise ValueError("write a question, also with documents")
            session = PageSession(encoding, template, options).restore([], message["files"])
            if session.prompt(message["text"]).notice:
                raise ValueError(f"the documents are too long for the context of {loaded.context_size} tokens")
        except ValueError as error:
            return gr.validate(False, one_line(error))
        return gr.validate(True, "")

    def respond(message: dict, history: list[dict], system: str, max_new_tokens, temperature, top_p):
        """Yield the answer as it grows, with the meter."""
        pieces, stop_event = [], threading.Event()
        given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        given = {name: value for name, value in given.items() if value is not None}
        session = PageSession(encoding, template, replace(options, do_sample=True, **given), system)
        prompt = session.restore(history, message["files"]).prompt(message["text"])
        if prompt.notice:
            gr.Info(prompt.notice)
        answer = writer.submit(
            generate_text, loaded.model, loaded.tokenizer, prompt.ids, prompt.options,
            on_text=pieces.append, stop_event=stop_event,
        )  # fmt: skip
        try:
            while wait([answer], STREAM_INTERVAL).not_done:
                if not page.is_running:
                    return
                yield "".join(pieces).strip(), meter(len(prompt.ids))
            yield "".join(pieces).strip(), meter(len(prompt.ids) + answer.result().num_new_tokens)
        except torch.OutOfMemoryError:
            raise gr.Error("out of GPU memory; a shorter conversation or --load_in_4bit help") from None
        finally:
            stop_event.set()

    settings = [
        gr.Textbox(system or "", label="System message", placeholder="that of the template"),
        gr.Number(options.max_new_tokens, label="Longest answer, in tokens", precision=0, minimum=1),
        gr.Slider(0, max(2, options.temperature), 0 if options.is_greedy else options.temperature, label="Temperature"),
        gr.Slider(0.01, 1, options.top_p, label="top_p"),
    ]
    with gr.Blocks(title="LongQLoRA chat", analytics_enabled=False, delete_cache=(60, 600), fill_height=True) as page:
        facts = {**model_facts(loaded), "template": template}
        line = " \u00b7 ".join(f"{name} {value}" for name, value in facts.items() if name != "versions")
        gr.HTML(f"<h2>LongQLoRA chat</h2><small>{html.escape(line)}</small>", elem_id="facts")
        shown_meter = gr.HTML(count([], system), elem_id="meter")
        chat = gr.ChatInterface(
            respond, multimodal=True, validator=check, api_visibility="private",
            chatbot=gr.Chatbot(show_label=False, scale=1, elem_id="chat", buttons=["copy", "copy_all"]),
            textbox=gr.MultimodalTextbox(
                file_count="multiple", autofocus=True, stop_btn=True, elem_id="question",
                placeholder="Message (Enter sends, Shift+Enter breaks the line)",
            ),
            additional_inputs=settings, additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
            additional_outputs=shown_meter,
        )  # fmt: skip
        counting = {"inputs": [chat.chatbot, settings[0]], "outputs": shown_meter, "show_progress": "hidden",
                    "api_visibility": "private", "queue": False}  # fmt: skip
        gr.on([chat.textbox.stop, chat.chatbot.clear], count, **counting)
        chat.chatbot.undo(count_before_last, **counting)
    return page


class OwnPageOnly:
    """ASGI layer that answers requests under the server's `names` and of its own page, and takes so many uploads.

    Any website may send its visitor's browser to an address of the visitor's own network, and one whose name is made to
    point at that address would read the replies too (DNS rebinding); an address that is a name itself cannot be made to
    point elsewhere. gradio compares the origin of a request with its host, but answers in any case.

    proxies: names of the page elsewhere. folder: of uploads; it is kept below `max_bytes`.
    """

    def __init__(self, app, names: set[str], proxies: set[str], folder: Path, max_bytes: int):
        self.app, self.names, self.proxies, self.folder, self.max_bytes = app, names, proxies, folder, max_bytes

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_policy(message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = POLICY
            await send(message)

        refusal = None if scope["type"] == "lifespan" else self.refusal(scope)
        await (PlainTextResponse(*refusal) if refusal else self.app)(scope, receive, send_with_policy)

    def refusal(self, scope) -> tuple[str, int] | None:
        """Text and status of the answer to a request that is refused."""
        headers, is_reading = Headers(scope=scope), scope.get("method") in ("GET", "HEAD", "OPTIONS")
        host = headers.get("host", "").lower()
        try:
            name, page = urlsplit(f"//{host}").hostname or "", urlsplit(headers.get("origin", "").lower())
            is_known = name in self.names | self.proxies or ipaddress.ip_address(name)
        except ValueError:
            is_known = False
        if not is_known:
            return "this server has another name; --allowed_hosts adds one", 403
        # A proxy may leave the port out of the host, or put the server's own name there.
        is_own = "origin" not in headers or page.netloc == host or page.hostname in self.proxies
        is_link = is_reading and headers.get("sec-fetch-dest") == "document"
        if not is_own or not (is_link or headers.get("sec-fetch-site", "none") in ("same-origin", "none")):
            return "asked for by another page", 403
        if headers.get("content-type", "").lower().startswith("multipart/"):
            # gradio's other places for uploads are outside the folder.
            if not scope["path"].endswith("/upload"):
                return "no uploads here", 404
            num_bytes = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
            if num_bytes + int(headers.get("content-length", self.max_bytes + 1)) > self.max_bytes:
                return "too much was uploaded; wait some minutes", 413
        return None


def serve(page, args: argparse.Namespace) -> str:
    """Start the server of `page` in a thread, as the flags of web.py say; returns its URL, or the public one."""
    import gradio as gr

    names, host = {"localhost", args.host.lower()}, args.host
    if host not in ("localhost", "127.0.0.1", "::1"):
        names.add(socket.gethostname().lower())
    guard = Middleware(
        OwnPageOnly, names, set(map(str.lower, args.allowed_hosts)), Path(os.environ["GRADIO_TEMP_DIR"]),
        args.max_total_upload_mb * 2**20,
    )  # fmt: skip
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, local_url, share_url = page.queue(api_open=False).launch(
        theme=gr.themes.Default(**fonts), css=NO_SHARING, app_kwargs={"middleware": [guard]},
        max_file_size=args.max_upload_mb * 2**20, server_name=f"[{host}]" if ":" in host else host,
        server_port=args.port, share=args.share, prevent_thread_lock=True, quiet=True, footer_links=[],
        run_history=False, ssr_mode=False, enable_monitoring=False, show_error=True, pwa=False, mcp_server=False,
    )  # fmt: skip
    if share_url:
        names.add(urlsplit(share_url).hostname)
    return share_url or local_url
