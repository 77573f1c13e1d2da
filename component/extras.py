"""Packages that training does not need: requirements-extras.txt."""

import importlib.util


def require_extra(module: str, package: str) -> None:
    """Raise ValueError naming the command that installs `package` where `module` cannot be imported."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this needs the package {package}: pip install -r requirements-extras.txt")
