"""serve.py: which server is started, with what; the server itself is not."""

import importlib.util

import pytest
from conftest import save_tiny_model, tiny_config
from model_folders import extended, make_adapter
from rigged_model import load_script, run_main_of

from longqlora.model.context import ContextRequest, apply_context
from longqlora.model.saved_folder import save_config

SCRIPT = "script/inference/serve.py"


@pytest.fixture
def serve(monkeypatch, capsys, tiny_tokenizer, tmp_path):
    """serve(config, *words, installed=...): exit code, the command that the process would become, stdout, stderr."""

    def run(config, *words: str, installed=("openai", "uvicorn", "fastapi")):
        started, find = [], importlib.util.find_spec
        folder = save_tiny_model(tmp_path / "model", tiny_tokenizer)
        save_config(config, folder)
        known = ("vllm", "openai", "uvicorn", "fastapi")
        found = {name: name in installed or None for name in known}
        monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: found[name] if name in found else find(name))
        monkeypatch.setattr("os.execv", lambda path, command: started.append(command))
        words = ("--model_name_or_path", str(folder), *words)
        code, out, err = run_main_of(load_script(SCRIPT), words, monkeypatch, capsys)
        return code, " ".join(started[0]) if started else "", out, err

    return run


ALL = ("openai", "uvicorn", "fastapi", "vllm")
STARTED = {
    "transformers": ("yarn", (), ALL[:3], ("serve", "--host localhost --port 8000 --dtype auto")),
    "vllm": ("yarn", (), ALL, ("vllm.entrypoints.cli.main serve", "--max-model-len 256")),
    "flags": ("yarn", ("--dtype", "fp32", "--", "--tensor-parallel-size", "2"), ALL, ("float32", "-parallel-size 2")),
    "dynamic": ("dynamic", (), ALL, ("transformers.cli", "--dtype auto")),
    "asked": ("linear", ("--server", "transformers"), ALL, ("transformers.cli",)),
}


@pytest.mark.parametrize(("rope_type", "words", "installed", "expected"), STARTED.values(), ids=STARTED)
def test_server_is_started_with_the_saved_context(serve, rope_type, words, installed, expected):
    code, command, out, _ = serve(extended(tiny_config(), 256, rope_type), *words, installed=installed)
    assert code == 0 and all(text in command for text in expected), command
    assert "with 256 tokens on http://localhost:8000/v1" in out and "no chat template" in out


def test_what_no_server_computes_is_refused(serve, tmp_path, tiny_model_dir, monkeypatch, capsys):
    config = tiny_config()
    apply_context(config, ContextRequest(context_size=256, attention="dca"))
    assert "dual chunk attention, which the servers do not compute" in serve(config)[3]
    error = serve(extended(tiny_config(), 256, "dynamic"), "--server", "vllm", installed=ALL)[3]
    assert "--server vllm: has no angles for dynamic RoPE" in error
    assert "vllm: it is not installed; pip install vllm" in serve(tiny_config(), "--server", "vllm")[3]
    assert "needs the package transformers[serving]" in serve(tiny_config(), installed=())[3]
    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    words = ("--model_name_or_path", str(adapter))
    code, _, error = run_main_of(load_script(SCRIPT), words, monkeypatch, capsys)
    assert code == 2 and "is an adapter; merge it first" in error
