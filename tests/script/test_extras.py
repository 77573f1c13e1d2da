"""A command whose package is missing says in one line how to install it, before anything heavy."""

import importlib.util

import pytest
from conftest import REPO

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
    row = '{"context": "c", "question": "q", "answers": ["a"]}\n'
    for name, text in {"rows.jsonl": row, "a.pdf": "%PDF-1.4\n", "a.html": "<p>text</p>"}.items():
        (tmp_path / name).write_text(text)
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else original(name, *a))
    monkeypatch.setattr("longqlora.inference.load.load_for_inference", lambda *a, **k: pytest.fail("it was loaded"))
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_in_process(*command.replace("MODEL", str(tiny_model_dir)).split())
    assert code == 2 and f"pip install {fix}" in errors and "Traceback" not in errors, errors
