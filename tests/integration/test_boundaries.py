"""Damaged files at every load boundary: each ends in one line that names setting and path, or in a right run.

Boundaries are called as the scripts call them, in this process. The full fuzz of each is marked slow.
"""

import json
import math
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from conftest import REPO, save_tiny_model, sentences, tiny_config
from damage import FILE_DAMAGES, mutated, outcome
from model_folders import edit_json, edit_weights, make_adapter
from rigged_model import load_script, run_main_of
from safetensors.torch import load_file, save_file
from training_process import train

from longqlora.data.prompt import CHAT_TEMPLATE, encode_document, encode_for_training, prompt_template_for
from longqlora.data.row import conversation_of_row, text_of_row
from longqlora.data.source import open_source, sources_of
from longqlora.data.token_file import open_token_file, write_token_file
from longqlora.evaluation.comparison import read_comparison
from longqlora.inference.batch import read_prompts
from longqlora.inference.generation import GenerationOptions, encode_prompt, generate_text
from longqlora.inference.load import load_for_inference
from longqlora.memory.plan import plan_memory
from longqlora.model.adapter_folder import RANK
from longqlora.model.base import FEW, load_config, load_tokenizer
from longqlora.model.context import apply_context, load_extended_config
from longqlora.model.context_request import ContextRequest
from longqlora.model.merge import merge
from longqlora.model.saved_folder import save_tokenizer
from longqlora.model.weight_files import check_base
from longqlora.reading import COUNT, COUNTS, NONE, NUMBER, NUMBERS, POSITIVE, ROWS, check_kinds, reading, time_limit
from longqlora.settings.reader import resolve_settings
from longqlora.training.arguments import build_arguments
from longqlora.training.checks import check_data, check_model, check_settings
from longqlora.training.resume import resume_point

NUM_FAST, NUM_SLOW = 25, 2000
MESSAGES = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "a dog"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONVERSATION = {"messages": MESSAGES, "id": 7, "tools": [{"type": "function", "function": {"name": "f"}}]}
INDEX = "model.safetensors.index.json"
CHECKPOINT = "resume_from_checkpoint"


def in_shards(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(weights), ("model-1.safetensors", "model-2.safetensors")
    for number, file in enumerate(files):
        save_file({name: weights[name] for name in names[number::2]}, folder / file, metadata={"format": "pt"})
    weight_map = {name: files[position % 2] for position, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_model_dir, tiny_tokenizer, write_yaml_in):
    """Whole files of every kind, to be copied and damaged."""
    root = tmp_path_factory.mktemp("whole")
    model = shutil.copytree(tiny_model_dir, root / "model")
    edit_json(model / "tokenizer_config.json", chat_template=TEMPLATE)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    in_shards(shutil.copytree(model, root / "sharded"))
    os.mkdir(root / "bin")
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / file, root / "bin" / file)
    torch.save(load_file(model / "model.safetensors"), root / "bin" / "pytorch_model.bin")
    make_adapter(model, root / "adapter", tiny_tokenizer)
    files = root / "files"
    files.mkdir()
    rows = [{"text": sentences(30, seed=seed)} for seed in range(3)]
    (files / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (files / "rows.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(files / "rows.parquet")
    (files / "chat.jsonl").write_text(json.dumps(CONVERSATION))
    (files / "prompts.jsonl").write_text('{"prompt": "the fox"}\n')
    write_token_file(files / "ids.bin", [[1, 2, 3] * 50], tokenizer_name="tiny", vocab_size=320)
    path, output = write_yaml_in(root, "run", max_steps=2, train_embedding=False, model_name_or_path=str(model))
    train(path)
    shutil.copy(path, files / "run.yaml")
    comparison = yaml.safe_load((REPO / "script" / "evaluate" / "compare-demo.yaml").read_text())
    comparison |= {"base_model": str(model), "data_path": str(files / "ids.bin"), "lengths": [64], "sliding_window": 64}
    (files / "compare.yaml").write_text(yaml.safe_dump(comparison))
    shutil.copytree(output / "checkpoint-2", root / "run-of-2" / "checkpoint-2")
    return root


class Boundaries:
    """The load boundaries, over folders as the fixture `root` makes them. `whole`: what is not damaged."""

    def __init__(self, whole: Path):
        self.whole = whole
        settings, _ = resolve_settings(str(whole / "run.yaml"), ["--model_name_or_path", str(whole / "model")])
        self.settings = settings
        self.empty, _ = check_model(settings, self.config(whole / "model", 128), needs_weights=True)

    def config(self, folder: Path, length: int):
        config = load_config(str(folder))
        apply_context(config, ContextRequest(context_size=length, rope_type="linear"))
        return config

    def model(self, folder: Path) -> None:
        """As train.py and inference read a base model."""
        check_base(str(folder), self.config(folder, 128))
        self.infer(folder)

    def infer(self, folder: Path, adapter: Path | None = None) -> None:
        loaded = load_for_inference(str(folder), adapter_name_or_path=adapter and str(adapter))
        prompt = encode_prompt(loaded.tokenizer, "the fox", template=loaded.template("none"))
        options = GenerationOptions(max_new_tokens=2, do_sample=False)
        generate_text(loaded.model, loaded.tokenizer, prompt, options)

    def tokenizer(self, folder: Path) -> None:
        """As training reads a tokenizer, encodes with it and saves it."""
        tokenizer = load_tokenizer(str(folder), model_max_length=128)
        check_data(self.settings, self.empty.config, tokenizer)
        if prompt_template_for(tokenizer, None) == CHAT_TEMPLATE:
            encode_for_training(tokenizer, MESSAGES, template=CHAT_TEMPLATE)
        encode_document(tokenizer, "the fox")
        save_tokenizer(tokenizer, folder.with_name("saved"))

    def adapter(self, folder: Path) -> None:
        self.infer(self.whole / "model", folder)
        merge(str(self.whole / "model"), str(folder), folder.with_name("merged"), overwrite=True)

    def checkpoint(self, folder: Path) -> None:
        start = {CHECKPOINT: str(folder), "output_dir": str(folder.parent)}
        resume_point(self.settings.with_training(**start), self.empty)

    def token_file(self, path: Path) -> None:
        file = open_token_file(path)
        file.check_ids(320)
        assert file.num_tokens and file.sha256

    def rows(self, path: Path) -> None:
        source = open_source(str(path), "train_file", cache_dir=str(path.parent / "cache"))
        source.check(conversation_of_row if path.stem == "chat" else text_of_row)

    def comparison(self, path: Path) -> None:
        read_comparison(str(path), {}).make_trials()

    def prompts(self, path: Path) -> None:
        read_prompts(path, "--input_file")

    def yaml(self, path: Path) -> None:
        """As train.py reads its settings, up to the data."""
        settings, _ = resolve_settings(str(path), [])
        check_settings(settings)
        config, _ = load_extended_config(settings)
        check_model(settings, config, needs_weights=True)
        _, settings, _ = plan_memory(settings, config)
        build_arguments(settings)
        sources_of(settings.data, "train_file")


@pytest.fixture(scope="module")
def boundaries(root) -> Boundaries:
    return Boundaries(root)


@pytest.fixture
def copied(root, tmp_path):
    """Copy what stands at a place below `root`; returns its path."""

    def copied(place: str) -> Path:
        source, target = root / place, tmp_path / place
        if source.is_dir():
            return shutil.copytree(source, target, dirs_exist_ok=True)
        return shutil.copytree(source.parent, target.parent, dirs_exist_ok=True) / source.name

    return copied


# Boundary, what it is given, the file that is damaged, and the word that each error has.
FILES = [
    ("model", "model", "config.json", "model_name_or_path"), ("model", "model", "model.safetensors", "model"),
    ("model", "model", "generation_config.json", "model"), ("tokenizer", "model", "tokenizer.json", "tokenizer"),
    ("tokenizer", "model", "tokenizer_config.json", "tokenizer"), ("model", "sharded", INDEX, "model_name_or_path"),
    ("model", "sharded", "model-2.safetensors", "model-2"), ("model", "bin", "pytorch_model.bin", "model"),
    ("adapter", "adapter", "adapter_config.json", "adapter"), ("adapter", "adapter", "config.json", "adapter"),
    ("adapter", "adapter", "adapter_model.safetensors", "adapter"),
    *(("checkpoint", "run-of-2/checkpoint-2", name, name) for name in (
        "trainer_state.json", "run_record.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "adapter_model.safetensors",
    )),
    ("token_file", "files/ids.bin", "ids.bin", "ids.bin"), ("token_file", "files/ids.bin", "ids.bin.json", "ids.bin"),
    ("rows", "files/rows.jsonl", "rows.jsonl", "train_file"), ("rows", "files/rows.json", "rows.json", "train_file"),
    ("rows", "files/chat.jsonl", "chat.jsonl", "train_file"),
    ("rows", "files/rows.parquet", "rows.parquet", "train_file"),
    ("prompts", "files/prompts.jsonl", "prompts.jsonl", "--input_file"), ("yaml", "files/run.yaml", "run.yaml", ": "),
]  # fmt: skip


@pytest.mark.parametrize("damage", FILE_DAMAGES)
@pytest.mark.parametrize("boundary,given,name,word", FILES, ids=lambda value: str(value))
def test_a_damaged_file(boundary, given, name, word, damage, boundaries, copied):
    place = copied(given)
    file = place / name if place.is_dir() else place.with_name(name)
    FILE_DAMAGES[damage](file)
    outcome(lambda: getattr(boundaries, boundary)(place), word)


# Chat templates, and words of the error; None where the template runs.
TEMPLATES = {
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "include": ("{% include 'x' %}", "no loader"), "import": ("{% import 'x' as y %}", "no loader"),
    "extends": ("{% extends 'x' %}", "no loader"), "syntax": ("{% for %}", "end of statement"),
    "undefined": ("{{ a.b.c }}", "undefined"), "number": (5, "chat_template is 5"), "list": ([1], "tokenizer"),
    "mapping without default": ({"rag": "x"}, "chat template"), "zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "python": ("{{ ''.__class__.__mro__ }}", "__class__"), "raises": ("{{ raise_exception('no') }}", "no"),
    "range": ("{{ range(10**9) | list }}", "Range too big"), "memory": ("{{ 'x' * 10**13 }}", "MemoryError"),
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than 1 s"),
    "growth": ("{{ 'the fox ' * 2000 }}", "tokens or characters"), "a number as text": ("{{ 17 }}", None),
    "nothing": ("", None),
}  # fmt: skip


@pytest.mark.parametrize("template,word", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_that_goes_wrong(template, word, boundaries, copied, monkeypatch):
    monkeypatch.setattr("longqlora.data.prompt.MAX_TEMPLATE_SECONDS", 1)
    monkeypatch.setattr("longqlora.data.prompt.MIN_TEMPLATE_LIMIT", 2000)
    folder = copied("model")
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    said = outcome(lambda: boundaries.tokenizer(folder))
    assert said == "ran" if word is None else word in said, said


# Settings of a run that resumes, and a word of the error beside "resume_from_checkpoint".
CHANGED = [
    ({"lora_rank": 8}, "lora_rank"),
    ({"target_modules": "q_proj"}, "target_modules"),
    ({"train_embedding": True}, "train_embedding"),
    ({"train_norm": False}, "train_norm"),
    ({"finetuning_type": "full"}, "lacks model.safetensors"),
    ({"optim": "adafactor"}, "optim was"),
    ({"model_name_or_path": "wider"}, "model_name_or_path"),
]


@pytest.mark.parametrize("changes,word", CHANGED, ids=str)
def test_a_checkpoint_of_another_run_is_refused(changes, word, root, boundaries, copied, tiny_tokenizer):
    checkpoint = copied("run-of-2/checkpoint-2")
    values = {"model_name_or_path": root / "model", "resume_from_checkpoint": checkpoint, **changes}
    if changes.get("model_name_or_path"):
        wider = tiny_config(hidden_size=128, num_attention_heads=8)
        values["model_name_or_path"] = save_tiny_model(checkpoint.with_name("wider"), tiny_tokenizer, wider)
    words = [text for key, value in values.items() for text in (f"--{key}", str(value))]
    settings, _ = resolve_settings(str(root / "run.yaml"), [*words, "--output_dir", str(checkpoint.parent)])
    config, _ = load_extended_config(settings)
    model, _ = check_model(settings, config, needs_weights=True)
    assert outcome(lambda: resume_point(settings, model), CHECKPOINT, word) != "ran"


class Panic(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize(
    "error", [Panic("x" * 9999), RecursionError(), KeyError("x"), OSError("x")], ids=lambda error: type(error).__name__
)
def test_what_a_library_raises_is_one_line(error):
    with pytest.raises(ValueError, match="^flag: part of 'path' cannot be read .*; fix$") as raised:
        with reading("flag", "path", "fix", part="part of "):
            raise error
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, torch.OutOfMemoryError])
def test_what_is_no_fault_of_a_file_passes(error):
    with pytest.raises(error):
        with reading("flag", "path", "fix"):
            raise error


# What a value of a file may be: the largest and the smallest, and some beyond it.
BOUNDS = [
    (COUNT, [0, 2**63 - 1], [-1, 2**63, True, 1.0, "1"]), (POSITIVE, [1, 2**63 - 1], [0, 2**63, True]),
    (NUMBER, [0, -1.5, 10**18], [math.nan, math.inf, 1e300, 10**400, True, "1"]), (FEW, [1, 2000], [0, 2001, 10**9]),
    (RANK, [1, 2**16], [0, 2**16 + 1, 8.0]), (COUNTS, [[], [0]], [[-1], [2**63], 1]),
    (NUMBERS, [{}, {"a": 0.5}], [{"a": math.nan}, [1]]), (ROWS, [[], [{}]], [{}, [1]]),
]  # fmt: skip


@pytest.mark.parametrize("kind,within,beyond", BOUNDS)
def test_the_bounds_of_values(kind, within, beyond):
    for value in within:
        check_kinds({"x": value}, {"x": (kind, NONE)}, "place")
    for value in beyond:
        with pytest.raises(ValueError, match="^place: x is .*; correct it$"):
            check_kinds({"x": value}, {"x": (kind, NONE)}, "place")


def test_a_time_limit_ends_with_its_block():
    with pytest.raises(ValueError, match="too long"), time_limit(0.01, "too long"):
        while True:
            pass
    with time_limit(100, "too long"):
        pass
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_a_model_that_gives_no_probabilities_is_refused_when_it_samples(copied):
    folder = copied("model")
    edit_weights(folder / "model.safetensors", lambda weights: {name: w * float("nan") for name, w in weights.items()})
    loaded = load_for_inference(str(folder))
    sample = GenerationOptions(max_new_tokens=2, seed=0)
    words = ("model_name_or_path", "not finite", "--dtype")
    assert outcome(lambda: generate_text(loaded.model, loaded.tokenizer, [1, 5], sample), *words) != "ran"


@pytest.mark.parametrize("words", ["script/inference/chat.py", "script/inference/inference.py --prompt_file -"])
def test_closed_stdin(words, root, monkeypatch, capsys):
    script, *flags = words.split()
    monkeypatch.setattr("sys.stdin", None)
    flags += ["--model_name_or_path", str(root / "model")]
    code, _, error = run_main_of(load_script(script), flags, monkeypatch, capsys)
    assert code == 2 and error.startswith("error: standard input is closed"), error


CORPORA = {
    "missing": (None, "no file at"), "no text": ('{"a": 1}\n', "line 1"), "little": ('{"text": "a"}\n', "give more"),
    "no JSON": ("x\n", "line 1"), "a folder": ("", "no file at"),
}  # fmt: skip


@pytest.mark.parametrize("text,word", CORPORA.values(), ids=CORPORA)
def test_a_corpus_that_is_none(text, word, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPO / "benchmark")
    if text:
        (tmp_path / "train.jsonl").write_text(text)
    elif text == "":
        (tmp_path / "train.jsonl").mkdir()
    words = ["--corpus_dir", tmp_path, "--output_dir", tmp_path.with_name("trained")]
    script = load_script("benchmark/train_tiny_llama.py")
    code, _, error = run_main_of(script, words, monkeypatch, capsys)
    assert code == 2 and error.startswith("error: --corpus_dir: ") and word in error, error
    code, _, error = run_main_of(script, [*words, "--num_tokens", "nan"], monkeypatch, capsys)
    assert code == 2 and error.startswith("error: --num_tokens: nan"), error


# Boundary, what it is given, and the file of JSON, or of YAML, that is mutated.
FUZZED = [
    ("model", "model", "config.json"), ("adapter", "adapter", "adapter_config.json"),
    ("tokenizer", "model", "tokenizer_config.json"), ("checkpoint", "run-of-2/checkpoint-2", "trainer_state.json"),
    ("yaml", "files/run.yaml", "run.yaml"), ("rows", "files/chat.jsonl", "chat.jsonl"),
    ("model", "model", "generation_config.json"), ("model", "sharded", INDEX),
    ("token_file", "files/ids.bin", "ids.bin.json"), ("comparison", "files/compare.yaml", "compare.yaml"),
]  # fmt: skip


@pytest.mark.parametrize("count", [NUM_FAST, pytest.param(NUM_SLOW, marks=pytest.mark.slow)])
@pytest.mark.parametrize("boundary,given,name", FUZZED, ids=lambda value: str(value))
def test_random_mutations(boundary, given, name, count, boundaries, copied, tmp_path):
    place = copied(given)
    file = place / name if place.is_dir() else place.with_name(name)
    whole, ends, faults = file.read_bytes(), Counter(), {}
    for seed in range(count):
        data = mutated(whole, random.Random(f"{name} {seed}"), is_yaml=name.endswith(".yaml"))
        file.write_bytes(data)
        try:
            ends["ran" if outcome(lambda: getattr(boundaries, boundary)(place)) == "ran" else "refused"] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            last = error.__traceback__
            while last.tb_next:
                last = last.tb_next
            where = f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}"
            faults.setdefault(f"{type(error).__name__} {str(error)[:300]} at {where}", []).append(seed)
    print(f"{name}: {dict(ends)} of {count}")
    assert not faults, "\n".join(f"{len(seeds)} as seed {seeds[0]}: {fault}" for fault, seeds in faults.items())
