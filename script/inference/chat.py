"""Chat with a model in the terminal, or through a pipe: one line is one message.

    python script/inference/chat.py --adapter_name_or_path output/run/checkpoint-1000
    printf 'Hello\\n/save chat.json\\n' | python script/inference/chat.py --model_name_or_path output/merged
    python script/inference/chat.py --model_name_or_path output/merged --streaming

The whole conversation is sent each time, in the template the model was tuned with; when the context is
full the oldest turns are left out, which is said. Answers go to stdout, everything else to stderr.
Ctrl-C ends an answer; at the prompt, twice, the chat.

With --streaming memory does not grow however long conversation and files are (StreamingLLM, arXiv 2309.17453):
the model keeps the first tokens and the latest ones and forgets what lies between.
"""

import argparse
import contextlib
import signal
import sys
import threading
from functools import partial

from longqlora.cli import one_line, require_stdin, run_main
from longqlora.data.documents import FORMAT_LIST, read_document
from longqlora.inference.arguments import load_from_arguments, parse_generation, source_from_arguments
from longqlora.inference.chat.session import HELP, ChatSession
from longqlora.inference.generation import GenerationOptions
from longqlora.settings.config import DEFAULT_PROMPT_TEMPLATE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", metavar="PATH", action="append", default=[], help="document to begin with, as /file "
                        f"reads it ({FORMAT_LIST}); may be given several times")  # fmt: skip
    group = parser.add_argument_group("streaming")
    group.add_argument("--streaming", action="store_true", help="endless chat in constant memory (default: no)")
    group.add_argument("--streaming_window", type=int, metavar="N", help="tokens to keep, with --num_sinks among them; "
                       "the rest of the context, at most 1024 tokens, is the block in which long inputs are read "
                       "(default: 7/8 of the context, from 8192 tokens on all but 1024)")  # fmt: skip
    group.add_argument("--num_sinks", type=int, metavar="N", help="first tokens to keep for good (default: 4)")


@contextlib.contextmanager
def ctrl_c_event():
    """While entered, Ctrl-C sets the event that this yields, which ends the answer after the current token; a second
    one raises KeyboardInterrupt, which ends it within a long prompt too."""
    event = threading.Event()

    def interrupt(signum, frame) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read_lines():
    """Yield the user's lines until the end of input, or until a second Ctrl-C in a row at the prompt."""
    is_terminal, num_interrupts = sys.stdin.isatty(), 0
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and history
    while num_interrupts < 2:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            num_interrupts += 1
            note("\n(Ctrl-C again, or /exit, to leave)" if num_interrupts == 1 else "")
            continue
        num_interrupts = 0
        yield line.rstrip("\r")


def answer(session: ChatSession, question: str) -> None:
    """Ask and print the answer; an error is told, and the chat goes on."""
    import torch

    try:
        with ctrl_c_event() as stop_event:
            is_kept = session.ask(question, partial(print, end="", flush=True), stop_event)
        print(flush=True)
        if stop_event.is_set():
            note("(interrupted)" if is_kept else "(interrupted, as if it had not been asked)")
    except ValueError as error:
        note(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        note("(interrupted)")
    except torch.OutOfMemoryError:
        note("error: out of GPU memory; /clear, a shorter file or --load_in_4bit help")


def make_session(args: argparse.Namespace, options: GenerationOptions) -> ChatSession:
    """Load the model and say what it is; what flags and files cannot mean is refused before the weights are read."""
    for name in () if args.streaming else ("streaming_window", "num_sinks"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: has an effect with --streaming only; add that, or leave it out")
    for path in args.file:
        read_document(path, flag="--file")
    source = source_from_arguments(args)
    if args.streaming:
        from longqlora.inference.chat.streaming import StreamingSession
        from longqlora.inference.sink_cache import check_streaming, sink_cache

        check_streaming(source.config, args.streaming_window, args.num_sinks)
    loaded = load_from_arguments(args, source)
    template = loaded.template(args.prompt_template, default=DEFAULT_PROMPT_TEMPLATE)
    if args.streaming:
        cache = sink_cache(loaded.model, window=args.streaming_window, num_sinks=args.num_sinks)
        session = StreamingSession(loaded, template, options, args.system, cache=cache)
    else:
        session = ChatSession(loaded, template, options, args.system)
    if sys.stdin.isatty():
        note(session.greeting)
    for path in args.file:
        note(f"read {path}: {session.add_document(path, flag='--file')} tokens")
    return session


def main() -> None:
    epilog = f"commands:\n{HELP}"
    args, options = parse_generation(__doc__, add_arguments, template=DEFAULT_PROMPT_TEMPLATE, epilog=epilog)
    stdin = require_stdin()
    session = make_session(args, options)
    stdin.reconfigure(encoding="utf-8", errors="replace")
    sys.stdout.reconfigure(errors="replace")
    for line in read_lines():
        if line.startswith("/"):
            text = session.run_command(line)
            if text is None:
                break
            note(text)
        elif line.strip():
            answer(session, line.strip())


if __name__ == "__main__":
    run_main(main)
