"""A script whose package is missing says in one line how to install it, before anything heavy."""

import importlib.util
import runpy
import sys

import pytest
from conftest import REPO


@pytest.mark.parametrize(
    "module,extra,script,arguments",
    [
        ("gradio", "web", "script/inference/web.py", ["--model_name_or_path", "MODEL"]),
        ("lm_eval", "eval", "script/evaluate/ruler.py", ["--model_name_or_path", "MODEL", "--lengths", "512"]),
        (
            "rouge_score", "eval", "script/evaluate/longtask.py",
            ["--model_name_or_path", "MODEL", "--data_path", "ROWS", "--metric", "rougeL"],
        ),
        (
            "pypdfium2", "web", "script/inference/inference.py",
            ["--model_name_or_path", "MODEL", "--prompt", "a", "--file", "PDF"],
        ),
        ("markitdown", "web", "script/inference/chat.py", ["--model_name_or_path", "MODEL", "--file", "HTML"]),
        ("markitdown", "web", "script/data/extract_text.py", ["--input", "HTML", "--output_file", "out.jsonl"]),
    ],
)  # fmt: skip
def test_a_missing_package_is_one_line(module, extra, script, arguments, tmp_path, tiny_model_dir, monkeypatch, capsys):
    files = {
        "MODEL": tiny_model_dir, "ROWS": tmp_path / "rows.jsonl", "PDF": tmp_path / "a.pdf",
        "HTML": tmp_path / "a.html",
    }  # fmt: skip
    files["ROWS"].write_text('{"context": "c", "question": "q", "answers": ["a"]}\n')
    files["PDF"].write_bytes(b"%PDF-1.4\n")
    files["HTML"].write_text("<p>text</p>")
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else original(name, *a))
    monkeypatch.setattr(
        "longqlora.inference.load.load_for_inference", lambda *a, **k: pytest.fail("the model was loaded")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *(str(files.get(word, word)) for word in arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / script), run_name="__main__")
    errors = capsys.readouterr().err
    assert end.value.code == 2 and f"pip install -e .[{extra}]" in errors, errors
    assert "Traceback" not in errors
