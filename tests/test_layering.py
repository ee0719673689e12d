"""Layering: no module imports from a folder above its own."""

import ast
from pathlib import Path

import pytest

import hf_attentiondrop


PACKAGE = Path(hf_attentiondrop.__file__).parent
ALLOWED: dict[str, set[str]] = {
    "functional": set(),
    "validation": set(),
    "version": set(),
    "attention": {"functional"},
    "methods": {"attention", "functional", "validation"},
    "integration": {"attention", "functional", "methods", "validation", "version"},
    "configure": {"attention", "integration", "methods", "validation"},
    "report": {"attention", "integration", "methods"},
    "hub": {"attention", "methods", "report", "validation"},
    "training": {"attention", "configure", "functional", "hub", "integration", "methods", "validation"},
    "evaluation": {"attention", "integration", "validation"},
    "compare": {"evaluation", "validation"},
    "cli": {"attention", "compare", "evaluation", "hub", "integration", "methods", "report", "version"},
}


def imported(path: Path) -> set[str]:
    """Returns the folders and top-level modules of the package that a file imports."""
    floors = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth and node.module:
            floors.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_attentiondrop."):
            floors.add(node.module.split(".")[1])
    return floors


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_upward(path: Path) -> None:
    floor = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if floor == "__init__":
        return
    assert imported(path) <= ALLOWED[floor] | {floor}


def test_the_tensor_functions_need_torch_alone() -> None:
    for path in (PACKAGE / "functional").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            allowed = {"torch", "collections", "dataclasses", "functools", "math", "typing"}
            allowed |= {"triton"} if path.name == "top_scores.py" else set()
            assert {name.split(".")[0] for name in names} <= allowed, path
