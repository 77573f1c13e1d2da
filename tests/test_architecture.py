"""The house rules that a machine can check: imports run one way, files stay short, nothing is pickled."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
LIBRARY = REPO / "component"
COMPONENTS = sorted(LIBRARY.rglob("*.py"))
SCRIPTS = [REPO / "train.py", *sorted((REPO / "script").rglob("*.py")), *sorted((REPO / "benchmark").rglob("*.py"))]
SOURCES = COMPONENTS + SCRIPTS
# From the lowest: a file imports from its own room and from those before it. GROUND: files that stand in no room.
GROUND = "component"
ROOMS = (GROUND, "settings", "attention", "model", "memory", "data", "training", "inference", "evaluation")
ABOVE_ALL_ROOMS = {"script", "benchmark", "train", "tests"}
HUGGING_FACE = {"transformers", "peft", "bitsandbytes", "deepspeed", "datasets", "accelerate"}
# Training and `import longqlora.x` work without them.
EXTRA_MODULES = {"flash_attn", "lm_eval", "rouge_score", "pypdfium2", "markitdown", "gradio", "playwright"}
# What a requirement is imported as, where that is not its name; None: a command, or what other packages import.
MODULES = {"pyyaml": "yaml", **dict.fromkeys(("ruff", "protobuf", "sentencepiece", "pytest-xdist"))}


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO))


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def names_imported_by(nodes: Iterable[ast.AST]) -> set[str]:
    """Full names of the modules, and of what is taken from them."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def imports_of(path: Path) -> set[str]:
    """What a file imports, also inside functions."""
    return names_imported_by(ast.walk(tree_of(path)))


@functools.cache
def local_imports(path: Path) -> set[Path]:
    """Files of the library that a file imports."""
    names = [name.split(".")[1:] for name in imports_of(path) if name.startswith("longqlora.")]
    return {file for parts in names if (file := LIBRARY.joinpath(*parts).with_suffix(".py")).is_file()}


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def room_of(path: Path) -> str:
    parts = path.relative_to(LIBRARY).parts
    return parts[0] if len(parts) > 1 else GROUND


def test_every_folder_is_a_room_and_is_installed():
    """A new folder gets its place in ROOMS, and in pyproject.toml, without which it is left out of a wheel."""
    folders = {path.parent.relative_to(LIBRARY) for path in COMPONENTS}
    assert {folder.parts[0] for folder in folders if folder.parts} | {GROUND} == set(ROOMS)
    listed = set(re.findall(r'^    "(longqlora[\w.]*)",$', text_of(REPO / "pyproject.toml"), flags=re.MULTILINE))
    assert listed == {".".join(["longqlora", *folder.parts]) for folder in folders}


def test_rooms_import_one_way():
    height = {path: ROOMS.index(room_of(path)) for path in COMPONENTS}
    arrows = [(path, other) for path in COMPONENTS for other in local_imports(path)]
    assert not [f"{name_of(a)} imports {name_of(b)}" for a, b in arrows if height[b] > height[a]]
    assert not [name_of(path) for path in COMPONENTS if packages(imports_of(path)) & ABOVE_ALL_ROOMS]
    TopologicalSorter({path: local_imports(path) for path in COMPONENTS}).prepare()


def test_the_picture_of_the_rooms_is_current():
    subprocess.run([sys.executable, REPO / "docs" / "draw_rooms.py", "--check"], check=True)


def test_pure_maths_knows_nothing_of_hugging_face():
    """What a file's docstring calls pure holds for all that it imports."""
    for path in COMPONENTS:
        if "Pure maths" in ast.get_docstring(tree_of(path)):
            seen, todo = set(), {path}
            while todo:
                seen |= todo
                todo = {other for file in todo for other in local_imports(file)} - seen
            assert not [name_of(p) for p in seen if packages(imports_of(p)) & HUGGING_FACE], f"below {name_of(path)}"


def test_one_file_binds_attention_to_transformers():
    registries = {"transformers.AttentionInterface", "transformers.AttentionMaskInterface"}
    assert [name_of(p) for p in SOURCES if registries & imports_of(p)] == ["component/attention/binding.py"]


def test_scripts_never_import_each_other():
    stems = {path.stem for path in SCRIPTS}
    for path in SCRIPTS:
        siblings = {p.stem for p in path.parent.glob("*.py")} if path.parent.name == "benchmark" else set()
        assert not (imports_of(path) & (stems - siblings - {"evaluation"})), path


def test_extra_packages_are_imported_inside_functions():
    assert not [name_of(p) for p in SOURCES if packages(names_imported_by(tree_of(p).body)) & EXTRA_MODULES]


def test_a_file_is_short_and_says_what_it_is_and_leaves_nothing_undone():
    banned = r"\b(import pickle|pickle\.load|torch\.save\()|torch\.load\((?!.*weights_only=True)"
    undone = r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError"
    faults = {
        "more than one noun lives here": lambda path: len(text_of(path).splitlines()) > 450,
        "no module docstring": lambda path: not ast.get_docstring(tree_of(path)),
        "a name that says nothing": lambda path: "utils" in path.stem,
        "pickled or left undone": lambda path: re.search(f"{banned}|{undone}", text_of(path)),
    }
    assert not [f"{name_of(path)}: {fault}" for path in SOURCES for fault, found in faults.items() if found(path)]


def test_every_requirement_is_used():
    text = "\n".join(map(text_of, [*SOURCES, *(REPO / "tests").rglob("*.py")]))
    for file in ("requirements.txt", "requirements-extras.txt"):
        for package in re.findall(r"^[a-zA-Z][\w-]*", text_of(REPO / file), flags=re.MULTILINE):
            module = MODULES.get(package, package.replace("-", "_"))
            assert module is None or re.search(rf"\b{module}\b", text), f"{package} is pinned and not used"
