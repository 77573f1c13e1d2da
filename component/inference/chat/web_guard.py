"""Who is let in to the web page, and how much may be uploaded to it: two ASGI layers.

Any website may send its visitor's browser to an address of the visitor's own network, and one whose name is made to
point at that address would read the replies too (DNS rebinding). So the server answers only under its own names, and
other pages change nothing here and read nothing. gradio compares the origin of a request with its host, but
answers in any case, and for a host that is not localhost it lets every origin read.

Imported where the page is served, since starlette comes with gradio, which is an extra.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse

READING = ("GET", "HEAD", "OPTIONS")
# Files of an upload take at least a block each.
BLOCK_BYTES = 4096


class ServerNames:
    """The host names that the server answers to.

    Those of this machine itself, `host`, at which it listens, and `others`. A server that listens to a network is also
    asked for by its addresses, of which it does not know all (NAT, containers): a name can be made to point anywhere,
    an address cannot. Raises ValueError for what is no name in `others`; a scheme or port with it does not count.
    """

    def __init__(self, host: str, others: Iterable[str] = ()):
        host = host.strip("[]")
        self.others = {bare_name(other) for other in others}
        self.names = {"localhost", "127.0.0.1", "::1", host.lower(), *self.others}
        self.is_in_network = host != "localhost" and not (is_address(host) and ipaddress.ip_address(host).is_loopback)
        if self.is_in_network:
            self.names.add(socket.gethostname().lower())

    def add(self, url: str) -> None:
        self.names.add(urlsplit(url).hostname)

    def __contains__(self, netloc: str) -> bool:
        """Whether `netloc`, a host with or without a port, is one of them."""
        try:
            parts = urlsplit(f"//{netloc}")
            name = parts.hostname if parts.netloc == netloc and "@" not in netloc else None
        except ValueError:
            return False
        return name in self.names or (self.is_in_network and name is not None and is_address(name))


def bare_name(text: str) -> str:
    """The host name in `text`, a name, name:port, or URL. Raises ValueError where there is none."""
    try:
        name = text.lower() if is_address(text) else urlsplit(text if "://" in text else f"//{text}").hostname
    except ValueError:
        name = None
    if not name or not (is_address(name) or re.fullmatch(r"[\w.-]+", name)):
        raise ValueError(f"--allowed_hosts: {text!r} is no host name; give one such as chat.example.org")
    return name


def is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class OwnPageOnly:
    """Answers requests that come under one of the server's `names` (a ServerNames), and not from another page."""

    def __init__(self, app, names: ServerNames):
        self.app, self.names = app, names

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers, is_reading = Headers(scope=scope), scope.get("method") in READING
            refusal = None
            if headers.get("host", "") not in self.names:
                refusal = "this server has another name; --allowed_hosts adds one"
            elif is_foreign(headers, self.names.others, is_reading=is_reading):
                refusal = "asked for by another page"
            if refusal:
                return await PlainTextResponse(refusal, 403)(scope, receive, send)
        await self.app(scope, receive, send)


def is_foreign(headers: Headers, proxies: Iterable[str], *, is_reading: bool) -> bool:
    """Whether another page sent a request with these headers; a link to this page on it is not meant.

    proxies: names of the page elsewhere. A proxy may leave the port out of the host, or put the server's own there.
    """
    source = headers.get("origin") or (None if is_reading else headers.get("referer"))
    try:
        page = None if source is None else urlsplit(source)
        if page and page.netloc.lower() != headers["host"].lower() and page.hostname not in proxies:
            return True
    except ValueError:
        return True
    is_link = is_reading and headers.get("sec-fetch-dest") == "document"
    return headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not is_link


class UploadLimit:
    """Takes no more than `max_bytes` of uploads at once, those in `folder` and those under way, nor half a one.

    Other requests are limited to `max_request_bytes`. What is too much is refused as gradio refuses a file that is too
    large, which removes what was written of it.
    """

    def __init__(self, app, folder: Path, max_bytes: int, max_request_bytes: int):
        self.app, self.folder = app, folder
        self.max_bytes, self.max_request_bytes = max_bytes, max_request_bytes
        self.num_arriving = self.num_stored = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["method"] in READING:
            return await self.app(scope, receive, send)
        is_upload = Headers(scope=scope).get("content-type", "").lower().startswith("multipart/")
        # gradio's other ends for files keep them elsewhere; the page needs none of these.
        if is_upload and not scope["path"].endswith("/upload"):
            return await PlainTextResponse("no uploads here", 404)(scope, receive, send)
        num_bytes, is_whole = 0, False

        async def receive_within_limit():
            nonlocal num_bytes, is_whole
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                num_bytes, is_whole = num_bytes + size, not message.get("more_body")
                if is_upload:
                    self.num_arriving += size
                    if self.num_stored + self.num_arriving > self.max_bytes:
                        raise MultiPartException(f"Uploads exceed the maximum allowed size of {self.max_bytes} bytes.")
                elif num_bytes > self.max_request_bytes:
                    raise MultiPartException("The request is too long.")
            elif not is_whole:
                raise MultiPartException("The upload was cut off.")
            return message

        self.num_stored = stored_bytes(self.folder) if is_upload else self.num_stored
        try:
            await self.app(scope, receive_within_limit, send)
        finally:
            if is_upload:
                self.num_arriving -= num_bytes
                self.num_stored = stored_bytes(self.folder)


def stored_bytes(folder: Path) -> int:
    """Bytes that the files below `folder` take."""
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(max(path.lstat().st_size, BLOCK_BYTES))
        # Removed meanwhile.
        except FileNotFoundError:
            continue
    return sum(sizes)
