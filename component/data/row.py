"""What a training row holds: a text, or a conversation in any of the forms that data sets are published in.

The form is told by the columns. A row is read whole or refused (`check_unread`).
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from longqlora.data.columns import check_unread, found_keys
from longqlora.data.prompt import TOOL_KEYS, check_messages, checked_text

# ShareGPT's "from" and OpenAI's newer "developer", by the role that they mean.
ROLES_OF = {
    **dict.fromkeys(("human", "user"), "user"), **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}  # fmt: skip
# What a turn is written with, and its name in the log.
PAIR, SHAREGPT, OPENAI = ("human", "assistant"), ("from", "value"), ("role", "content")


class Conversation(NamedTuple):
    """Messages that end with an answer; form: how the row was written; tools: functions that a model may call."""

    form: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


class SftForm(NamedTuple):
    """A form of an SFT row: keys that it needs, keys that it reads too (beside "system", "tools"), and its reader."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any]], Conversation]


def text_of_row(row: dict[str, Any]) -> str:
    """The text of a pretraining row {"text": ...}. Raises ValueError where it has none, or text elsewhere."""
    if "text" not in row:
        keys = found_keys(row)
        if is_sft_row(row):
            raise ValueError(f'no key "text" but those of an SFT file ({keys}); set sft: true or give pretraining rows')
        raise ValueError(f'no key "text" (found {keys}); give {{"text": ...}}')
    text = checked_text(row["text"], '"text"')
    check_unread(row, ("text",))
    return text


def conversation_of_row(row: dict[str, Any]) -> Conversation:
    """The conversation of an SFT row in any of `SFT_FORMS`. Raises ValueError where it has none."""
    form = sft_form(row)
    conversation = form.read(row)
    messages = conversation.messages
    system = checked_text(row["system"], '"system"') if row.get("system") is not None else ""
    if system.strip():
        if messages[0]["role"] == "system":
            raise ValueError(f'"system" beside a system message in "{form.needed[0]}"; keep one of them')
        messages = [{"role": "system", "content": system}, *messages]
    check_unread(row, (*form.needed, *form.optional, "system", "tools"))
    return Conversation(conversation.form, messages, tools_of(row.get("tools")))


def sft_form(row: dict[str, Any]) -> SftForm:
    """The first form whose keys the row has; files made of several forms hold null for the keys of the others."""
    for present in ({key for key, value in row.items() if value is not None}, row.keys()):
        for form in SFT_FORMS:
            if set(form.needed) <= present:
                return form
    if "text" in row and not is_sft_row(row):
        raise ValueError('a pretraining row (key "text") in an SFT file; set sft: false or give an SFT file')
    nearest = max(SFT_FORMS, key=lambda form: len(row.keys() & set(form.needed)))
    missing = next(key for key in nearest.needed if key not in row)
    raise ValueError(f'no key "{missing}" (found {found_keys(row)}); give {SFT_EXAMPLES}')


def of_instruction(row: dict[str, Any], *, form: str) -> Conversation:
    """Alpaca: the instruction and, where there is one, the input on the next line, after the turns of a history."""
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in history):
        raise ValueError('"history" is no list of [question, answer]; give the earlier turns so')
    parts = [checked_text(row[key], f'"{key}"') for key in ("instruction", "input") if row.get(key) is not None]
    question = "\n".join(part for part in parts if part.strip())
    answer = [(question, row["output"])]
    return Conversation(form, [*messages_of_pairs(history, '"history"'), *messages_of_pairs(answer, '"output"')])


def of_lists(row: dict[str, Any]) -> Conversation:
    """ChunkLlama's dialogues: the user's messages under "inputs", the answers under "outputs"."""
    inputs, outputs = row["inputs"], row["outputs"]
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError('"inputs" and "outputs" are no lists of equal length; give an output for each input')
    pairs = zip(inputs, outputs, strict=True)
    return Conversation("ChunkLlama (inputs/outputs)", messages_of_pairs(pairs, 'a text in "inputs" or "outputs"'))


def of_completion(row: dict[str, Any]) -> Conversation:
    """TRL's prompt and completion: a question and its answer, or the messages of both."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = [message for key in ("prompt", "completion") for message in of_turns(row, key=key).messages]
        check_messages(turns, last_role="assistant")
    else:
        turns = messages_of_pairs([(prompt, completion)], '"prompt" or "completion"')
    return Conversation("prompt/completion", turns)


def of_conversation(row: dict[str, Any], *, key: str) -> Conversation:
    """The turns under `key`: of roles and contents, ShareGPT's, or pairs of human and assistant."""
    conversation = of_turns(row, key=key)
    check_messages(conversation.messages, last_role="assistant")
    return conversation


def of_turns(row: dict[str, Any], *, key: str) -> Conversation:
    """The messages of the turns under `key`, whose order is not checked."""
    turns = row[key]
    if not isinstance(turns, list):
        raise ValueError(f'"{key}" is of type {type(turns).__name__}; give a list of messages')
    kinds = (PAIR, SHAREGPT)
    kind = next((k for k in kinds if turns and all(isinstance(t, dict) and set(k) <= t.keys() for t in turns)), OPENAI)
    messages = []
    for number, turn in enumerate(turns, start=1):
        if kind == PAIR:
            messages += messages_of_pairs([[turn[name] for name in PAIR]], f"a text of turn {number}")
        elif kind == SHAREGPT:
            messages.append(message_of_sharegpt(turn, number))
        else:
            messages.append(message_of_openai(turn, number))
        if kind != OPENAI or (isinstance(turn, dict) and set(OPENAI) <= messages[-1].keys()):
            read = (*OPENAI, *TOOL_KEYS, "name") if kind == OPENAI else kind
            check_unread(turn, read, where=f'turn {number} of "{key}": ')
    names = {PAIR: "turns", SHAREGPT: "ShareGPT", OPENAI: "messages"}
    return Conversation(f"{names[kind]} ({'/'.join(kind)})", messages)


def message_of_sharegpt(turn: dict[str, Any], number: int) -> dict[str, Any]:
    """The message of {"from": "human", "value": "..."}."""
    sender, value = turn["from"], checked_text(turn["value"], f'"value" of turn {number}')
    role = ROLES_OF.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise ValueError(f"turn {number} is from {sender!r:.40}; use one of {', '.join(ROLES_OF)}")
    if sender == "function_call":
        return {"role": role, "content": "", "tool_calls": calls_of(json_of(value, f'"value" of turn {number}'))}
    return {"role": role, "content": value}


def message_of_openai(turn: Any, number: int) -> Any:
    """The message of {"role": "user", "content": "..."}; what `check_messages` refuses is left to it."""
    if not isinstance(turn, dict) or "role" not in turn:
        return turn
    message = {key: turn[key] for key in (*OPENAI, *TOOL_KEYS) if turn.get(key) is not None}
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str):
        message["role"] = "system" if role == "developer" else role
    # Parts of text, as the newer API has them.
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [checked_text(part.get("text"), f"the content of message {number}") for part in content]
        message["content"] = "".join(texts)
    if "tool_calls" in message:
        message["tool_calls"] = calls_of(message["tool_calls"])
        message.setdefault("content", "")
        if not message["tool_calls"]:
            del message["tool_calls"]
    elif "content" in turn:
        message.setdefault("content", turn["content"])
    if role == "tool" and turn.get("name") is not None:
        message["name"] = checked_text(turn["name"], f"the name of message {number}")
    return message


def calls_of(calls: Any) -> list[dict[str, Any]]:
    """Calls of functions in the form that chat templates read, their arguments an object."""
    form = '"tool_calls" are no {"function": {"name": ..., "arguments": {...}}}; give a list of such'
    checked = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(form)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = json_of(arguments or "{}", '"arguments" of a call')
        named = {"id": call["id"]} if call.get("id") else {}
        checked.append({**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return checked


def tools_of(tools: Any) -> list[dict[str, Any]] | None:
    """The functions under "tools", a list or its JSON; None where there are none."""
    tools = json_of(tools, '"tools"') if isinstance(tools, str) and tools.strip() else tools or None
    if tools and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise ValueError('"tools" is no list of {"type": "function", "function": {...}}; give it so')
    return tools or None


def json_of(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({error}); correct it") from None


def messages_of_pairs(pairs: Iterable[Sequence[Any]], name: str) -> list[dict[str, str]]:
    """The messages of (question, answer) pairs; `name` is where they come from, for the ValueError."""
    turns = [turn for pair in pairs for turn in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": checked_text(text, name)} for role, text in turns]


def is_sft_row(row: dict[str, Any]) -> bool:
    return any(row.keys() & set(form.needed) for form in SFT_FORMS)


# The forms of an SFT row, in the order in which they are tried.
SFT_FORMS = (
    *(SftForm((key,), (), partial(of_conversation, key=key)) for key in ("conversation", "conversations", "messages")),
    SftForm(
        ("instruction", "output"), ("input", "history"), partial(of_instruction, form="Alpaca (instruction/output)")
    ),
    SftForm(("input", "output"), ("history",), partial(of_instruction, form="input/output")),
    SftForm(("inputs", "outputs"), (), of_lists),
    SftForm(("prompt", "completion"), (), of_completion),
)
SFT_EXAMPLES = (
    '{"instruction": ..., "input": ..., "output": ...}, {"input": ..., "output": ...}, '
    '{"prompt": ..., "completion": ...}, {"conversations": [{"from": ..., "value": ...}, ...]} or '
    '{"messages": [{"role": ..., "content": ...}, ...]}'
)
