"""The house rules that a machine can check: imports run one way, files stay short, nothing is pickled."""

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
COMPONENTS = sorted((REPO / "component").glob("*.py"))
SCRIPTS = [REPO / "train.py", *sorted((REPO / "script").rglob("*.py")), *sorted((REPO / "benchmark").rglob("*.py"))]
SOURCES = COMPONENTS + SCRIPTS
REQUIREMENTS = ("requirements.txt", "requirements-extras.txt")
PURE = [
    "attention_kernels",
    "merged_attention",
    "dual_chunk_attention",
    "shift_short_attention",
    "rope_scaling",
    "context_request",
    "perplexity",
    "loss",
    "adapted_linear",
    "attention_pieces",
    "tiled_norm",
    "device_memory",
    "host_offload",
    "segments",
]


def imports_of(path: Path) -> set[str]:
    """Full names of all modules a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def local_imports(path: Path) -> set[str]:
    names = {path.stem for path in COMPONENTS}
    return {
        name.split(".")[1] for name in imports_of(path) if name.startswith("component.") and name.split(".")[1] in names
    }


def test_component_imports_have_no_cycle():
    graph = {path.stem: local_imports(path) for path in COMPONENTS}
    done: set[str] = set()
    while graph.keys() - done:
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"import cycle among {sorted(graph.keys() - done)}"
        done |= ready


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda path: path.stem)
def test_component_never_imports_upward(path):
    assert not {name for name in imports_of(path) if name.split(".")[0] in ("script", "benchmark", "train", "tests")}


@pytest.mark.parametrize("name", PURE)
def test_pure_maths_knows_nothing_of_hugging_face(name):
    modules = {n.split(".")[0] for n in imports_of(REPO / "component" / f"{name}.py")}
    assert not modules & {"transformers", "peft", "bitsandbytes", "deepspeed", "datasets", "accelerate"}
    assert local_imports(REPO / "component" / f"{name}.py") <= set(PURE)


def test_one_file_binds_attention_to_transformers():
    users = [
        p.stem
        for p in SOURCES
        if {"transformers.AttentionInterface", "transformers.AttentionMaskInterface"} & imports_of(p)
    ]
    assert users == ["attention"]


def test_scripts_never_import_each_other():
    stems = {path.stem for path in SCRIPTS}
    for path in SCRIPTS:
        siblings = {p.stem for p in path.parent.glob("*.py")} if path.parent.name == "benchmark" else set()
        assert not (imports_of(path) & (stems - siblings - {"evaluation"})), path


EXTRA_MODULES = {"lm_eval", "rouge_score", "pypdf", "bs4", "markdown_it", "gradio", "playwright"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_extra_packages_are_imported_inside_functions(path):
    """Training and `import component.x` work without requirements-extras.txt."""
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_file_is_short_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450, "more than one noun lives here"
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert "utils" not in path.stem


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_nothing_is_pickled_or_left_undone(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(import pickle|pickle\.load|torch\.save\()", text)
    assert not re.search(r"torch\.load\((?!.*weights_only=True)", text)
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError", text)


def test_every_requirement_is_used():
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES + sorted((REPO / "tests").glob("*.py")))
    names = {
        "pyyaml": "yaml",
        "ruff": None,
        "pytest": "pytest",
        "protobuf": None,
        "sentencepiece": None,
        "accelerate": None,
        "cryptography": None,
        "lm-eval": "lm_eval",
        "rouge-score": "rouge_score",
        "beautifulsoup4": "bs4",
        "markdown-it-py": "markdown_it",
    }
    lines = [line for name in REQUIREMENTS for line in (REPO / name).read_text().splitlines()]
    for line in lines:
        package = re.match(r"[a-zA-Z0-9_-]+", line)
        module = names.get(package[0], package[0]) if package else None
        assert module is None or re.search(rf"\b{module}\b", text), f"{package[0]} is pinned and not used"
