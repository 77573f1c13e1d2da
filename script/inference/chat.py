"""Chat with a model in the terminal, or through a pipe: one line is one message.

    python script/inference/chat.py --adapter_name_or_path output/run/checkpoint-1000
    printf 'Hello\\n/save chat.json\\n' | python script/inference/chat.py --model_name_or_path output/merged
    python script/inference/chat.py --model_name_or_path output/merged --streaming

Answers are streamed. The whole conversation is sent each time, in the template the model was tuned
with; when the context is full the oldest turns are left out, which is said. Answers go to stdout,
everything else to stderr. Ctrl-C ends an answer; at the prompt, twice, the chat.

With --streaming the model reads every token once, and memory does not grow however long conversation and
files are (StreamingLLM, arXiv 2309.17453): it keeps the first tokens and the latest ones and forgets what
lies between. That is no longer context, but a chat that never has to leave turns out. Commands:

    /file PATH   read a document (pdf, epub, html, md, txt) into the conversation
    /clear       forget the conversation and its files
    /save PATH   write the conversation as JSON
    /help        list the commands
    /exit        leave (so does Ctrl-D)
"""

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial

from longqlora.cli import one_line, run_main
from longqlora.data.documents import FORMAT_LIST, read_document
from longqlora.data.prompt import encode_conversation
from longqlora.inference.arguments import (
    add_conversation_arguments,
    add_generation_arguments,
    add_model_arguments,
    check_model_arguments,
    conversation_template,
    generation_options,
    load_from_arguments,
)
from longqlora.inference.chat.session import ChatSession
from longqlora.inference.generation import GenerationOptions, generate_text
from longqlora.model.context_request import context_request


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_conversation_arguments(parser)
    parser.add_argument("--file", metavar="PATH", action="append", default=[], help="document to begin with, as /file "
                        f"reads it ({FORMAT_LIST}); may be given several times")  # fmt: skip
    add_generation_arguments(parser)
    group = parser.add_argument_group("streaming")
    group.add_argument("--streaming", action="store_true", help="endless chat in constant memory: keep the first and "
                       "the latest tokens only (default: no)")  # fmt: skip
    group.add_argument("--streaming_window", type=int, metavar="N", help="tokens to keep, with --num_sinks among them; "
                       "the rest of the context, at most 1024 tokens, is the block in which long inputs are read "
                       "(default: 7/8 of the context, from 8192 tokens on all but 1024)")  # fmt: skip
    group.add_argument("--num_sinks", type=int, metavar="N", help="first tokens to keep for good (default: 4)")
    return parser.parse_args()


def check_streaming_arguments(args: argparse.Namespace) -> None:
    """Refuse what the streaming flags cannot mean, by the config of the model and before its weights are read."""
    if not args.streaming:
        for name in ("streaming_window", "num_sinks"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name}: has an effect with --streaming only; add that, or leave it out")
        return
    from longqlora.inference.sink_cache import DEFAULT_NUM_SINKS, check_streaming
    from longqlora.model.context import resolve_config

    args.num_sinks = DEFAULT_NUM_SINKS if args.num_sinks is None else args.num_sinks
    _, config = resolve_config(
        args.model_name_or_path,
        args.adapter_name_or_path,
        context_request(args),
        trust_remote_code=args.trust_remote_code,
    )
    args.streaming_window = check_streaming(config, args.streaming_window, args.num_sinks)


class AnswerInterrupt:
    """While entered, Ctrl-C sets `event`, which ends the answer after the current token; a second one raises
    KeyboardInterrupt, which ends it within a long prompt too."""

    def __enter__(self) -> "AnswerInterrupt":
        self.event = threading.Event()
        self.previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exception) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def _interrupt(self, signum, frame) -> None:
        if self.event.is_set():
            raise KeyboardInterrupt
        self.event.set()


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    print(text, end="", flush=True)


def read_lines(is_terminal: bool):
    """Yield the user's lines until the end of input, or until a second Ctrl-C in a row at the prompt."""
    num_interrupts = 0
    while num_interrupts < 2:
        try:
            line = input("> ") if is_terminal else sys.stdin.readline()
        except EOFError:
            break
        except KeyboardInterrupt:
            num_interrupts += 1
            note("\n(Ctrl-C again, or /exit, to leave)" if num_interrupts == 1 else "")
            continue
        if not is_terminal and not line:
            break
        num_interrupts = 0
        yield line.rstrip("\r\n")


def reply_in_context(
    session: ChatSession,
    loaded,
    template: str,
    options: GenerationOptions,
    question: str,
    on_text: Callable[[str], None],
    stop_event: threading.Event,
) -> bool:
    """Send the whole conversation, as far as it fits; what was answered before Ctrl-C is kept."""
    try:
        prompt = session.prompt(question)
        if prompt.notice:
            note(f"({prompt.notice})")
        ids = encode_conversation(loaded.tokenizer, prompt.messages, template=template, add_generation_prompt=True)
        fitted = GenerationOptions(**{**vars(options), "max_new_tokens": prompt.max_new_tokens})
        generate_text(loaded.model, loaded.tokenizer, ids, fitted, on_text=on_text, stop_event=stop_event)
    except KeyboardInterrupt:
        stop_event.set()
    return True


def answer(session: ChatSession, reply: Callable[..., bool], question: str) -> None:
    """Ask, stream the answer and add both to the history, unless `reply` took the question back."""
    pieces = []

    def on_text(text: str) -> None:
        # What stands between "ASSISTANT:" and the answer is the template's matter, not the reader's.
        text = text if pieces else text.lstrip()
        if text:
            pieces.append(text)
            show(text)

    with AnswerInterrupt() as interrupt:
        is_kept = reply(question, on_text, interrupt.event)
    show("\n")
    if interrupt.event.is_set():
        note("(interrupted)" if is_kept else "(interrupted, as if it had not been asked)")
    if is_kept and (pieces or not interrupt.event.is_set()):
        session.add_turn(question, "".join(pieces).strip())


def make_session(args: argparse.Namespace, loaded, options: GenerationOptions) -> tuple[ChatSession, Callable, str]:
    """The conversation, how to reply in it, and a line that describes it."""
    template = conversation_template(args, loaded)
    if args.streaming:
        from longqlora.inference.chat.streaming import StreamingSession
        from longqlora.inference.sink_cache import sink_cache

        cache = sink_cache(loaded.model, window=args.streaming_window, num_sinks=args.num_sinks)
        streaming = StreamingSession(
            loaded.model, loaded.tokenizer, cache, template=template, options=options, system=args.system
        )
        return streaming, streaming.reply, f"template {template}, streaming with a window of {cache.window} tokens"

    def count_tokens(messages: list[dict[str, str]]) -> int:
        ids = encode_conversation(loaded.tokenizer, messages, template=template, add_generation_prompt=True)
        return len(ids)

    session = ChatSession(
        count_tokens, context_size=loaded.context_size, max_new_tokens=options.max_new_tokens, system=args.system
    )
    reply = partial(reply_in_context, session, loaded, template, options)
    return session, reply, f"template {template}, context of {loaded.context_size} tokens"


def main() -> None:
    args = parse_arguments()
    check_model_arguments(args)
    options = generation_options(args)
    check_streaming_arguments(args)
    for path in args.file:
        read_document(path, flag="--file")
    loaded = load_from_arguments(args)
    session, reply, description = make_session(args, loaded, options)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    sys.stdout.reconfigure(errors="replace")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and history
        note(f"{description}; /help lists the commands")
    for path in args.file:
        note(f"read {path}: {session.add_document(path, flag='--file')} tokens")
    import torch

    for line in read_lines(is_terminal):
        if line.startswith("/"):
            result = session.run_command(line)
            if result.text:
                note(result.text)
            if result.is_exit:
                break
        elif line.strip():
            try:
                answer(session, reply, line.strip())
            except ValueError as error:
                note(f"error: {one_line(error)}")
            except KeyboardInterrupt:
                note("(interrupted)")
            except torch.OutOfMemoryError:
                note("error: out of GPU memory; /clear, a shorter file or --load_in_4bit help")


if __name__ == "__main__":
    run_main(main)
