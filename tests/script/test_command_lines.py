"""Every command line explains itself and its flags, from any directory, and says which package it lacks."""

import argparse
import importlib.util
import runpy
import sys

import pytest
from conftest import REPO

SCRIPTS = [*(REPO / "script").rglob("*.py"), REPO / "train.py"]
BENCHMARKS = [path for path in (REPO / "benchmark").glob("*.py") if "ArgumentParser(" in path.read_text()]


@pytest.mark.parametrize("path", [*sorted(SCRIPTS), *sorted(BENCHMARKS)], ids=lambda path: path.stem)
def test_help_is_complete(path, tmp_path, monkeypatch, capsys):
    parsers = []
    print_help = argparse.ArgumentParser.print_help
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self: parsers.append(self) or print_help(self))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0
    (parser,) = parsers
    assert path.name in parser.description, "the description shows how to run it"
    flags = parser._option_string_actions
    for name, other in (("--model_name_or_path", "--base_model"), ("--adapter_name_or_path", "--peft_model")):
        # The comparison's adapters are in its YAML.
        if path.stem != "compare":
            assert flags.get(name) is flags.get(other), "upstream's names and transformers' mean the same"
    for action in parser._actions:
        assert action.help, f"{action.option_strings} has no help"
        is_told = action.required or action.default in (None, False, [], (), "") or "default" in action.help
        assert is_told or argparse.SUPPRESS in (action.help, action.default), f"{action.option_strings}: no default"
    assert capsys.readouterr().out.startswith("usage:")


MODEL = "--model_name_or_path MODEL"
YAML = REPO / "train_args" / "tiny-llama-sft.yaml"


@pytest.mark.parametrize(
    "module,fix,command",
    [
        ("gradio", "-e .[web]", f"script/inference/web.py {MODEL}"),
        ("lm_eval", "-e .[eval]", f"script/evaluate/ruler.py {MODEL} --lengths 512"),
        ("rouge_score", "-e .[eval]", f"script/evaluate/longtask.py {MODEL} --data_path rows.jsonl --metric rougeL"),
        ("pypdfium2", "-e .[web]", f"script/inference/inference.py {MODEL} --prompt a --file a.pdf"),
        ("markitdown", "-e .[web]", f"script/inference/chat.py {MODEL} --file a.html"),
        ("markitdown", "-e .[web]", "script/data/extract_text.py --input a.html --output_file out.jsonl"),
        ("flash_attn", "flash-attn", f"train.py --train_args_file {YAML} --use_flash_attn true --dry_run"),
    ],
)
def test_a_missing_package_is_one_line(module, fix, command, tmp_path, tiny_model_dir, monkeypatch, run_in_process):
    """Said before anything heavy."""
    row = '{"context": "c", "question": "q", "answers": ["a"]}\n'
    for name, text in {"rows.jsonl": row, "a.pdf": "%PDF-1.4\n", "a.html": "<p>text</p>"}.items():
        (tmp_path / name).write_text(text)
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else original(name, *a))
    monkeypatch.setattr("longqlora.inference.load.load_weights", lambda *a, **k: pytest.fail("it was loaded"))
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_in_process(*command.replace("MODEL", str(tiny_model_dir)).split())
    assert code == 2 and f"pip install {fix}" in errors and "Traceback" not in errors, errors
