"""Chat with a model in the browser, over documents too.

    python script/inference/web.py --adapter_name_or_path output/run/checkpoint-1000
    python script/inference/web.py --model_name_or_path output/merged --port 0 --max_new_tokens 512

Prints the page's address when it is ready; Ctrl-C ends it. Documents go with a message (PDF, EPUB, HTML,
Markdown, text); answers can be stopped, asked for again and taken back, and a meter shows how much of the
context is used. Every tab has a conversation of its own, and the model answers one at a time. Nothing is
stored: uploads are removed after ten minutes. Needs requirements-extras.txt.

The page is for this machine alone unless --host or --share says otherwise, and it asks for no password:
on a server, better forward the port (ssh -L 7860:127.0.0.1:7860 SERVER). It answers only under its own names
(--allowed_hosts adds others), and other websites can neither read it nor send it anything.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import tempfile
import threading

from longqlora.cli import require_extra, run_main
from longqlora.inference.arguments import load_from_arguments, parse_generation, source_from_arguments
from longqlora.settings.config import DEFAULT_PROMPT_TEMPLATE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets the network in (default: %(default)s)")
    group.add_argument("--port", type=int, default=7860, help="port, 0 for a free one (default: %(default)s)")
    group.add_argument("--share", action="store_true", help="a public address through gradio's servers (default: no)")
    group.add_argument("--allowed_hosts", nargs="+", default=[], metavar="NAME", help="further names of this server, "
                       "as behind a proxy (default: its own alone)")  # fmt: skip
    group.add_argument("--max_upload_mb", type=int, default=50, help="largest file, in MiB (default: %(default)s)")
    group.add_argument("--max_total_upload_mb", type=int, default=500, help="most that is kept of files until they are "
                       "read, in MiB (default: %(default)s)")  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before the model is looked for; chooses the port where --port is 0."""
    if not 1 <= args.max_upload_mb <= args.max_total_upload_mb:
        raise ValueError(f"--max_upload_mb: must be from 1 to the {args.max_total_upload_mb} MiB of "
                         f"--max_total_upload_mb, got {args.max_upload_mb}")  # fmt: skip
    for name in args.allowed_hosts:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"--allowed_hosts: {name!r} is no host name; give one such as chat.example.org")
    args.host = args.host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        with socket.create_server((args.host, args.port), family=family) as probe:
            args.port = probe.getsockname()[1]
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        where = f"--host {args.host} --port {args.port}"
        raise ValueError(f"{where}: cannot listen there: {reason}; choose another, port 0 for a free one") from None


def main() -> None:
    args, options = parse_generation(__doc__, add_arguments, template=DEFAULT_PROMPT_TEMPLATE)
    require_extra("gradio", "gradio", extra="web")
    check_arguments(args)
    with tempfile.TemporaryDirectory(prefix="longqlora-web-", ignore_cleanup_errors=True) as upload_folder:
        # gradio reads these when it is imported; it asks its own server whether it is up, which no proxy must answer.
        hosts = ",".join(filter(None, [os.environ.get("NO_PROXY"), "localhost", "127.0.0.1", args.host]))
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=upload_folder, NO_PROXY=hosts)
        os.environ["no_proxy"] = hosts
        from longqlora.inference.chat.web import build_page, serve

        loaded = load_from_arguments(args, source_from_arguments(args))
        template = loaded.template(args.prompt_template, default=DEFAULT_PROMPT_TEMPLATE)
        page = build_page(loaded, template=template, options=options, system=args.system)
        print(f"chat page at {serve(page, args)} (Ctrl-C ends it)", flush=True)
        # SIGTERM ends it as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        # Open tabs are not waited for; an answer ends with its token.
        page.is_running = False


if __name__ == "__main__":
    run_main(main)
