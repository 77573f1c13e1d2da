"""Every command line explains itself, from any directory, and so does every flag of it."""

import argparse
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
