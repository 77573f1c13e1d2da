"""A script whose package is missing says in one line how to install it, before anything heavy."""

import importlib.util

import pytest
from rigged_model import load_script, run_main_of

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
    monkeypatch.setattr("longqlora.inference.load.load_for_inference", lambda *a, **k: pytest.fail("it was loaded"))
    monkeypatch.chdir(tmp_path)
    words = [str(tiny_model_dir) if word == "MODEL" else word for word in arguments]
    code, _, errors = run_main_of(load_script(f"script/{script}"), words, monkeypatch, capsys)
    assert code == 2 and f"pip install -e .[{extra}]" in errors and "Traceback" not in errors, errors
