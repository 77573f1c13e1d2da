"""Prompt templates: the one place that turns a conversation into token ids, for training and inference.

A prompt and the answer to it are always encoded apart, so the ids that a model sees before its first answer token are
the same ids in a training row and at inference, whatever the answer is.
"""

import inspect
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from longqlora.reading import cause_of, reading, time_limit
from longqlora.settings.config import DEFAULT_PROMPT_TEMPLATE, IGNORE_INDEX, PROMPT_TEMPLATES

# Which roles may follow each; a conversation starts as behind a system message.
FOLLOWERS = {"system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
ROLES = tuple(FOLLOWERS)
# Of a message, beside "role" and "content".
TOOL_KEYS = ("tool_calls", "tool_call_id")
CHAT_TEMPLATE = "chat_template"
# Characters of a document that a tokenizer gets at once: it takes more than 100 bytes for each. A document is parted
# where no tokenizer joins what is before and behind: at the start of a line, and between two words.
MAX_PIECE, MAX_BATCH = 2**20, 256
PART = re.compile(r"(?<=\n)(?=\S)|(?<=[^\W\d_])(?=[ 。，、！？；][^\W\d_])")
# A template writes words around messages, tools twice at most; those of models take milliseconds. Seconds are those of
# up to a million characters, which are tokenised as well.
MAX_TEMPLATE_SECONDS, MAX_TEMPLATE_GROWTH, MIN_TEMPLATE_LIMIT = 10, 16, 2**17
DEFAULT_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class TurnTemplate(NamedTuple):
    """A template of plain text. question: up to the answer, `{system}` empty behind the first; answer: up to its EOS.

    system: what becomes of a system message. An answer that starts with a space is encoded as it follows the question.
    """

    question: str
    system: str
    answer: str = "{}"
    default_system: str = DEFAULT_SYSTEM
    repeats_bos: bool = False


# `vicuna_v1.1` is the form LongQLoRA's released models were trained with (yangjianxin1/LongQLoRA
# component/data/dataset.py): turns on lines of their own, the prompt ends in "ASSISTANT: ", and the answer is encoded
# by itself. `vicuna_v1.1_fastchat` is the form of lmsys/vicuna-*-v1.5 (fastchat/conversation.py, sep=" ",
# sep2="</s>"): one line, the prompt ends in "ASSISTANT:", and the space belongs to the answer's first token.
# `llama2` is that of Llama-2-chat (meta-llama/llama, llama/generation.py) and LongAlpaca's models: a BOS in each turn.
TURN_TEMPLATES = {
    "vicuna_v1.1": TurnTemplate("{system}USER: {user}\nASSISTANT: ", "{}\n"),
    "vicuna_v1.1_fastchat": TurnTemplate("{system}USER: {user} ASSISTANT:", "{} ", " {}"),
    "llama2": TurnTemplate(
        "[INST] {system}{user} [/INST]", "<<SYS>>\n{}\n<</SYS>>\n\n", " {} ", default_system="", repeats_bos=True
    ),
}
assert PROMPT_TEMPLATES == (*TURN_TEMPLATES, CHAT_TEMPLATE), "name each template in settings/config.py"


def prompt_template_for(tokenizer: Any, requested: str | None) -> str:
    """The template to use: `requested`, else the tokenizer's own where it has one, else `vicuna_v1.1`.

    Raises ValueError for an unknown name and for "chat_template" with a tokenizer that has none.
    """
    has_chat_template = bool(getattr(tokenizer, "chat_template", None))
    if requested is None:
        return CHAT_TEMPLATE if has_chat_template else DEFAULT_PROMPT_TEMPLATE
    if requested not in PROMPT_TEMPLATES:
        raise ValueError(f"prompt_template: unknown template {requested!r}; use one of {', '.join(PROMPT_TEMPLATES)}")
    if requested == CHAT_TEMPLATE and not has_chat_template:
        raise ValueError(f"prompt_template: the tokenizer has no chat template; use {DEFAULT_PROMPT_TEMPLATE!r}")
    return requested


def encode_text(tokenizer: Any, text: str | list[str]) -> list:
    """Ids of `text` alone, or of each of a list: nothing added, and text that spells a special token stays text."""
    if not tokenizer.is_fast:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    # Without the places of tokens in the text, which transformers asks for: half the time of a short text.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    texts = [text] if isinstance(text, str) else text
    ids = [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return ids[0] if isinstance(text, str) else ids


def encode_document(tokenizer: Any, text: str, *, piece_size: int = MAX_PIECE) -> np.ndarray:
    """`encode_text` of a text of any length, in pieces of about `piece_size` characters: int32 [num_tokens].

    The ids are those of the whole. Only what has no line or word to part it at for as long again is parted there.
    """
    ids, start = [np.empty(0, dtype=np.int32)], 0
    while start < len(text):
        nearest, farthest = start + max(1, piece_size), start + 2 * piece_size + 1000
        match = PART.search(text, nearest, farthest)
        end = match.start() if match else min(farthest, len(text))
        piece = text[start:end]
        found = encode_after(tokenizer, text[start - 1], piece) if start else encode_text(tokenizer, piece)
        # A list takes ten times as much.
        ids.append(np.array(found, dtype=np.int32))
        start = end
    return np.concatenate(ids)


def encode_texts(tokenizer: Any, texts: Iterable[str]) -> Iterator[Sequence[int]]:
    """`encode_document` of each text. A fast tokenizer gets many at a time, which it spreads over the cores."""
    batch: list[str] = []
    for text in itertools.chain(texts, [None]):
        if batch and (text is None or sum(map(len, batch)) + len(text) > MAX_PIECE or len(batch) == MAX_BATCH):
            is_one = len(batch) == 1
            yield from [encode_document(tokenizer, batch[0])] if is_one else encode_text(tokenizer, batch)
            batch = []
        batch.append(text)


def encode_after(tokenizer: Any, before: str, text: str) -> list[int]:
    """Ids of `text` as they follow `before`: without the space that SentencePiece puts before a first word."""
    first, both = encode_text(tokenizer, before), encode_text(tokenizer, before + text)
    return both[len(first) :] if first and both[: len(first)] == first else encode_text(tokenizer, text)


def bos_ids(tokenizer: Any) -> list[int]:
    """What a document starts with: [BOS], or [] for a tokenizer whose models are pretrained without.

    The tokenizer's own switch is not asked: a bare Llama `tokenizer.model` adds no BOS although every Llama was
    trained with it. A BOS that is also the EOS (GPT-NeoX) only separates documents.
    """
    bos = tokenizer.bos_token_id
    return [] if bos is None or bos == tokenizer.eos_token_id else [bos]


def eos_id(tokenizer: Any) -> int:
    """The id that ends a document or an answer. Raises ValueError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(
            f"the tokenizer of {name!r} has no EOS token, so no model could learn to stop; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def checked_text(value: Any, name: str) -> str:
    """`value` if it is text that can be encoded. Raises ValueError otherwise."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is of type {type(value).__name__}; give a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"\\u{ord(value[error.start]):04x}"
        raise ValueError(f"{name} has half of a surrogate pair ({code}); write the whole character") from None
    return value


def check_messages(messages: Any, *, last_role: str) -> None:
    """Raise ValueError unless `messages` is [system,] user, assistant, user, ... `last_role` with text contents.

    Results of tools may stand between two messages of the assistant.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError('the conversation is empty; give a list of {"role": ..., "content": ...}')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'message {number} has no "role" and "content" (found {message!r:.60}); give both')
        if message["role"] not in ROLES:
            raise ValueError(f"message {number} has the unknown role {message['role']!r}; use {', '.join(ROLES)}")
        checked_text(message["content"], f"the content of message {number}")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or not all(role in FOLLOWERS[last] for last, role in zip(["system", *turns], turns, strict=False)):
        raise ValueError(f"the roles are {', '.join(roles)}; give user and assistant in turn, after at most one system")
    if roles[-1] != last_role:
        fix = "add the answer or remove the last message" if last_role == "assistant" else "remove the last message"
        raise ValueError(f"the conversation ends with {roles[-1]!r}, not {last_role!r}; {fix}")


def encode_conversation(tokenizer: Any, messages: list[dict], *, template: str = DEFAULT_PROMPT_TEMPLATE) -> list[int]:
    """Ids of a conversation up to where the assistant's answer starts, behind BOS where the tokenizer has one.

    messages: [{"role": "system" | "user" | "assistant", "content": str}, ...], the last of them the user's.
    Raises ValueError for messages or a template that do not fit.
    """
    check_messages(messages, last_role="user")
    if prompt_template_for(tokenizer, template) == CHAT_TEMPLATE:
        return apply_chat_template(tokenizer, messages, add_generation_prompt=True)
    return encode_turns(tokenizer, messages, TURN_TEMPLATES[template])[0]


def encode_for_training(
    tokenizer: Any, messages: list[dict], *, template: str | None = DEFAULT_PROMPT_TEMPLATE, tools: list | None = None
) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation and its labels: the answers and the EOS after each, -100 elsewhere.

    template: None as in `prompt_template_for`; tools: functions that the model may call. Labels are not shifted (the
    model shifts them). Raises ValueError for messages or a template that do not fit.
    """
    check_messages(messages, last_role="assistant")
    template = prompt_template_for(tokenizer, template)
    if template == CHAT_TEMPLATE:
        return encode_chat_template_for_training(tokenizer, messages, tools)
    if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        fix = f"use prompt_template: {CHAT_TEMPLATE} with a tokenizer whose template has them, or leave such rows out"
        raise ValueError(f"tools, and messages from and to them, have no form in {template}; {fix}")
    return encode_turns(tokenizer, messages, TURN_TEMPLATES[template])


def encode_turns(tokenizer: Any, messages: list[dict], template: TurnTemplate) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation in a template of plain text, up to its last answer or where the next starts."""
    bos, eos = bos_ids(tokenizer), eos_id(tokenizer)
    ids, labels = [], []
    system = messages[0]["content"].strip() if messages[0]["role"] == "system" else template.default_system
    opening = template.system.format(system) if system else ""
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "user":
            text = template.question.format(system=opening, user=content)
            prompt = [*(bos if template.repeats_bos or not ids else []), *encode_text(tokenizer, text)]
            ids, labels, opening = ids + prompt, labels + [IGNORE_INDEX] * len(prompt), ""
        elif message["role"] == "assistant":
            text = template.answer.format(content)
            # After the prompt's last character, so that " Yes" is the one token a model writes after "ASSISTANT:".
            is_apart = not text.startswith(" ")
            answer = encode_text(tokenizer, text) if is_apart else encode_after(tokenizer, template.question[-1], text)
            ids, labels = [*ids, *answer, eos], [*labels, *answer, eos]
    return ids, labels


def apply_chat_template(
    tokenizer: Any, messages: list[dict], tools: list | None = None, *, add_generation_prompt: bool
) -> list[int]:
    """Ids of the tokenizer's own chat template, with a BOS in front where the template writes none."""
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt, "return_dict": False}
    # Newer transformers can keep text that spells a control token as text.
    if "sanitize_control_tokens" in inspect.signature(tokenizer.apply_chat_template).parameters:
        options["sanitize_control_tokens"] = True
    ids = rendered(tokenizer, messages, **options)
    bos = bos_ids(tokenizer)
    return ids if ids[: len(bos)] == bos else bos + ids


def rendered(tokenizer: Any, messages: list[dict], **options: Any) -> Any:
    """`tokenizer.apply_chat_template`. A template is a program that came with the model: what it raises, and one that
    does not end or writes without end, is a ValueError."""
    name = "the tokenizer's chat template"
    try:
        num_given = len(json.dumps([messages, options.get("tools")], default=str))
        seconds = MAX_TEMPLATE_SECONDS * (1 + num_given // 10**6)
        with time_limit(seconds, f"it takes longer than {seconds} s"):
            made = tokenizer.apply_chat_template(messages, **options)
    except Exception as error:
        fix = "correct chat_template in the tokenizer's folder, the conversation, or give another prompt_template"
        raise ValueError(f"{name} refuses this conversation ({cause_of(error)}); {fix}") from error
    if len(made) > MAX_TEMPLATE_GROWTH * num_given + MIN_TEMPLATE_LIMIT:
        raise ValueError(f"{name} makes {len(made):,} tokens or characters of {num_given:,} characters; correct it")
    return made


def encode_chat_template_for_training(
    tokenizer: Any, messages: list[dict], tools: list | None = None
) -> tuple[list[int], list[int]]:
    """Ids and labels of the tokenizer's own chat template.

    The answers are what the template marks with `{% generation %}`; without that mark, what an assistant message adds
    to the prompt before it. Raises ValueError where the two cannot be told apart, and for what the template leaves out.
    """
    ids = apply_chat_template(tokenizer, messages, tools, add_generation_prompt=False)
    check_rendered(tokenizer, messages, tools)
    mask = generation_mask(tokenizer, messages, tools, ids)
    if mask is None:
        mask = [False] * len(ids)
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = answer_span(tokenizer, messages, tools, position, ids)
                mask[start:end] = [True] * (end - start)
    return ids, [token if wanted else IGNORE_INDEX for token, wanted in zip(ids, mask, strict=True)]


def check_rendered(tokenizer: Any, messages: list[dict], tools: list | None) -> None:
    """Raise ValueError for system messages, tools, calls and results that the chat template leaves out, as many do."""
    parts = [(f"{x['role']} messages", x["content"]) for x in messages if x["role"] in ("system", "tool")]
    parts += [("calls of tools", call["function"]["name"]) for x in messages for call in x.get("tool_calls", ())]
    if not parts and not tools:
        return
    render = partial(rendered, tokenizer, messages, tokenize=False)
    text = render(tools=tools)
    # As it stands, or as JSON.
    as_json = partial(json.dumps, ensure_ascii=False)
    missing = [what for what, part in parts if part.strip() not in text and as_json(part)[1:-1] not in text]
    missing += ["the list of tools"] if tools and text == render() else []
    if missing:
        fix = "leave such rows out, or give a model whose template has them"
        raise ValueError(f"the tokenizer's chat template leaves out {missing[0]}; {fix}")


def generation_mask(tokenizer: Any, messages: list[dict], tools: list | None, ids: list[int]) -> list[bool] | None:
    """Which of `ids` the template marks as the assistant's; None where it marks nothing or other ids."""
    with reading("prompt_template", CHAT_TEMPLATE, "give another prompt_template"):
        template = tokenizer.get_chat_template(tools=tools)
    if not tokenizer.is_fast or not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return None
    marked = rendered(tokenizer, messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    num_added = len(ids) - len(marked["input_ids"])
    if [*bos_ids(tokenizer)[:num_added], *marked["input_ids"]] != ids:
        return None
    return [False] * num_added + [bool(mark) for mark in marked["assistant_masks"]]


def answer_span(
    tokenizer: Any, messages: list[dict], tools: list | None, position: int, ids: list[int]
) -> tuple[int, int]:
    """Start and end in `ids` of the assistant message at `position`: what follows its prompt, up to its EOS."""
    prompt = apply_chat_template(tokenizer, messages[:position], tools, add_generation_prompt=True)
    upto = apply_chat_template(tokenizer, messages[: position + 1], tools, add_generation_prompt=False)
    start, eos = len(prompt), tokenizer.eos_token_id
    if ids[:start] != prompt:
        problem = f"writes the prompt of message {position + 1} differently when its answer follows"
    elif ids[: len(upto)] == upto:
        answer = ids[start : len(upto)]
        # Templates write a line break between the EOS and the next turn; it is not part of the answer.
        return start, start + len(answer) - (answer[::-1].index(eos) if eos in answer else 0)
    elif eos in ids[start:]:
        # Some templates write the last answer unlike the others (Qwen3 drops earlier thoughts): it ends at its EOS.
        return start, start + ids[start:].index(eos) + 1
    else:
        problem = f"does not end message {position + 1} with the EOS token"
    raise ValueError(
        f"the tokenizer's chat template {problem}, so prompt and answer cannot be told apart; mark the answer with "
        f"{{% generation %}} in the template, or use prompt_template {DEFAULT_PROMPT_TEMPLATE!r}"
    )
