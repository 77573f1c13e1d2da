"""Generation: options, streaming and stop strings, prompts that do not fit, and the inference script."""

import copy
import json
import threading
from types import SimpleNamespace

import pytest
from conftest import sentences
from rigged_model import load_script, run_main_of

from longqlora.inference.batch import partial_path
from longqlora.inference.generation import (
    AnswerStream,
    GenerationOptions,
    encode_prompt,
    fit_prompt,
    generate_text,
    template_for,
)  # fmt: skip

SCRIPT = "script/inference/inference.py"
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def tiny_model(tiny_model_dir):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def prompt_ids(tiny_tokenizer):
    return encode_prompt(tiny_tokenizer, PROMPT, template="none")


@pytest.fixture
def generate(tiny_model, tiny_tokenizer, prompt_ids):
    """Continue PROMPT, greedily unless `options` say otherwise."""

    def run(options=None, **given):
        options = {"do_sample": False, "max_new_tokens": 24, **(options or {})}
        return generate_text(tiny_model, tiny_tokenizer, prompt_ids, GenerationOptions(**options), **given)

    return run


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Run the script in this process from another folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_main_of(load_script(SCRIPT), arguments, monkeypatch, capsys)


@pytest.fixture
def model(tiny_model_dir):
    """The flags of the tiny model."""
    return ["--model_name_or_path", tiny_model_dir]


def reference(model, ids, num_tokens):
    import torch

    input_ids = torch.tensor([ids])
    mask = torch.ones_like(input_ids)
    output = model.generate(input_ids, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens)
    return output[0, len(ids) :].tolist()


def test_greedy_equals_generate_and_the_stream_equals_the_text(tiny_model, tiny_tokenizer, prompt_ids, generate):
    assert prompt_ids[0] == tiny_tokenizer.bos_token_id and prompt_ids[1] != tiny_tokenizer.bos_token_id
    pieces = []
    answer = generate(on_text=pieces.append)
    expected = reference(tiny_model, prompt_ids, 24)
    whole = tiny_tokenizer.decode(prompt_ids + expected, skip_special_tokens=True)
    assert PROMPT + answer.text == whole and "".join(pieces) == answer.text and len(pieces) > 1
    assert (answer.num_prompt_tokens, answer.num_new_tokens) == (len(prompt_ids), len(expected))
    assert generate({"do_sample": True, "temperature": 0}).text == answer.text
    with pytest.raises(ValueError, match="empty"):
        generate_text(tiny_model, tiny_tokenizer, [], GenerationOptions())


def test_sampling_follows_the_seed(generate):
    options = {"do_sample": True, "temperature": 1.0, "top_p": 1.0}
    texts = [generate({**options, "seed": seed}).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_leftover_generation_config_is_ignored(tiny_model, generate, monkeypatch):
    expected = generate().text
    monkeypatch.setattr(tiny_model, "generation_config", copy.deepcopy(tiny_model.generation_config))
    tiny_model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, num_beams=3)
    assert generate().text == expected


def test_finish_reasons(tiny_model, prompt_ids, generate, monkeypatch):
    threads, event = set(threading.enumerate()), threading.Event()
    answer = generate()
    assert answer.finish_reason == "length"
    stop = answer.text[5:8]
    stopped = generate({"stop": (stop, "absent")})
    assert stopped.finish_reason == "stop" and stopped.text == answer.text[: answer.text.index(stop)]
    interrupted = generate(on_text=lambda _: event.set(), stop_event=event)
    assert interrupted.finish_reason == "interrupted" and answer.text.startswith(interrupted.text) and interrupted.text
    assert max(stopped.num_new_tokens, interrupted.num_new_tokens) < 24
    ends = [tiny_model.generation_config.eos_token_id, *reference(tiny_model, prompt_ids, 1)]
    monkeypatch.setattr(tiny_model.generation_config, "eos_token_id", ends)
    ended = generate()
    assert ended.finish_reason == "eos" and ended.num_new_tokens == 1
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"repetition_penalty": 0}, {"seed": -1}, {"seed": 2**64},
        {"stop": ("",)},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options(values):
    with pytest.raises(ValueError, match=f"--{next(iter(values))}"):
        GenerationOptions(**values)


def stream(tokenizer, prompt_ids, ids, stop=()) -> tuple[list[str], AnswerStream]:
    """The pieces given out for `ids`, the last of them at the end, and the stream."""
    pieces = []
    answer = AnswerStream(tokenizer, prompt_ids, stop, pieces.append, threading.Event())
    for token_id in ids:
        answer.put([token_id])
    answer.put([], is_end=True)
    assert answer.text == "".join(pieces)
    return pieces, answer


@pytest.mark.parametrize("text", ["plain words", "für Ünïcode 漢字 and 🙂 done", " leading", "a\nb\n\n", "\ufffd", ""])
def test_stream_gives_the_text_in_whole_characters(tiny_tokenizer, text):
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, answer = stream(tiny_tokenizer, tiny_tokenizer("the prompt")["input_ids"], ids)
    assert answer.text == text and ("\ufffd" in text or not any("\ufffd" in piece for piece in pieces))


def test_stream_gives_out_broken_bytes_at_the_end(tiny_tokenizer):
    pieces, answer = stream(tiny_tokenizer, [1], tiny_tokenizer("ok 漢", add_special_tokens=False)["input_ids"][:-1])
    assert answer.text == "ok \ufffd" and pieces[-1] == "\ufffd"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("stop", "text", "passed"),
    [
        (["USER:"], "hello USER: more", "hello "),
        (["USER:"], "hello USE", "hello USE"),
        (["ab", "b"], "xab", "x"),
        (["aab"], "aaaab", "aa"),
        ([], "anything", "anything"),
        (["x", "lo"], "hello x", "hel"),
    ],
)
def test_stop_strings_at_any_split(size, stop, text, passed):
    tokens = [text[start : start + size] for start in range(0, len(text), size)]
    tokenizer = SimpleNamespace(decode=lambda ids, **options: "".join(tokens[token_id] for token_id in ids))
    _, answer = stream(tokenizer, [], range(len(tokens)), stop)
    assert answer.text == passed and answer.is_stopped == (passed != text)


def test_fit_prompt():
    ids = [1, *range(10, 99)]
    assert fit_prompt(ids, context_size=91, max_new_tokens=50, truncate=False) == ids
    with pytest.raises(ValueError, match="90 tokens and the context 90;.*--truncate_prompt"):
        fit_prompt(ids, context_size=90, max_new_tokens=50, truncate=False)
    cut = fit_prompt(ids, context_size=40, max_new_tokens=10, truncate=True)
    assert len(cut) == 30 and cut[0] == 1 and cut[1:] == ids[-29:]
    assert len(fit_prompt(ids, context_size=40, max_new_tokens=1000, truncate=True)) == 20
    assert fit_prompt(ids, context_size=1, max_new_tokens=5, truncate=True) == [1]


def test_template_for(tiny_tokenizer, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    source = {"tokenizer": tiny_tokenizer, "adapter_name_or_path": None, "base_model_name_or_path": "hub/name"}
    adapter = SimpleNamespace(**{**source, "adapter_name_or_path": str(tmp_path / "checkpoint-1")})
    merged = SimpleNamespace(**{**source, "base_model_name_or_path": str(tmp_path)})
    for sft, expected in ((None, "none"), (True, "vicuna_v1.1_fastchat"), (False, "none")):
        if sft is not None:
            record = {"arguments": {"data": {"sft": sft, "prompt_template": "vicuna_v1.1_fastchat"}}}
            (tmp_path / "run_record.json").write_text(json.dumps(record))
        assert template_for("auto", adapter) == template_for("auto", merged) == expected
    assert template_for("auto", merged, default="vicuna_v1.1") == template_for("vicuna_v1.1", merged) == "vicuna_v1.1"
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert template_for("auto", SimpleNamespace(**{**source, "tokenizer": tokenizer})) == "chat_template"


@pytest.mark.parametrize(
    ("dtype", "has_bf16", "warns"),
    [("fp16", True, True), ("bf16", True, False), ("bf16", False, True), ("fp32", False, False)],
)
def test_a_precision_that_the_cpu_lacks_is_named(script, model, monkeypatch, dtype, has_bf16, warns):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("longqlora.model.base.cpu_has_bf16", lambda: has_bf16)
    code, out, errors = script(*model, "--prompt", "the", "--max_new_tokens", 1, "--dtype", dtype)
    assert code == 0 and ("arithmetic; fp32 is many times faster" in errors) == warns and "arithmetic" not in out


def test_script_in_a_process_of_its_own(generate, model, tmp_path, run_script):
    outcome = run_script(
        SCRIPT, *model, "--prompt_file", "-", "--no-do_sample", "--max_new_tokens", 24, "--dtype", "fp32",
        cwd=tmp_path, input=PROMPT, check=True,
    )  # fmt: skip
    assert outcome.stdout == generate().text + "\n"


def test_script_streams_the_same_text_and_warns_beyond_the_context(script, model):
    arguments = [*model, "--prompt", PROMPT, "--temperature", 0]
    code, streamed, errors = script(*arguments, "--max_new_tokens", 60)
    assert code == 0 and "warning" in errors and "60 go beyond the context of 64" in errors
    assert script(*arguments, "--max_new_tokens", 60, "--no-stream")[1] == streamed
    for harmless in (["--max_new_tokens", 5], ["--max_new_tokens", 60, "--context_size", 256]):
        code, _, errors = script(*arguments, *harmless)
        assert code == 0 and "warning" not in errors
    chat = ["--prompt_template", "vicuna_v1.1", "--system", "be brief", "--context_size", 256]
    code, templated, _ = script(*arguments, "--max_new_tokens", 60, *chat)
    assert code == 0 and templated != streamed


def test_script_truncates_only_when_asked(script, model, tmp_path):
    (tmp_path / "long.txt").write_text(sentences(200))
    arguments = [*model, "--prompt_file", "long.txt", "--max_new_tokens", 4]
    for more, ended, message in (([], 2, "and the context 64"), (["--truncate_prompt"], 0, "kept 60 of")):
        code, _, errors = script(*arguments, *more)
        assert code == ended and message in errors


def test_batch_is_resumed(script, model, tmp_path):
    prompts = [{"prompt": sentences(3 + seed, seed), "id": seed} for seed in range(4)]
    (tmp_path / "in.jsonl").write_text("\ufeff" + "".join(json.dumps(p) + "\n\n" for p in prompts), encoding="utf-8")
    arguments = [*model, "--input_file", "in.jsonl", "--output_file", "out/a.jsonl", "--seed", 5, "--temperature", 1]
    arguments += ["--max_new_tokens", 6]
    code, out, _ = script(*arguments)
    assert code == 0 and out == ""
    target = tmp_path / "out" / "a.jsonl"
    lines = target.read_text(encoding="utf-8").splitlines(keepends=True)
    answers = [json.loads(line) for line in lines]
    assert [{"prompt": a["prompt"], "id": a["id"]} for a in answers] == prompts
    assert all(answer["num_new_tokens"] <= 6 and answer["finish_reason"] for answer in answers)
    assert script(*arguments)[0] == 2, "an output file that is there is not replaced"
    target.rename(partial_path(target))
    partial_path(target).write_text("".join(lines[:2]) + lines[2][:20], encoding="utf-8")
    code, _, errors = script(*arguments)
    assert code == 0 and "2 of 4 answers are there" in errors
    assert target.read_text(encoding="utf-8").splitlines(keepends=True) == lines
    assert not partial_path(target).exists()
    target.rename(partial_path(target))
    partial_path(target).write_text('{"prompt": "another"}\n')
    code, _, errors = script(*arguments)
    assert code == 2 and "answers to other prompts" in errors and not target.exists()


BATCH = "--input_file {} --output_file o"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--adapter_name_or_path ./nowhere --prompt x", "no folder"),
        ("--prompt x", "--model_name_or_path"),
        ("--model_name_or_path ./nowhere --prompt x", "no model folder"),
        ("MODEL --prompt_file nothing.txt", "no file"),
        ("MODEL --prompt_file latin.txt", "not UTF-8"),
        ("MODEL --input_file good.jsonl", "go together"),
        ("MODEL --prompt x --output_file y", "go together"),
        ("MODEL --input_file good.jsonl --output_file good.jsonl --overwrite", "overlaps"),
        (f"MODEL {BATCH.format('bad.jsonl')}", "line 2"),
        (f"MODEL {BATCH.format('key.jsonl')}", "line 1"),
        (f"MODEL {BATCH.format('empty')}", "no prompts"),
        (f"MODEL {BATCH.format('half.jsonl')}", "prompt 1: the prompt has half of a surrogate pair"),
        ("MODEL --prompt x --temperature -1", "--temperature"),
        ("MODEL --prompt x --context_size 0", "--context_size"),
        ("MODEL --prompt x --raw --prompt_template vicuna_v1.1", "contradict"),
        ("MODEL --prompt x --prompt_template chat_template", "chat template"),
        ("MODEL --prompt x --system brief", "--system"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, tiny_model_dir, tmp_path, words, message):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "good.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    (tmp_path / "key.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    code, out, errors = script(*words.replace("MODEL", f"--model_name_or_path {tiny_model_dir}").split())
    errors = [line for line in errors.splitlines() if line.startswith("error")]
    assert code == 2 and out == "" and len(errors) == 1 and message in errors[0]
