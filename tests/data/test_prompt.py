"""Prompt templates: the text they write, the labels, BOS and EOS, and the same ids in training and inference."""

import itertools

import pytest
from transformers import ByT5Tokenizer

from longqlora.data import prompt
from longqlora.data.prompt import (
    DEFAULT_SYSTEM,
    TURN_TEMPLATES,
    encode_conversation,
    encode_document,
    encode_for_training,
    encode_text,
    encode_texts,
    prompt_template_for,
)
from longqlora.settings.config import IGNORE_INDEX, PROMPT_TEMPLATES

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>\n"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}<|{{ message.role }}|>\n{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TWO_TURNS = [user("the fox"), assistant("jumps over"), user("and the dog"), assistant("box quietly")]


@pytest.fixture(params=[*TURN_TEMPLATES, "unmarked", "marked"])
def tokenizer_and_template(request, tokenizer):
    """The tokenizer and template name of each way to encode a conversation."""
    if request.param in TURN_TEMPLATES:
        return tokenizer, request.param
    tokenizer.chat_template = CHATML if request.param == "unmarked" else MARKED
    return tokenizer, "chat_template"


def learned(tokenizer, labels):
    """The runs of labels that are learned, decoded."""
    runs = [[*run] for is_learned, run in itertools.groupby(labels, IGNORE_INDEX.__ne__) if is_learned]
    return [tokenizer.decode(run) for run in runs]


# Of each template: a first question, a later one, an answer, and a system message in front of the first question.
FORMS = {
    "vicuna_v1.1": ("{system}USER: {}\nASSISTANT: ", "{}</s>", "{}\n", DEFAULT_SYSTEM),
    "vicuna_v1.1_fastchat": ("{system}USER: {} ASSISTANT:", " {}</s>", "{} ", DEFAULT_SYSTEM),
    "llama2": ("[INST] {system}{} [/INST]", " {} </s>", "<<SYS>>\n{}\n<</SYS>>\n\n", None),
}


def form_of_answer(template):
    return FORMS[template][1] if template in FORMS else "{}</s>"


@pytest.mark.parametrize("template", FORMS)
def test_template_text(tokenizer, template):
    question, answer, system, default = FORMS[template]
    first = "<s>" + question.format("the fox", system=system.format(default) if default else "")
    assert tokenizer.decode(encode_conversation(tokenizer, TWO_TURNS[:1], template=template)) == first
    ids, _ = encode_for_training(tokenizer, TWO_TURNS, template=template)
    later = "<s>" * (template == "llama2") + question.format("and the dog", system="")
    assert tokenizer.decode(ids) == f"{first}{answer.format('jumps over')}{later}{answer.format('box quietly')}"
    for given, text in ((" Be lazy. ", system.format("Be lazy.")), ("", "")):
        messages = [{"role": "system", "content": given}, user("the fox")]
        ids = encode_conversation(tokenizer, messages, template=template)
        assert tokenizer.decode(ids) == "<s>" + question.format("the fox", system=text)


def test_answers_and_their_eos_are_learned(tokenizer_and_template):
    tokenizer, template = tokenizer_and_template
    ids, labels = encode_for_training(tokenizer, TWO_TURNS, template=template)
    form = form_of_answer(template)
    assert learned(tokenizer, labels) == [form.format("jumps over"), form.format("box quietly")]
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    tokenizer.pad_token = tokenizer.eos_token
    assert encode_for_training(tokenizer, TWO_TURNS, template=template) == (ids, labels)


@pytest.mark.parametrize("num_messages", [1, 3])
def test_training_starts_with_the_ids_of_inference(tokenizer_and_template, num_messages):
    tokenizer, template = tokenizer_and_template
    for answer in ("jumps", " jumps", "\njumps", "1", ".", "...", "é", "ASSISTANT: x"):
        messages = [*TWO_TURNS[:num_messages], assistant(answer)]
        prompt = encode_conversation(tokenizer, messages[:-1], template=template)
        ids, labels = encode_for_training(tokenizer, messages, template=template)
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] == ids[len(prompt)]
        assert labels[len(prompt) - 1] == IGNORE_INDEX


def test_one_bos_at_the_start(tokenizer_and_template):
    tokenizer, template = tokenizer_and_template
    ids, _ = encode_for_training(tokenizer, TWO_TURNS, template=template)
    bos = tokenizer.bos_token_id
    assert ids[0] == bos and ids.count(bos) == (2 if template == "llama2" else 1)
    if template == "chat_template":
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
        assert encode_for_training(tokenizer, TWO_TURNS, template=template)[0] == ids
    tokenizer.bos_token = None
    if template != "chat_template":
        expected = [token for token in ids if token != bos]
        assert encode_for_training(tokenizer, TWO_TURNS, template=template)[0] == expected


def test_text_that_spells_a_special_token_stays_text(tokenizer_and_template):
    tokenizer, template = tokenizer_and_template
    before = tokenizer("a </s>").input_ids
    assert tokenizer.eos_token_id not in encode_text(tokenizer, "a </s> b <s>")
    plain, _ = encode_for_training(tokenizer, [user("a b"), assistant("c")], template=template)
    ids, labels = encode_for_training(tokenizer, [user("a </s> b"), assistant("c </s><s> d")], template=template)
    assert ids.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert learned(tokenizer, labels) == [form_of_answer(template).format("c </s><s> d")]
    assert tokenizer("a </s>").input_ids == before, "the tokenizer is left as it was"


def test_a_tokenizer_written_in_python_keeps_it_as_text_too():
    tokenizer = ByT5Tokenizer()
    assert tokenizer.decode(encode_text(tokenizer, "a </s>")) == "a </s>" and not tokenizer.is_fast
    assert tokenizer.eos_token_id not in encode_text(tokenizer, "a </s>")


LINES = "def f(x):\n\n    return x\n\ttabs \n \nÜber\n(1)\n\n\nend\n" * 40


ONE_LINE = "Über uns, the fox 1 jumps  twice. 你好，我们 it's a_b\u3000end 7 days " * 40


@pytest.mark.parametrize("text", [LINES, ONE_LINE, "x" * 5000])
@pytest.mark.parametrize("piece_size", [0, 1, 7, 100, 10_000])
def test_a_long_document_has_the_ids_of_the_whole(tokenizer, monkeypatch, piece_size, text):
    whole, sizes = encode_text(tokenizer, text), []
    monkeypatch.setattr(prompt, "encode_text", lambda _, text: sizes.append(len(text)) or encode_text(tokenizer, text))
    ids = encode_document(tokenizer, text, piece_size=piece_size).tolist()
    # What is all one word is cut in it.
    assert ids == whole or (text[0] == "x" and tokenizer.decode(ids) == text)
    assert max(sizes) <= (2 * piece_size + 1001 if text[0] == "x" else piece_size + 40) or piece_size == 10_000


@pytest.mark.parametrize("limits", [(2**22, 256), (2**22, 3), (60, 256), (1, 1)])
def test_many_texts_at_a_time_have_the_ids_of_each(tokenizer, monkeypatch, limits):
    monkeypatch.setattr(prompt, "MAX_PIECE", limits[0])
    monkeypatch.setattr(prompt, "MAX_BATCH", limits[1])
    texts = ["the fox", "", "</s> a <s>", LINES, *map(str, range(9)), LINES]
    found = [list(ids) for ids in encode_texts(tokenizer, iter(texts))]
    assert found == [encode_text(tokenizer, text) for text in texts]
    assert list(encode_texts(tokenizer, [])) == []


# As Qwen3: only the last answer has its thoughts.
THOUGHTS = CHATML.replace("{{ message.content }}", "{% if message.role == 'assistant' and loop.last %}think{% endif %}"
                          "{{ message.content }}")  # fmt: skip
UNUSUAL = {
    "marks without EOS": (MARKED.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"),
                          ["jumps over", "box quietly"]),
    "last answer otherwise": (THOUGHTS, ["jumps over</s>", "thinkbox quietly</s>"]),
    "changing start": ("{{ messages | length }} {% for m in messages %}{{ m.content }}{% endfor %}",
                       "generation.*vicuna_v1.1"),
    "changing answers": ("{% for m in messages %}{{ m.content[:9 - loop.last] }}|{% endfor %}",
                         "with the EOS.*generation"),
    "refusal": ("{{ raise_exception('no system here') }}", "no system here"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_chat_templates_are_learned_from_or_refused(tokenizer, name):
    tokenizer.chat_template, expected = UNUSUAL[name]
    if isinstance(expected, list):
        _, labels = encode_for_training(tokenizer, TWO_TURNS, template="chat_template")
        assert learned(tokenizer, labels) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            encode_for_training(tokenizer, TWO_TURNS, template="chat_template")


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tell the weather."}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WITH_TOOLS = [
    {"role": "system", "content": "Be brief."}, user("Rain?"), {**assistant(""), "tool_calls": [CALL]},
    {"role": "tool", "content": 'wet, "very"'}, assistant("Yes"),
]  # fmt: skip
CALLING = CHATML.replace("{{ message.content }}", "{{ message.content }}{% for call in message.tool_calls or [] %}"
                         "{{ call.function | tojson }}{% endfor %}")  # fmt: skip
LISTING = "{% if tools %}{{ tools | tojson }}{% endif %}"


@pytest.mark.parametrize(("content", "is_json"), [("message.content", False), ("message.content | tojson", True)])
def test_calls_of_tools_are_learned_and_their_results_read(tokenizer, content, is_json):
    tokenizer.chat_template = LISTING + CALLING.replace("message.content", content)
    ids, labels = encode_for_training(tokenizer, WITH_TOOLS, template="chat_template", tools=TOOLS)
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert learned(tokenizer, labels) == [f'""{call}</s>', '"Yes"</s>'] if is_json else [f"{call}</s>", "Yes</s>"]
    text = tokenizer.decode(ids)
    assert "Tell the weather." in text and (r"wet, \"very\"" if is_json else 'wet, "very"') in text


LEAVES_OUT = "{% for m in messages if m.role != 'ROLE' %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "what"),
    [(LEAVES_OUT.replace("ROLE", "system"), "system messages"), (LEAVES_OUT.replace("ROLE", "tool"), "tool messages"),
     (CHATML, "calls of tools"), (CALLING, "the list of tools"), (None, "no form in vicuna_v1.1; use")],
)  # fmt: skip
def test_what_a_template_leaves_out_is_refused(tokenizer, template, what):
    tokenizer.chat_template = template
    messages = WITH_TOOLS[:2] + WITH_TOOLS[-1:] if what == "system messages" else WITH_TOOLS
    tools = TOOLS if what == "the list of tools" else None
    with pytest.raises(ValueError, match=what):
        encode_for_training(tokenizer, messages, template=None, tools=tools)


def test_prompt_template_for(tokenizer):
    assert prompt_template_for(tokenizer, None) == "vicuna_v1.1"
    with pytest.raises(ValueError, match="no chat template"):
        prompt_template_for(tokenizer, "chat_template")
    with pytest.raises(ValueError, match="unknown template 'alpaca'"):
        prompt_template_for(tokenizer, "alpaca")
    tokenizer.chat_template = CHATML
    assert prompt_template_for(tokenizer, None) == "chat_template"
    assert [prompt_template_for(tokenizer, name) for name in PROMPT_TEMPLATES] == [*PROMPT_TEMPLATES]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "empty"),
        ([user("a"), user("b")], "in turn"),
        ([assistant("a")], "in turn"),
        ([user("a"), {"role": "system", "content": "b"}], "in turn"),
        ([user("a"), {"role": "tool", "content": "b"}], "in turn"),
        ([{"role": "system", "content": "b"}], "in turn"),
        ([{"role": ["user"], "content": "b"}], "unknown role"),
        ([user("a"), "b"], "message 2 has no"),
        ([user(None)], "NoneType"),
        ([user([{"type": "text", "text": "a"}])], "list"),
        (TWO_TURNS, "ends with 'assistant'"),
    ],
)
def test_bad_messages(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        encode_conversation(tokenizer, messages)


@pytest.mark.realdata
def test_llama2_ids_are_those_of_the_whole_text(shared_data):
    """FastChat encodes the whole text at once, with Llama's own tokenizer."""
    from transformers import AutoTokenizer

    llama = AutoTokenizer.from_pretrained(shared_data / "llama2_tokenizer")
    text = f"{DEFAULT_SYSTEM} USER: Hi there ASSISTANT: Hello, you.</s>USER: Bye ASSISTANT: (waves) 7</s>"
    messages = [user("Hi there"), assistant("Hello, you."), user("Bye"), assistant("(waves) 7")]
    assert encode_for_training(llama, messages, template="vicuna_v1.1_fastchat")[0] == llama(text).input_ids
    messages = [{"role": "system", "content": "Be brief."}, *messages]
    turns = ("<<SYS>>\nBe brief.\n<</SYS>>\n\nHi there [/INST] Hello, you. ", "Bye [/INST] (waves) 7 ")
    expected = [token for turn in turns for token in llama(f"[INST] {turn}</s>").input_ids]
    assert encode_for_training(llama, messages, template="llama2")[0] == expected
    for text in (LINES, ONE_LINE):
        assert encode_document(llama, text, piece_size=50).tolist() == encode_text(llama, text)
    ids = encode_conversation(llama, messages[1:2], template="vicuna_v1.1")
    assert llama.decode(ids[1:]) == f"{DEFAULT_SYSTEM}\nUSER: Hi there\nASSISTANT: "
