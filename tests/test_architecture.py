"""The house rules that a machine can check: imports run one way, files stay short, nothing is pickled."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
LIBRARY = REPO / "component"
COMPONENTS = sorted(LIBRARY.rglob("*.py"))
SCRIPTS = [REPO / "train.py", *sorted((REPO / "script").rglob("*.py")), *sorted((REPO / "benchmark").rglob("*.py"))]
SOURCES = COMPONENTS + SCRIPTS
REQUIREMENTS = ("requirements.txt", "requirements-extras.txt")
# From the lowest: a file imports from its own room and from those before it. GROUND: files that stand in no room.
GROUND = "component"
ROOMS = (GROUND, "settings", "attention", "model", "memory", "data", "training", "inference", "evaluation")
HUGGING_FACE = {"transformers", "peft", "bitsandbytes", "deepspeed", "datasets", "accelerate"}


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO))


def imports_of(path: Path) -> set[str]:
    """Full names of all modules a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def local_imports(path: Path) -> set[Path]:
    """Files of the library that a file imports."""
    names = [name.split(".")[1:] for name in imports_of(path) if name.startswith("longqlora.")]
    return {file for parts in names if (file := LIBRARY.joinpath(*parts).with_suffix(".py")).is_file()}


def room_of(path: Path) -> str:
    parts = path.relative_to(LIBRARY).parts
    return parts[0] if len(parts) > 1 else GROUND


def test_every_folder_is_a_room_and_is_installed():
    """A new folder gets its place in ROOMS, and in pyproject.toml, without which it is left out of a wheel."""
    packages = {path.parent.relative_to(LIBRARY) for path in LIBRARY.rglob("*.py")}
    assert {package.parts[0] for package in packages if package.parts} | {GROUND} == set(ROOMS)
    text = (REPO / "pyproject.toml").read_text()
    listed = set(re.findall(r'^    "(longqlora[\w.]*)",$', text, flags=re.MULTILINE))
    assert listed == {".".join(["longqlora", *package.parts]) for package in packages}


@pytest.mark.parametrize("path", COMPONENTS, ids=name_of)
def test_rooms_import_one_way(path):
    upward = {name_of(p) for p in local_imports(path) if ROOMS.index(room_of(p)) > ROOMS.index(room_of(path))}
    assert not upward, f"{name_of(path)} imports from a room above its own"


def test_the_picture_of_the_rooms_is_current():
    subprocess.run([sys.executable, REPO / "docs" / "draw_rooms.py", "--check"], check=True)


def test_component_imports_have_no_cycle():
    graph = {path: local_imports(path) for path in COMPONENTS}
    done: set[Path] = set()
    while graph.keys() - done:
        ready = {path for path, needs in graph.items() if path not in done and needs <= done}
        assert ready, f"import cycle among {sorted(map(name_of, graph.keys() - done))}"
        done |= ready


@pytest.mark.parametrize("path", COMPONENTS, ids=name_of)
def test_component_never_imports_upward(path):
    assert not {name for name in imports_of(path) if name.split(".")[0] in ("script", "benchmark", "train", "tests")}


def knows_hugging_face(path: Path) -> bool:
    return bool({name.split(".")[0] for name in imports_of(path)} & HUGGING_FACE)


PURE = [p for p in COMPONENTS if "Pure maths" in (ast.get_docstring(ast.parse(p.read_text(encoding="utf-8"))) or "")]


@pytest.mark.parametrize("path", PURE, ids=name_of)
def test_pure_maths_knows_nothing_of_hugging_face(path):
    """What a file's docstring calls pure holds for all that it imports."""
    seen, todo = set(), [path]
    while todo:
        seen.add(todo.pop())
        todo += [p for file in seen for p in local_imports(file) if p not in seen]
    assert not [name_of(p) for p in seen if knows_hugging_face(p)]


def test_one_file_binds_attention_to_transformers():
    users = [
        name_of(p)
        for p in SOURCES
        if {"transformers.AttentionInterface", "transformers.AttentionMaskInterface"} & imports_of(p)
    ]
    assert users == ["component/attention/binding.py"]


def test_scripts_never_import_each_other():
    stems = {path.stem for path in SCRIPTS}
    for path in SCRIPTS:
        siblings = {p.stem for p in path.parent.glob("*.py")} if path.parent.name == "benchmark" else set()
        assert not (imports_of(path) & (stems - siblings - {"evaluation"})), path


EXTRA_MODULES = {"lm_eval", "rouge_score", "pypdfium2", "markitdown", "gradio", "playwright"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_extra_packages_are_imported_inside_functions(path):
    """Training and `import longqlora.x` work without requirements-extras.txt."""
    top = {
        name.split(".")[0]
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert not top & EXTRA_MODULES


def test_flash_attn_is_imported_in_one_place_inside_a_function():
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert "flash_attn" not in "".join(ast.unparse(node) for node in top), path


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_is_short_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450, "more than one noun lives here"
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert "utils" not in path.stem


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_pickled_or_left_undone(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(import pickle|pickle\.load|torch\.save\()", text)
    assert not re.search(r"torch\.load\((?!.*weights_only=True)", text)
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError", text)


def test_every_requirement_is_used():
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES + sorted((REPO / "tests").rglob("*.py")))
    names = {
        "pyyaml": "yaml",
        "ruff": None,
        "pytest": "pytest",
        "protobuf": None,
        "sentencepiece": None,
        "accelerate": None,
        "-e": None,
        "lm-eval": "lm_eval",
        "rouge-score": "rouge_score",
    }
    lines = [line for name in REQUIREMENTS for line in (REPO / name).read_text().splitlines()]
    for line in lines:
        package = re.match(r"[a-zA-Z0-9_-]+", line)
        module = names.get(package[0], package[0]) if package else None
        assert module is None or re.search(rf"\b{module}\b", text), f"{package[0]} is pinned and not used"
