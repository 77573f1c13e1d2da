"""The endless chat: what it reads, that nothing can put its ids and its cache at odds, and its flags."""

import contextlib
import json
import logging
import threading
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import sentences, tiny_config
from rigged_model import load_script
from transformers import AutoModelForCausalLM

from longqlora.data.prompt import encode_conversation
from longqlora.inference.chat.streaming import StreamingSession
from longqlora.inference.generation import GenerationOptions, generate_text
from longqlora.inference.sink_cache import sink_cache

CHAT = "script/inference/chat.py"
WINDOW = 16
CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + ('</s>' if m.role == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GREEDY = GenerationOptions(do_sample=False, max_new_tokens=6)


def make_session(tokenizer, *, window=WINDOW, template="vicuna_v1.1", options=GREEDY, context=64, **kwargs):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(max_position_embeddings=context)).eval()
    loaded = SimpleNamespace(model=model, tokenizer=tokenizer)
    return StreamingSession(loaded, template, options, cache=sink_cache(model, window=window), **kwargs)


@pytest.fixture
def session(tiny_tokenizer):
    return make_session(tiny_tokenizer)


def ask(session, question, stop_event=None) -> tuple[bool, str]:
    pieces = []
    return session.reply(question, pieces.append, stop_event or threading.Event()), "".join(pieces)


def test_two_turns_equal_all_ids_at_once_within_the_window(tiny_tokenizer):
    session = make_session(tiny_tokenizer, window=1000, context=1024, system="be brief")
    ask(session, "the quick brown fox")
    first = list(session.ids)
    _, text = ask(session, "over a lazy dog")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the quick brown fox"}]
    prompt = encode_conversation(tiny_tokenizer, messages)
    assert first[: len(prompt)] == prompt and len(first) == len(prompt) + 6
    second = [*first, 2, *tiny_tokenizer.encode("USER: over a lazy dog\nASSISTANT: ", add_special_tokens=False)]
    expected = generate_text(session.loaded.model, tiny_tokenizer, second, GREEDY)
    assert session.ids == [*second, *expected.new_ids] and text == expected.text


def follow_reading(session) -> list[int]:
    """A list that grows by the number of tokens of each forward pass."""
    blocks = []
    embedding = session.loaded.model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, args: blocks.append(args[0].shape[1]))
    return blocks


def test_a_file_is_read_once_in_blocks_and_answered_as_with_the_cache_by_hand(session, tiny_tokenizer, tmp_path):
    by_hand = make_session(tiny_tokenizer)
    path = tmp_path / "long.txt"
    path.write_text(sentences(200))
    blocks = follow_reading(session)
    assert session.run_command(f"/file {path}").endswith(" tokens")
    assert ask(session, "what is it?")[0] and session.cache.get_seq_length() < 3 * WINDOW + 48 + 6
    text = f"Below is the text of {path}.\n\n{sentences(200)}\n\nThe text ends here.\n\nwhat is it?"
    ids = session.encode(session.messages(text))
    with torch.no_grad():
        for block in torch.tensor([ids]).split(48, dim=1):
            logits = by_hand.loaded.model(input_ids=block, past_key_values=by_hand.cache, use_cache=True).logits[0]
    assert session.ids[-6] == logits[-1].argmax() and session.ids[:4] == ids[:4] and session.ids[-18:-6] == ids[-12:]
    assert max(blocks) == 64 - WINDOW and sum(blocks) == len(ids) + 5, "block and window fill the context"
    for command, is_read_again in (("/help", False), (f"/file {path}", True), ("/help", False)):
        session.run_command(command)
        blocks.clear()
        ask(session, "what is it?")
        assert (sum(blocks) > 200) == is_read_again, command


def test_ids_and_cache_agree_over_many_turns(session, tiny_tokenizer):
    for number in range(12):
        ask(session, f"question {number} " + sentences(number * 5 + 1))
        assert session.cache.get_seq_length() == len(session.ids) - 1 < 400
    reminder = "transformers.generation.stopping_criteria"
    assert not logging.getLogger(reminder).isEnabledFor(logging.WARNING), "of a stream beyond the model's context"
    session.run_command("/clear")
    assert session.ids == [] and session.cache.get_seq_length() == 0
    fresh = make_session(tiny_tokenizer)
    assert ask(session, "hello") == ask(fresh, "hello") and session.ids == fresh.ids


def test_an_end_of_the_models_choice_is_written_once(tiny_tokenizer):
    session = make_session(tiny_tokenizer, window=1000, context=1024)
    ask(session, "hello")
    session.end_ids.add(session.ids[-1])
    session.loaded.model.generation_config.eos_token_id = [2, session.ids[-1]]
    session.clear()
    ask(session, "hello")
    seen = session.cache.get_seq_length()
    assert session.ids[-1] != max(session.end_ids) and seen == len(session.ids)
    ask(session, "more")
    assert session.ids[seen : seen + 2] == [2, tiny_tokenizer.encode("USER", add_special_tokens=False)[0]]


def test_a_stop_string_ends_the_text_and_stays_in_the_stream(session, tiny_tokenizer):
    _, text = ask(session, "hello")
    whole, start = list(session.ids), len(text) // 2
    session = make_session(tiny_tokenizer, options=replace(GREEDY, stop=(text[start : start + 2],)))
    assert ask(session, "hello") == (True, text[:start])
    assert session.ids == whole[: len(session.ids)] and session.cache.get_seq_length() == len(session.ids) - 1


def act_at(model, num_calls: int, act):
    """Call `act` before the n-th call of a layer; returns the handle of the hook."""
    calls = iter(range(1, num_calls + 1))
    return model.model.layers[1].register_forward_pre_hook(
        lambda module, args: act() if next(calls, None) == num_calls else None
    )


@pytest.mark.parametrize("num_calls", [1, 3, 7], ids=["first block", "while reading", "while answering"])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_or_error_takes_the_question_back(tiny_tokenizer, num_calls, is_first, error):
    session, untouched = (make_session(tiny_tokenizer) for _ in range(2))
    if not is_first:
        assert ask(session, sentences(90)) == ask(untouched, sentences(90))

    def fail():
        raise error

    hook, event = act_at(session.loaded.model, num_calls, fail), threading.Event()
    with pytest.raises(MemoryError) if error is MemoryError else contextlib.nullcontext():
        assert not ask(session, sentences(40, seed=1), event)[0] and event.is_set()
    hook.remove()
    assert session.ids == untouched.ids and session.cache.get_seq_length() == untouched.cache.get_seq_length()
    assert ask(session, "next one") == ask(untouched, "next one") and session.ids == untouched.ids


def test_ctrl_c_ends_reading_at_once_and_an_answer_after_a_token(session):
    ask(session, "hello")
    before, event, blocks = list(session.ids), threading.Event(), follow_reading(session)
    hook = act_at(session.loaded.model, 2, event.set)
    assert not ask(session, sentences(300), event)[0] and session.ids == before
    assert len(blocks) == 2, "no further block"
    hook.remove()
    event = threading.Event()
    act_at(session.loaded.model, 3, event.set)
    assert ask(session, "more", event)[0] and session.cache.get_seq_length() == len(session.ids) - 1


def test_next_turn_of_a_chat_template(tokenizer):
    tokenizer.chat_template = CHATML
    session = make_session(tokenizer, template="chat_template", system="be brief")
    expected = tokenizer.encode("</s>\n<|user|>what now?\n<|assistant|>", add_special_tokens=False)
    assert session.next_turn_ids("what now?") == expected
    for template, reason in (
        (CHATML.replace("</s>", ""), "does not end an answer with a token of its own"),
        ("{{ messages | length }}" + CHATML, "rewrites earlier turns"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=f"--streaming: .*{reason}.*--prompt_template vicuna_v1.1"):
            make_session(tokenizer, template="chat_template")


def test_chat_through_a_pipe_beyond_the_context(tiny_model_dir, tmp_path, monkeypatch, run_in_process):
    (tmp_path / "paper.txt").write_text(sentences(400))
    lines = [sentences(100), "/file paper.txt", "what does it say?", "ünïcode", "/save full.json", "/clear", "hello"]
    flags = ["--streaming", "--streaming_window", 40, "--num_sinks", 2, "--max_new_tokens", 90, "--no-do_sample"]
    monkeypatch.chdir(tmp_path)
    spy = Mock(side_effect=sink_cache)
    monkeypatch.setattr("longqlora.inference.sink_cache.sink_cache", spy)
    code, out, errors = run_in_process(CHAT, "--model_name_or_path", tiny_model_dir, *flags, input="\r\n".join(lines))
    assert code == 0 and spy.call_args.kwargs == {"window": 40, "num_sinks": 2}
    notes = [line for line in errors.splitlines() if line and "Loading weights" not in line]
    assert notes[0].startswith("read paper.txt: ") and notes[1:] == ["saved full.json", "cleared"]
    messages = json.loads((tmp_path / "full.json").read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in messages[::2]] == [sentences(100), "what does it say?", "ünïcode"]
    assert all(len(message["content"]) > 90 for message in messages[1::2])
    assert out.startswith(messages[1]["content"] + "\n")


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_question_that_was_taken_back_is_not_saved(session, is_kept, capsys, monkeypatch):
    def reply(question, on_text, stop_event) -> bool:
        on_text(" it")
        stop_event.set()
        return is_kept

    monkeypatch.setattr(session, "reply", reply)
    load_script(CHAT).answer(session, "what?")
    assert [message["content"] for message in session.history] == ["what?", "it"] * is_kept
    assert ("as if it had not been asked" in capsys.readouterr().err) != is_kept


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--streaming_window", "20"], ["--streaming_window", "--streaming only"]),
        (["--streaming", "--context_size", "128", "--rope_type", "dynamic"], ["--streaming", "dynamic"]),
    ],
)
def test_bad_flags(flags, words, tiny_model_dir, monkeypatch, run_in_process):
    monkeypatch.setattr("longqlora.inference.load.load_weights", lambda *args, **given: pytest.fail("it loaded"))
    code, _, error = run_in_process(CHAT, "--model_name_or_path", tiny_model_dir, *flags)
    assert code == 2 and error.count("\n") == 1 and all(word in error for word in words), error
