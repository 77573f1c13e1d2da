"""The web page of a chat: its layout and what its controls do.

gradio is imported where it is used, since it is an extra.
"""

import html
import re
from dataclasses import replace
from pathlib import Path

from longqlora.cli import one_line
from longqlora.inference.chat.web_chat import Conversation, Conversations
from longqlora.inference.generation import GenerationOptions

STYLE = """
.gradio-container {max-width: 1280px !important; margin: 0 auto}
#facts {color: var(--body-text-color-subdued); font-size: 13px; overflow-wrap: anywhere}
#status {min-height: 22px; font-size: 13px; color: var(--body-text-color-subdued); overflow-wrap: anywhere}
#status .error {color: #b91c1c}
.dark #status .error {color: #fca5a5}
#meter .track, #meter .fill {height: 8px; border-radius: 4px}
#meter .track {background: var(--border-color-primary); margin-top: 6px; overflow: hidden}
#meter .fill {background: var(--primary-500)}
.card {border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 14px !important; flex-grow: 0}
#chat .message {font-size: 14px; line-height: 1.5}
#chat .message-markdown-disabled .md {white-space: pre-wrap}
#chat button[aria-label="Clear"] {display: none}
#question textarea {min-height: 62px}
#documents ul {list-style: none; margin: 6px 0 0; padding: 0; font-size: 13px}
#documents li {display: flex; justify-content: space-between; gap: 12px; padding: 2px 0}
#documents .name {overflow-wrap: anywhere}
#documents .size, #documents .none {color: var(--body-text-color-subdued); font-size: 13px}
#documents .size {white-space: nowrap}
#documents .left-out {opacity: .55}
footer {display: none !important}
"""


# Seconds between two looks at a growing answer.
STREAM_INTERVAL = 0.2


def grouped(count: int) -> str:
    """A count with its thousands apart: 12 345."""
    return f"{count:,}".replace(",", "\u00a0")


def facts_line(facts: dict, template: str) -> str:
    """A line on the model, from `longqlora.inference.load.model_facts`."""
    rope = facts["rope_parameters"] or {}
    numbers = [f"{name} {value:g}" for name, value in rope.items() if isinstance(value, (int, float))]
    parts = [
        f"model {facts['base_model']}",
        f"adapter {facts['peft_model'] or 'none'}",
        f"context {grouped(facts['context_size'])} tokens",
        f"RoPE {rope.get('rope_type', 'default')} ({', '.join(numbers)})" if numbers else "RoPE as the model has it",
        f"attention: {facts['attention']}",
        f"{facts['dtype']}{' on NF4 weights' if facts['load_in_4bit'] else ''}, {facts['device']}",
        f"template {template}",
    ]
    return " \u00b7 ".join(parts)


def meter_html(num_tokens: int, context_size: int) -> str:
    share = min(100, round(100 * num_tokens / context_size))
    return (
        f"<div><b>Context</b>: {grouped(num_tokens)} of {grouped(context_size)} tokens</div>"
        f'<div class="track"><div class="fill" style="width: {share}%"></div></div>'
    )


def shown_messages(conversation: Conversation) -> list[dict[str, str]]:
    """Messages for the chatbot, which reads HTML, if harmless, also where it renders no Markdown."""
    messages = conversation.messages()
    if conversation.shows_markdown:
        return messages
    return [{**message, "content": as_html(message["content"])} for message in messages]


def as_html(text: str) -> str:
    """HTML that reads as `text`. Indentation is spelt out: gradio would take what the lines have in common."""
    escaped = html.escape(text, quote=False)
    return re.sub(r"^[ \t]", lambda match: f"&#{ord(match[0])};", escaped, flags=re.MULTILINE)


def documents_html(conversation: Conversation) -> str:
    """Names come from the user's disk: they are escaped."""
    rows = []
    for document in conversation.documents():
        kind, note = (" class='left-out'", ", left out") if document.is_left_out else ("", "")
        rows.append(
            f'<li{kind}><span class="name">{html.escape(document.name)}</span>'
            f'<span class="size">{grouped(document.num_tokens)} tokens{note}</span></li>'
        )
    none = '<div class="none">none yet; PDF, EPUB, HTML, Markdown or text</div>'
    return "<b>Documents</b>" + (f"<ul>{''.join(rows)}</ul>" if rows else none)


def status_html(conversation: Conversation) -> str:
    """What happened last; while an answer is written, what it waits for."""
    answer, is_error, text = conversation.answer, conversation.is_error, conversation.status
    if answer and answer.is_waiting and not answer.stop_event.is_set():
        text = "waiting for the model, which is answering someone else"
    return f'<span class="{"error" if is_error else "note"}" role="status">{html.escape(text)}</span>'


def page_options(defaults: GenerationOptions, max_new_tokens, temperature, top_p) -> GenerationOptions:
    """`defaults` with what the page's settings say; an emptied field is a ValueError."""
    values = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name}: is empty; give a number")
    return replace(defaults, **{**values, "max_new_tokens": int(max_new_tokens)}, do_sample=temperature > 0)


def build_page(conversations: Conversations, facts: str):
    """The page as gradio.Blocks. `facts`: a line of plain text on the model."""
    import gradio as gr

    defaults = conversations.options
    context_size = conversations.shared.loaded.context_size
    with gr.Blocks(title="LongQLoRA chat", analytics_enabled=False, delete_cache=(60, 600), fill_height=True) as page:
        gr.HTML(f"<h2>LongQLoRA chat</h2><div id='facts'>{html.escape(facts)}</div>", padding=False)
        with gr.Row(scale=1):
            with gr.Column(scale=7):
                chatbot = gr.Chatbot(
                    show_label=False, height="calc(100vh - 285px)", min_height=280, elem_id="chat", sanitize_html=True,
                    render_markdown=False, buttons=[], feedback_options=None,
                    placeholder="Add documents, then ask about them.",
                )  # fmt: skip
                with gr.Row():
                    question = gr.Textbox(
                        placeholder="Message (Enter sends, Shift+Enter breaks the line)", show_label=False, lines=1,
                        max_lines=8, scale=8, autofocus=True, elem_id="question",
                    )  # fmt: skip
                    with gr.Column(scale=1, min_width=90):
                        send = gr.Button("Send", variant="primary", elem_id="send", size="md")
                        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", size="md")
                status = gr.HTML(elem_id="status", padding=False)
            with gr.Column(scale=3, min_width=260):
                with gr.Column(scale=0, elem_classes="card"):
                    meter = gr.HTML(elem_id="meter", padding=False)
                    documents = gr.HTML(elem_id="documents", padding=False)
                    upload = gr.UploadButton("Add documents", file_count="multiple", size="md", elem_id="upload")
                with gr.Accordion("Settings", open=False):
                    max_new_tokens = gr.Number(
                        defaults.max_new_tokens, label="Longest answer, in tokens", precision=0, minimum=1
                    )
                    temperature = gr.Slider(
                        0, max(2, defaults.temperature), 0 if defaults.is_greedy else defaults.temperature, step=0.05,
                        label="Temperature",
                        info="0: always the likeliest token",
                    )  # fmt: skip
                    top_p = gr.Slider(0.01, 1, defaults.top_p, step=0.01, label="top_p", info="nucleus mass")
                    system = gr.Textbox(
                        conversations.system or "", label="System message", placeholder="that of the template", lines=2
                    )
                    markdown = gr.Checkbox(False, label="Show Markdown as formatted text")
                reset = gr.Button("Reset conversation", elem_id="reset", size="md")

        clock = gr.Timer(STREAM_INTERVAL, active=False)
        margin = [status, meter, documents]
        view = [*margin, chatbot, send, stop]

        def show_margin(conversation: Conversation) -> list:
            shown = meter_html(conversation.num_tokens(), context_size)
            return [status_html(conversation), shown, documents_html(conversation)]

        def show(conversation: Conversation) -> list:
            buttons = [gr.Button(interactive=True), gr.Button(interactive=False)]
            return [*show_margin(conversation), shown_messages(conversation), *buttons]

        def show_answering(conversation: Conversation) -> list:
            # Counting tokens again and again would slow a long answer down.
            shown = [status_html(conversation), gr.skip(), gr.skip(), shown_messages(conversation)]
            return [*shown, gr.Button(interactive=False), gr.Button(interactive=True)]

        def of(request: gr.Request) -> Conversation:
            return conversations.of(request.session_hash)

        def refresh(request: gr.Request) -> list:
            return show(of(request))

        def on_upload(paths: list[str] | None, request: gr.Request) -> list:
            conversation, errors = of(request), []
            for path in paths or []:
                conversation.add_document(path)
                # gradio lets nothing else than uploads through.
                Path(path).unlink(missing_ok=True)
                errors += [conversation.status] if conversation.is_error else []
            if errors:
                conversation.tell("; ".join(errors), is_error=True)
            # Not the rest: an answer may be streaming into it.
            return show_margin(conversation)

        def on_send(text, max_new_tokens, temperature, top_p, system, request: gr.Request) -> list:
            conversation = of(request)
            try:
                options = page_options(defaults, max_new_tokens, temperature, top_p)
                conversation.ask(text or "", options, (system or "").strip() or None)
            # The message stays in its box, to be mended.
            except ValueError as error:
                conversation.tell(one_line(error).removeprefix("--"), is_error=True)
                shown = show_answering(conversation) if conversation.answer else show(conversation)
                return [gr.skip(), gr.skip(), *shown]
            return ["", gr.Timer(active=True), *show_answering(conversation)]

        def on_tick(request: gr.Request) -> list:
            conversation = of(request)
            if conversation.answer:
                return [gr.skip(), *show_answering(conversation)]
            return [gr.Timer(active=False), *show(conversation)]

        def on_stop(request: gr.Request) -> None:
            # What comes of it is shown by the next tick: two events may overtake each other.
            of(request).stop()

        def on_reset(request: gr.Request) -> list:
            of(request).reset()
            return show(of(request))

        def on_markdown(is_shown: bool, request: gr.Request):
            conversation = of(request)
            conversation.shows_markdown = is_shown
            # Copy buttons hand out a message as it was given to the chatbot: not where it is escaped.
            buttons = ["copy", "copy_all"] if is_shown else []
            return gr.Chatbot(shown_messages(conversation), render_markdown=is_shown, buttons=buttons)

        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(refresh, None, view, queue=False, **quiet)
        page.unload(on_stop)
        # Any number of tabs may ask: who writes is decided by the model's turn, where a waiting tab can be stopped.
        asked = {"inputs": [question, max_new_tokens, temperature, top_p, system], "outputs": [question, clock, *view]}
        gr.on([question.submit, send.click], on_send, **asked, queue=False, trigger_mode="once", **quiet)
        # The browser asks for what is new when it has shown the last: one that is slow misses steps, not the end.
        clock.tick(on_tick, None, [clock, *view], queue=False, trigger_mode="once", **quiet)
        stop.click(on_stop, None, None, queue=False, **quiet)
        reset.click(on_reset, None, view, queue=False, **quiet)
        upload.upload(on_upload, upload, margin, concurrency_limit=None, **quiet)
        markdown.change(on_markdown, markdown, chatbot, queue=False, **quiet)
    return page
