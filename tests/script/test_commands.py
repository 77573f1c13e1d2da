"""`longqlora COMMAND`: each is its script, in its process."""

import subprocess
import sys

import pytest
from conftest import REPO

from longqlora import commands


def call(*words: str) -> subprocess.CompletedProcess:
    start = [sys.executable, "-c", "from longqlora.commands import main; main()"]
    return subprocess.run([*start, *words], capture_output=True, text=True, cwd="/")


def test_installed_command_is_this_one():
    assert '[project.scripts]\nlongqlora = "longqlora.commands:main"\n' in (REPO / "pyproject.toml").read_text()
    assert all((REPO / path).is_file() for path, _ in commands.COMMANDS.values())


def test_a_command_is_its_script():
    outcome = call("plan", "--help")
    assert outcome.returncode == 0 and outcome.stdout.startswith("usage: plan_memory.py")
    outcome = call("train", "--train_args_file", "none.yaml")
    assert outcome.returncode == 2 and "--train_args_file: no file at 'none.yaml'" in outcome.stderr
    assert all(name in call("--help").stdout for name in commands.COMMANDS)


@pytest.mark.parametrize(
    ("name", "error"), [("tain", "no command 'tain'; choose from train"), ("chat", "need the checkout: clone")]
)
def test_what_is_not_there_is_one_line(monkeypatch, tmp_path, capsys, name, error):
    monkeypatch.setattr(commands, "CHECKOUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["longqlora", name])
    with pytest.raises(SystemExit, match="2"):
        commands.main()
    assert error in capsys.readouterr().err
