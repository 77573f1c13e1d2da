"""The server of a web page: where it listens, whom it answers, and what it lets the browser load.

Everything comes from here: system fonts, no analytics, and a policy that keeps the browser from loading
anything from elsewhere, whatever an answer's Markdown may name. gradio is imported where it is used,
since it is an extra.
"""

import logging
import os
import socket
from pathlib import Path

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)


class LocalResourcesOnly:
    """ASGI layer that adds POLICY to every answer of the server."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_policy(message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def available_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises ValueError where `host` has no such port to give."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port: must be between 0 and 65535, got {port}")
    if not host.strip("[]"):
        raise ValueError("--host: is empty; give 127.0.0.1 for this machine alone, 0.0.0.0 for its network")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]") or None, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--host {host} --port {port}: cannot listen there ({reason}); choose another port, or 0 for a free one"
        ) from None


def layers(names, *, max_upload_mb: int, max_total_upload_mb: int) -> list:
    """The server's ASGI layers, outermost first. names: the ServerNames it answers to."""
    from starlette.middleware import Middleware

    from longqlora.inference.chat.web_guard import OwnPageOnly, UploadLimit

    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    return [
        Middleware(OwnPageOnly, names),
        Middleware(UploadLimit, folder, max_total_upload_mb * 2**20, max_upload_mb * 2**20),
        Middleware(LocalResourcesOnly),
    ]


def serve(
    page, css: str, *, host: str, port: int, share: bool, allowed_hosts: list[str], max_upload_mb: int,
    max_total_upload_mb: int,
) -> str:  # fmt: skip
    """Start the server in a thread; returns the page's URL, or the public one with `share`.

    page: a gradio.Blocks. host, port: as `available_port` found them. allowed_hosts: further names it is asked for by.
    Uploads are kept in GRADIO_TEMP_DIR.
    """
    import gradio as gr

    from longqlora.inference.chat.web_guard import ServerNames

    names = ServerNames(host, allowed_hosts)
    limits = {"max_upload_mb": max_upload_mb, "max_total_upload_mb": max_total_upload_mb}
    bare_host = host.strip("[]")
    server_host = f"[{bare_host}]" if ":" in bare_host else bare_host
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, local_url, share_url = page.queue(api_open=False).launch(
        theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", **fonts), css=css,
        app_kwargs={"middleware": layers(names, **limits)}, max_file_size=max_upload_mb * 2**20,
        server_name=server_host, server_port=port, share=share, prevent_thread_lock=True,
        quiet=True, footer_links=[], run_history=False, ssr_mode=False, inbrowser=False, inline=False,
        enable_monitoring=False, show_error=True, pwa=False,
    )  # fmt: skip
    if share_url:
        names.add(share_url)
    return share_url or local_url


def shut_down(page) -> None:
    """End the server that `serve` started."""
    # Open tabs keep their connections: they are neither waited for nor reported when they are cut.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    page.server.force_exit = True
    page.close(verbose=False)
