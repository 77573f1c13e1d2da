"""Generation: options, streaming and stop strings, prompts that do not fit, and the inference script."""

import json
import runpy
import sys
import threading
from types import SimpleNamespace

import pytest
from conftest import REPO, sentences

from longqlora.inference.batch import partial_path
from longqlora.inference.generation import (
    AnswerStream,
    GenerationOptions,
    encode_prompt,
    fit_prompt,
    generate_text,
    known_template,
)  # fmt: skip

SCRIPT = "script/inference/inference.py"
PROMPT = "the quick brown fox"
GREEDY = GenerationOptions(do_sample=False, max_new_tokens=24)


@pytest.fixture(scope="module")
def tiny_model(tiny_model_dir):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Run the script in this process from another folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(REPO / SCRIPT), run_name="__main__")
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def reference(model, tokenizer, ids, num_tokens):
    import torch

    input_ids = torch.tensor([ids])
    output = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=num_tokens
    )
    return output[0, len(ids) :].tolist()


def test_greedy_equals_generate_and_the_stream_equals_the_text(tiny_model, tiny_tokenizer):
    ids = encode_prompt(tiny_tokenizer, PROMPT, template="none")
    assert ids[0] == tiny_tokenizer.bos_token_id and ids[1] != tiny_tokenizer.bos_token_id
    pieces = []
    answer = generate_text(tiny_model, tiny_tokenizer, ids, GREEDY, on_text=pieces.append)
    expected = reference(tiny_model, tiny_tokenizer, ids, 24)
    whole = tiny_tokenizer.decode(ids + expected, skip_special_tokens=True)
    assert PROMPT + answer.text == whole and "".join(pieces) == answer.text and len(pieces) > 1
    assert (answer.num_prompt_tokens, answer.num_new_tokens) == (len(ids), len(expected))
    same = generate_text(tiny_model, tiny_tokenizer, ids, GenerationOptions(temperature=0, max_new_tokens=24))
    assert same.text == answer.text
    with pytest.raises(ValueError, match="empty"):
        generate_text(tiny_model, tiny_tokenizer, [], GREEDY)


def test_sampling_follows_the_seed(tiny_model, tiny_tokenizer):
    ids = encode_prompt(tiny_tokenizer, PROMPT, template="none")
    options = GenerationOptions(temperature=1.0, top_p=1.0, max_new_tokens=20)
    texts = [
        generate_text(tiny_model, tiny_tokenizer, ids, GenerationOptions(**{**vars(options), "seed": seed})).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_leftover_generation_config_is_ignored(tiny_model, tiny_tokenizer):
    ids = encode_prompt(tiny_tokenizer, PROMPT, template="none")
    expected = generate_text(tiny_model, tiny_tokenizer, ids, GREEDY).text
    saved = tiny_model.generation_config.to_dict()
    try:
        tiny_model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, num_beams=3)
        assert generate_text(tiny_model, tiny_tokenizer, ids, GREEDY).text == expected
    finally:
        tiny_model.generation_config.update(**saved)


def test_finish_reasons(tiny_model, tiny_tokenizer):
    threads = set(threading.enumerate())
    ids = encode_prompt(tiny_tokenizer, PROMPT, template="none")
    answer = generate_text(tiny_model, tiny_tokenizer, ids, GREEDY)
    assert answer.finish_reason == "length"
    stop = answer.text[5:8]
    stopped = generate_text(
        tiny_model, tiny_tokenizer, ids, GenerationOptions(do_sample=False, max_new_tokens=24, stop=(stop, "absent"))
    )
    assert stopped.finish_reason == "stop" and stopped.text == answer.text[: answer.text.index(stop)]
    assert stopped.num_new_tokens < 24
    event = threading.Event()
    interrupted = generate_text(
        tiny_model, tiny_tokenizer, ids, GREEDY, on_text=lambda _: event.set(), stop_event=event
    )
    assert interrupted.finish_reason == "interrupted" and answer.text.startswith(interrupted.text) and interrupted.text
    assert interrupted.num_new_tokens < 24
    first = reference(tiny_model, tiny_tokenizer, ids, 1)[0]
    old = tiny_model.generation_config.eos_token_id
    try:
        tiny_model.generation_config.eos_token_id = [old, first]
        ended = generate_text(tiny_model, tiny_tokenizer, ids, GREEDY)
    finally:
        tiny_model.generation_config.eos_token_id = old
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
        answer.put(token_id)
    assert answer.finish() == "".join(pieces)
    return pieces, answer


@pytest.mark.parametrize("text", ["plain words", "für Ünïcode 漢字 and 🙂 done", " leading", "a\nb\n\n", "\ufffd", ""])
def test_stream_gives_the_text_in_whole_characters(tiny_tokenizer, text):
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, answer = stream(tiny_tokenizer, tiny_tokenizer("the prompt")["input_ids"], ids)
    assert answer.text == text and ("\ufffd" in text or not any("\ufffd" in piece for piece in pieces))


def test_stream_gives_out_broken_bytes_at_the_end(tiny_tokenizer):
    ids = tiny_tokenizer("ok 漢", add_special_tokens=False)["input_ids"][:-1]
    pieces, answer = stream(tiny_tokenizer, [1], ids)
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


def test_known_template(tiny_tokenizer, tmp_path):
    assert known_template(tiny_tokenizer, [None, str(tmp_path)]) is None
    (tmp_path / "checkpoint-1").mkdir()
    record = {"arguments": {"data": {"sft": True, "prompt_template": "vicuna_v1.1_fastchat"}}}
    (tmp_path / "run_record.json").write_text(json.dumps(record))
    assert known_template(tiny_tokenizer, [None, str(tmp_path / "checkpoint-1")]) == "vicuna_v1.1_fastchat"
    record["arguments"]["data"]["sft"] = False
    (tmp_path / "run_record.json").write_text(json.dumps(record))
    assert known_template(tiny_tokenizer, [str(tmp_path)]) is None


@pytest.mark.parametrize(
    ("dtype", "has_bf16", "warns"),
    [("fp16", True, True), ("bf16", True, False), ("bf16", False, True), ("fp32", False, False)],
)
def test_a_precision_that_the_cpu_lacks_is_named(script, tiny_model_dir, monkeypatch, dtype, has_bf16, warns):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("longqlora.model.base.cpu_has_bf16", lambda: has_bf16)
    words = ["--model_name_or_path", tiny_model_dir, "--prompt", "the", "--max_new_tokens", 1, "--dtype", dtype]
    code, out, errors = script(*words)
    assert code == 0 and ("arithmetic; fp32 is many times faster" in errors) == warns and "arithmetic" not in out


def test_script_in_a_process_of_its_own(tiny_model, tiny_tokenizer, tiny_model_dir, tmp_path, run_script):
    ids = encode_prompt(tiny_tokenizer, PROMPT, template="none")
    outcome = run_script(
        SCRIPT, "--model_name_or_path", tiny_model_dir, "--prompt_file", "-", "--no-do_sample", "--max_new_tokens", 24,
        "--dtype", "fp32", cwd=tmp_path, input=PROMPT, check=True,
    )  # fmt: skip
    assert outcome.stdout == generate_text(tiny_model, tiny_tokenizer, ids, GREEDY).text + "\n"


def test_script_streams_the_same_text_and_warns_beyond_the_context(script, tiny_model_dir):
    arguments = ["--model_name_or_path", tiny_model_dir, "--prompt", PROMPT, "--temperature", 0]
    code, streamed, errors = script(*arguments, "--max_new_tokens", 60)
    assert code == 0 and "warning" in errors and "60 go beyond the context of 64" in errors
    assert script(*arguments, "--max_new_tokens", 60, "--no-stream")[1] == streamed
    assert "warning" not in script(*arguments, "--max_new_tokens", 5)[2]
    code, _, errors = script(*arguments, "--max_new_tokens", 60, "--context_size", 256)
    assert code == 0 and "warning" not in errors


def test_script_uses_the_template(script, tiny_model_dir):
    arguments = ["--model_name_or_path", tiny_model_dir, "--prompt", "hi", "--no-do_sample", "--max_new_tokens", 8]
    arguments += ["--context_size", 256]
    outputs = [script(*arguments, *more) for more in ([], ["--prompt_template", "vicuna_v1.1", "--system", "be brief"])]
    assert [code for code, _, _ in outputs] == [0, 0] and outputs[0][1] != outputs[1][1]


def test_script_truncates_only_when_asked(script, tiny_model_dir, tmp_path):
    (tmp_path / "long.txt").write_text(sentences(200))
    arguments = ["--model_name_or_path", tiny_model_dir, "--prompt_file", "long.txt", "--max_new_tokens", 4]
    code, _, errors = script(*arguments)
    assert code == 2 and "and the context 64" in errors
    code, _, errors = script(*arguments, "--truncate_prompt")
    assert code == 0 and "kept 60 of" in errors


def test_batch_is_resumed(script, tiny_model_dir, tmp_path):
    prompts = [{"prompt": sentences(3 + seed, seed), "id": seed} for seed in range(4)]
    (tmp_path / "in.jsonl").write_text("\ufeff" + "".join(json.dumps(p) + "\n\n" for p in prompts), encoding="utf-8")
    arguments = ["--model_name_or_path", tiny_model_dir, "--input_file", "in.jsonl", "--output_file", "out/a.jsonl"]
    arguments += ["--seed", 5, "--max_new_tokens", 6, "--temperature", 1]
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
        ("MODEL --input_file good.jsonl --output_file .", "is a folder"),
        ("MODEL --input_file good.jsonl --output_file good.jsonl --overwrite", "overlaps"),
        (f"MODEL {BATCH.format('bad.jsonl')}", "line 2"),
        (f"MODEL {BATCH.format('key.jsonl')}", "line 1"),
        (f"MODEL {BATCH.format('empty')}", "no prompts"),
        (f"MODEL {BATCH.format('half.jsonl')}", "prompt 1: the prompt has half of a surrogate pair"),
        ("MODEL --prompt x --temperature -1", "--temperature"),
        ("MODEL --prompt x --top_p nan", "--top_p"),
        ("MODEL --prompt x --max_new_tokens 0", "--max_new_tokens"),
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
