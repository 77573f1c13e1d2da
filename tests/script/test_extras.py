"""A script whose package is missing says in one line how to install it, before anything heavy."""

import importlib.util
import runpy
import sys

import pytest
from conftest import REPO

MODEL = ["--model_name_or_path", "MODEL"]


@pytest.mark.parametrize(
    "module,extra,script,arguments",
    [
        ("gradio", "web", "inference/web.py", MODEL),
        ("lm_eval", "eval", "evaluate/ruler.py", [*MODEL, "--lengths", "512"]),
        ("rouge_score", "eval", "evaluate/longtask.py", [*MODEL, "--data_path", "rows.jsonl", "--metric", "rougeL"]),
        ("pypdfium2", "web", "inference/inference.py", [*MODEL, "--prompt", "a", "--file", "a.pdf"]),
        ("markitdown", "web", "inference/chat.py", [*MODEL, "--file", "a.html"]),
        ("markitdown", "web", "data/extract_text.py", ["--input", "a.html", "--output_file", "out.jsonl"]),
    ],
)
def test_a_missing_package_is_one_line(module, extra, script, arguments, tmp_path, tiny_model_dir, monkeypatch, capsys):
    row = '{"context": "c", "question": "q", "answers": ["a"]}\n'
    for name, text in {"rows.jsonl": row, "a.pdf": "%PDF-1.4\n", "a.html": "<p>text</p>"}.items():
        (tmp_path / name).write_text(text)
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else original(name, *a))
    loads = "longqlora.inference.load.load_for_inference"
    monkeypatch.setattr(loads, lambda *a, **k: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *(str(tiny_model_dir) if x == "MODEL" else x for x in arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / "script" / script), run_name="__main__")
    errors = capsys.readouterr().err
    assert end.value.code == 2 and f"pip install -e .[{extra}]" in errors, errors
    assert "Traceback" not in errors
