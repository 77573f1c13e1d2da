"""Generation: options, streaming and stop strings, prompts that do not fit, and the inference script."""

import copy
import json
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import sentences
from model_folders import make_adapter
from rigged_model import load_script
from transformers import AutoModelForCausalLM

from longqlora.evaluation.perplexity_task import TokenScorer
from longqlora.inference.batch import partial_path
from longqlora.inference.generation import (
    AnswerStream,
    GenerationOptions,
    encode_prompt,
    generate_text,
    generate_texts,
)
from longqlora.inference.load import load_for_inference, load_weights
from longqlora.inference.source import ModelSource, read_source
from longqlora.model.context_request import ContextRequest

SCRIPT = "script/inference/inference.py"
PROMPT = "the quick brown fox"
FILES = {
    "short.txt": PROMPT, "long.txt": sentences(200), "latin.txt": "\udce9", "good.jsonl": '{"prompt": "x"}\n',
    "bad.jsonl": '{"prompt": "x"}\n{"prompt": \n', "key.jsonl": '{"text": "x"}\n', "empty": "\n",
    "half.jsonl": '{"prompt": "\\ud800"}\n',
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_model(tiny_model_dir):
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def generate(tiny_model, tiny_tokenizer):
    """Continue PROMPT, greedily unless `options` say otherwise."""
    prompt_ids = encode_prompt(tiny_tokenizer, PROMPT, template="none")

    def run(on_text=None, stop_event=None, **options):
        options = GenerationOptions(**{"do_sample": False, "max_new_tokens": 24, **options})
        return generate_text(tiny_model, tiny_tokenizer, prompt_ids, options, on_text=on_text, stop_event=stop_event)

    return run


@pytest.fixture
def script(tiny_model_dir, run_in_process, monkeypatch, tmp_path):
    """Run the script in this process from a folder with FILES: (exit code, stdout, stderr). MODEL: the tiny model."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, errors="surrogateescape")
    model = f"--model_name_or_path {tiny_model_dir}"
    return lambda words, **given: run_in_process(SCRIPT, *words.replace("MODEL", model).split(), **given)


def test_greedy_equals_generate_and_the_stream_equals_the_text(tiny_model, tiny_tokenizer, generate):
    prompt_ids = encode_prompt(tiny_tokenizer, PROMPT, template="none")
    assert prompt_ids[0] == tiny_tokenizer.bos_token_id and prompt_ids[1] != tiny_tokenizer.bos_token_id
    pieces = []
    answer = generate(on_text=pieces.append)
    [whole] = tiny_model.generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=24)
    assert PROMPT + answer.text == tiny_tokenizer.decode(whole, skip_special_tokens=True)
    assert "".join(pieces) == answer.text and len(pieces) > 1
    assert (answer.num_prompt_tokens, answer.num_new_tokens) == (len(prompt_ids), len(whole) - len(prompt_ids))
    with pytest.raises(ValueError, match="empty"):
        generate_text(tiny_model, tiny_tokenizer, [], GenerationOptions())


def test_options_and_seed_alone_decide_an_answer(tiny_model, generate, monkeypatch):
    expected = generate().text
    monkeypatch.setattr(tiny_model, "generation_config", copy.deepcopy(tiny_model.generation_config))
    tiny_model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, num_beams=3)
    assert generate().text == generate(do_sample=True, temperature=0).text == expected
    texts = [generate(do_sample=True, temperature=1.0, top_p=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_finish_reasons(tiny_model, generate, monkeypatch):
    threads, event = set(threading.enumerate()), threading.Event()
    answer = generate()
    assert answer.finish_reason == "length"
    stop = answer.text[5:8]
    stopped = generate(stop=(stop, "absent"))
    assert stopped.finish_reason == "stop" and stopped.text == answer.text[: answer.text.index(stop)]
    interrupted = generate(on_text=lambda _: event.set(), stop_event=event)
    assert interrupted.finish_reason == "interrupted" and answer.text.startswith(interrupted.text) and interrupted.text
    assert max(stopped.num_new_tokens, interrupted.num_new_tokens) < 24
    ends = [tiny_model.generation_config.eos_token_id, answer.new_ids[0]]
    monkeypatch.setattr(tiny_model.generation_config, "eos_token_id", ends)
    ended = generate()
    assert ended.finish_reason == "eos" and ended.num_new_tokens == 1
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize("attention", ["full", "dca"])
def test_rows_of_a_batch_are_answered_as_alone(tiny_model_dir, tiny_tokenizer, attention):
    """Rows of unequal length, of which one ends by a stop string and one by the end token, each before the others."""
    context = ContextRequest(context_size=256, attention=attention, rope_type=None if attention == "dca" else "yarn")
    loaded = load_for_inference(str(tiny_model_dir), context=context, dtype=torch.float32)
    model = copy.copy(loaded.model)
    prompts = [encode_prompt(tiny_tokenizer, sentences(size, seed=size), template="none") for size in (3, 90, 41, 17)]
    options = {"do_sample": False, "max_new_tokens": 20}

    def alone(**more) -> list:
        given = GenerationOptions(**options, **more)
        return [generate_text(model, tiny_tokenizer, ids, given) for ids in prompts]

    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = [2, alone()[1].new_ids[4]]
    stop = alone()[2].text[6:9]
    expected = alone(stop=(stop,))
    assert {"stop", "eos"} <= {answer.finish_reason for answer in expected}
    assert len({answer.num_new_tokens for answer in expected}) > 1
    assert generate_texts(model, tiny_tokenizer, prompts, GenerationOptions(**options, stop=(stop,))) == expected


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_model_that_is_spread_is_the_same_model(tiny_model_dir, tmp_path, monkeypatch, load_in_4bit):
    """On a machine without GPUs transformers puts all of it on the CPU."""
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter", modules_to_save=["norm"])
    source, ids = read_source(None, str(adapter)), torch.arange(4, 60)[None]
    options = {"load_in_4bit": load_in_4bit, "dtype": torch.float32}
    loading = Mock(side_effect=AutoModelForCausalLM.from_pretrained)
    monkeypatch.setattr("longqlora.model.base.AutoModelForCausalLM.from_pretrained", loading)
    one, spread = (load_weights(source, **options, device_map=device_map).model for device_map in (None, "auto"))
    assert [call.kwargs["device_map"] for call in loading.call_args_list] == [{"": torch.device("cpu")}, "auto"]
    with torch.inference_mode():
        torch.testing.assert_close(spread(ids).logits, one(ids).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(TokenScorer(spread)(ids)[0], TokenScorer(one)(ids)[0], rtol=0, atol=1e-5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device_map auto: .* start one process"):
        load_weights(source, device_map="auto")


BAD_OPTIONS = {
    "max_new_tokens": [0, 10**18], "temperature": [-0.1, float("nan"), float("inf")], "top_p": [0, 1.1], "top_k": [-1],
    "repetition_penalty": [0], "seed": [-1, 2**64], "stop": [("",)],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD_OPTIONS for value in BAD_OPTIONS[name]])
def test_bad_options(name, value):
    with pytest.raises(ValueError, match=f"^{name}: .* is not "):
        GenerationOptions(**{name: value})


def stream(tokenizer, prompt_ids, ids, stop=()) -> tuple[list[str], AnswerStream]:
    """The pieces given out for `ids`, the last of them at the end, and the stream."""
    pieces = []
    answer = AnswerStream(tokenizer, prompt_ids, stop, pieces.append)
    for token_id in ids:
        answer.put([token_id])
    answer.put([], is_end=True)
    assert answer.text == "".join(pieces)
    return pieces, answer


@pytest.mark.parametrize(
    "text", ["plain words", "für Ünïcode 漢字 and 🙂 done", " leading", "a\nb\n\n", "\ufffd", "", "broken 漢"]
)
def test_stream_gives_the_text_in_whole_characters(tiny_tokenizer, text):
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    if text.startswith("broken"):
        ids, text = ids[:-1], "broken \ufffd"
    pieces, answer = stream(tiny_tokenizer, tiny_tokenizer("the prompt")["input_ids"], ids)
    assert answer.text == text and [piece for piece in pieces if "\ufffd" in piece] == ["\ufffd"] * text.count("\ufffd")


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


def test_a_prompt_that_is_cut_keeps_bos_and_its_end(tiny_tokenizer):
    whole = encode_prompt(tiny_tokenizer, sentences(80), template="none")
    given = {"raw": True, "system": None, "input_file": None, "truncate_prompt": True}
    for size, max_new_tokens, room in ((len(whole) + 1, 50, len(whole)), (40, 10, 30), (40, 1000, 20), (1, 5, 1)):
        args = SimpleNamespace(**given, max_new_tokens=max_new_tokens)
        source = ModelSource(tiny_tokenizer, None, "base", None, size)
        [ids] = load_script(SCRIPT).fitted_prompts(args, source, [{"prompt": sentences(80)}])
        assert ids == [whole[0], *whole[len(whole) - room + 1 :]]


def test_the_template_that_auto_means(tokenizer, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    adapter = ModelSource(tokenizer, None, "hub/name", str(tmp_path / "checkpoint-1"), 64)
    merged = ModelSource(tokenizer, None, str(tmp_path), None, 64)
    for sft, expected in ((None, "none"), (True, "vicuna_v1.1_fastchat"), (False, "none")):
        if sft is not None:
            record = {"arguments": {"data": {"sft": sft, "prompt_template": "vicuna_v1.1_fastchat"}}}
            (tmp_path / "run_record.json").write_text(json.dumps(record))
        assert adapter.template("auto") == merged.template("auto") == expected
    assert merged.template("auto", default="vicuna_v1.1") == merged.template("vicuna_v1.1") == "vicuna_v1.1"
    tokenizer.chat_template = "{{ messages }}"
    assert merged.template("auto") == "chat_template"


def test_a_precision_that_the_cpu_lacks_is_named(script, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for dtype, warns in (("fp32", False), ("fp16", True)):
        code, out, errors = script(f"MODEL --prompt the --max_new_tokens 1 --dtype {dtype}")
        assert code == 0 and ("arithmetic; fp32 is many times faster" in errors) == warns and "arithmetic" not in out


def test_script_prints_the_answer_streamed_or_whole(script, generate):
    words, answer = "MODEL --dtype fp32 --temperature 0 --max_new_tokens 24 --prompt_file", (0, generate().text + "\n")
    for more in ("-", "short.txt", "short.txt --no-stream", "short.txt --raw"):
        assert script(f"{words} {more}", input=PROMPT)[:2] == answer, more
    code, out, _ = script(f"{words} short.txt --prompt_template vicuna_v1.1 --system brief")
    assert code == 0 and out != answer[1]


def test_script_warns_beyond_the_context(script):
    for words, warning in (
        ("short.txt --max_new_tokens 60", "60 go beyond the context of 64"),
        ("long.txt --max_new_tokens 4 --truncate_prompt", "kept 60 of"),
        ("short.txt --max_new_tokens 5", None),
        ("short.txt --max_new_tokens 60 --context_size 256", None),
    ):
        code, _, errors = script(f"MODEL --prompt_file {words}")
        assert code == 0 and (warning in errors if warning else "warning" not in errors), words


def test_batch_is_resumed(script, tmp_path):
    prompts = [{"prompt": sentences(3 + seed, seed), "id": seed} for seed in range(4)]
    (tmp_path / "in.jsonl").write_text("\ufeff" + "".join(json.dumps(p) + "\n\n" for p in prompts), encoding="utf-8")
    words = "MODEL --input_file in.jsonl --output_file out/a.jsonl --seed 5 --temperature 1 --max_new_tokens 6"
    target = tmp_path / "out" / "a.jsonl"
    assert script(words)[:2] == (0, "")
    lines = target.read_text(encoding="utf-8").splitlines(keepends=True)
    answers = [json.loads(line) for line in lines]
    assert [{"prompt": a["prompt"], "id": a["id"]} for a in answers] == prompts
    assert all(answer["num_new_tokens"] <= 6 and answer["finish_reason"] for answer in answers)
    assert script(words)[0] == 2, "an output file that is there is not replaced"
    for left, ended, message in (
        ("".join(lines[:2]) + lines[2][:20], 0, "2 of 4 answers are there"),
        ('{"prompt": "another"}\n', 2, "answers to other prompts"),
    ):
        target.unlink()
        partial_path(target).write_text(left, encoding="utf-8")
        code, _, errors = script(words)
        assert code == ended and message in errors
        assert target.exists() != partial_path(target).exists()
        assert code or target.read_text(encoding="utf-8").splitlines(keepends=True) == lines
    words = words.replace("--temperature 1", "--temperature 0")
    greedy: list[str] = []
    for size, done in ((1, 0), (3, 0), (3, 1)):
        target.unlink(missing_ok=True)
        partial_path(target).write_text("".join(greedy[:done]), encoding="utf-8")
        assert script(f"{words} --batch_size {size}")[0] == 0
        found = target.read_text(encoding="utf-8").splitlines(keepends=True)
        assert size == 1 or found == greedy
        greedy = found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--adapter_name_or_path ./nowhere --prompt x", "no folder"),
        ("--prompt x", "--model_name_or_path"),
        ("--model_name_or_path ./nowhere --prompt x", "no model folder"),
        ("MODEL --prompt_file nothing.txt", "no file"),
        ("MODEL --prompt_file latin.txt", "not UTF-8"),
        ("MODEL --prompt_file long.txt --max_new_tokens 4", "tokens and the context 64; shorten it, raise"),
        ("MODEL --input_file good.jsonl", "go together"),
        ("MODEL --prompt x --output_file y", "go together"),
        ("MODEL --input_file good.jsonl --output_file good.jsonl --overwrite", "overlaps"),
        ("MODEL --output_file o --input_file bad.jsonl", "line 2"),
        ("MODEL --output_file o --input_file key.jsonl", "line 1"),
        ("MODEL --output_file o --input_file empty", "no prompts"),
        ("MODEL --output_file o --input_file half.jsonl", "prompt 1: the prompt has half of a surrogate pair"),
        ("MODEL --prompt x --batch_size 2", "--batch_size 2: must be at least 1, and goes with --input_file"),
        (
            "MODEL --output_file o --input_file good.jsonl --batch_size 2 --rope_type dynamic --context_size 256",
            "by the",
        ),
        ("MODEL --prompt x --temperature -1", "--temperature"),
        ("MODEL --prompt x --context_size 0", "--context_size"),
        ("MODEL --prompt x --raw --prompt_template vicuna_v1.1", "contradict"),
        ("MODEL --prompt x --prompt_template chat_template", "chat template"),
        ("MODEL --prompt x --system brief", "--system"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, words, message):
    code, out, errors = script(words)
    errors = [line for line in errors.splitlines() if line.startswith("error")]
    assert code == 2 and out == "" and len(errors) == 1 and message in errors[0]
