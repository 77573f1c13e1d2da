"""Packages that training does not need: the extras of pyproject.toml, pinned in requirements-extras.txt."""

import importlib.util


def require_extra(module: str, package: str, *, extra: str = "eval") -> None:
    """Raise ValueError naming the command that installs `package` where `module` cannot be imported."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this needs the package {package}: pip install -e .[{extra}]")
