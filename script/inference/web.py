"""Chat with a model in the browser, over documents too.

    python script/inference/web.py --adapter_name_or_path output/run/checkpoint-1000
    python script/inference/web.py --model_name_or_path output/merged --port 0 --max_new_tokens 512

Prints the page's address when it is ready; Ctrl-C ends it. The page streams the answers, reads text,
Markdown, HTML, PDF and EPUB files into the conversation and shows how much of the context is used.
Every tab has a conversation of its own, and the model answers one at a time. Nothing is stored: uploads
go when they are read. Needs requirements-extras.txt.

The page is for this machine alone unless --host or --share says otherwise, and it asks for no password:
on a server, better forward the port (ssh -L 7860:127.0.0.1:7860 SERVER). It answers only under its own names
(--allowed_hosts adds others), and other websites can neither read it nor send it anything.
"""

import argparse
import os
import signal
import tempfile
import threading

from longqlora.cli import require_extra, run_main
from longqlora.inference.arguments import (
    add_conversation_arguments,
    add_generation_arguments,
    add_model_arguments,
    check_model_arguments,
    conversation_template,
    generation_options,
    load_from_arguments,
)
from longqlora.inference.chat.web_chat import Conversations, SharedModel
from longqlora.inference.chat.web_page import STYLE, build_page, facts_line
from longqlora.inference.chat.web_server import available_port, serve, shut_down


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_conversation_arguments(parser)
    add_generation_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1",
                       help="address to listen at; 0.0.0.0 lets the network in (default: %(default)s)")  # fmt: skip
    group.add_argument("--port", type=int, default=7860, help="port to listen at, 0 for a free one (default: "
                       "%(default)s)")  # fmt: skip
    group.add_argument("--share", action="store_true",
                       help="also give the page a public address through gradio's servers (default: no)")  # fmt: skip
    group.add_argument("--allowed_hosts", nargs="+", default=[], metavar="NAME", help="further names of this server, "
                       "as behind a proxy (default: its own alone)")  # fmt: skip
    group.add_argument("--max_upload_mb", type=int, default=50,
                       help="largest file that is accepted, in MiB (default: %(default)s)")  # fmt: skip
    group.add_argument("--max_total_upload_mb", type=int, default=500, help="most that is kept of files until they are "
                       "read, in MiB (default: %(default)s)")  # fmt: skip
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    check_model_arguments(args)
    if args.max_upload_mb < 1:
        raise ValueError(f"--max_upload_mb: must be at least 1 MiB, got {args.max_upload_mb}")
    if args.max_total_upload_mb < args.max_upload_mb:
        raise ValueError(
            f"--max_total_upload_mb: {args.max_total_upload_mb} is less than --max_upload_mb {args.max_upload_mb}; "
            "raise it"
        )
    available_port(args.host, args.port)
    from longqlora.inference.chat.web_guard import ServerNames

    ServerNames(args.host, args.allowed_hosts)


def set_environment(args: argparse.Namespace, upload_folder: str) -> None:
    """What gradio reads from the environment, before it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = upload_folder
    # gradio asks its own server whether it is up, and would ask a proxy for it.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost", "127.0.0.1", args.host]))


def wait_for_signal() -> None:
    """Return at the first Ctrl-C or SIGTERM; a second one then ends the process as usual."""
    is_over = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: is_over.set()) for number in signals]
    is_over.wait()
    for number, handler in zip(signals, previous, strict=True):
        signal.signal(number, handler)


def main() -> None:
    args = parse_arguments()
    require_extra("gradio", "gradio")
    check_arguments(args)
    options = generation_options(args)
    loaded = load_from_arguments(args)
    from longqlora.inference.load import model_facts

    template = conversation_template(args, loaded)
    conversations = Conversations(SharedModel(loaded, template), options, args.system)
    with tempfile.TemporaryDirectory(prefix="longqlora-web-", ignore_cleanup_errors=True) as upload_folder:
        set_environment(args, upload_folder)
        page = build_page(conversations, facts_line(model_facts(loaded), template))
        port = available_port(args.host, args.port)
        limits = {name: getattr(args, name) for name in ("allowed_hosts", "max_upload_mb", "max_total_upload_mb")}
        url = serve(page, STYLE, host=args.host, port=port, share=args.share, **limits)
        print(f"chat page at {url} (Ctrl-C ends it)", flush=True)
        wait_for_signal()
        conversations.stop_all()
        shut_down(page)


if __name__ == "__main__":
    run_main(main)
