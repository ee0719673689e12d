"""The house has floors: nothing imports upward."""

import ast
from pathlib import Path

import pytest

import hf_attentiondrop


PACKAGE = Path(hf_attentiondrop.__file__).parent
ALLOWED = {
    "functional": set(),
    "version": set(),
    "losses": set(),
    "dropout": set(),
    "configuration": {"functional"},
    "config_entries": {"configuration", "version"},
    "reweighting_configuration": {"config_entries", "configuration", "functional"},
    "parts": set(),
    "places": set(),
    "sites": {"config_entries", "configuration", "parts", "places"},
    "kernels": {"functional"},
    "base": {"functional", "kernels", "sites"},
    "blur": {"base", "configuration", "functional", "sites"},
    "hard": {"base", "configuration", "functional", "sites"},
    "attention": {"base", "blur", "configuration", "functional", "hard", "sites"},
    "reweighting": {"base", "functional", "reweighting_configuration"},
    "implementations": {"attention", "configuration", "parts", "reweighting_configuration", "sites"},
    "switching": {"implementations", "parts"},
    "attach": {"implementations", "parts", "reweighting", "reweighting_configuration", "sites"},
    "support": {"attention", "sites"},
    "generation": {"attention", "sites"},
    "registration": {
        "attach",
        "attention",
        "config_entries",
        "configuration",
        "generation",
        "implementations",
        "parts",
        "reweighting_configuration",
        "sites",
        "support",
        "switching",
    },
    "settings": {
        "attention",
        "config_entries",
        "configuration",
        "implementations",
        "kernels",
        "parts",
        "sites",
        "switching",
    },
    "report": {"attention", "settings", "sites"},
    "doubling": set(),
    "label_shift": set(),
    "consistency": {"label_shift", "losses"},
    "recording": {"consistency"},
    "training_args": {"losses"},
    "evaluation": {"configuration", "parts", "registration", "settings", "sites"},
    "hub": {
        "configuration",
        "dropout",
        "losses",
        "settings",
        "report",
        "reweighting_configuration",
        "sites",
        "training_args",
    },
    "reporting": {"evaluation", "hub"},
    "cli": {
        "attention",
        "config_entries",
        "configuration",
        "evaluation",
        "parts",
        "registration",
        "report",
        "reporting",
        "sites",
        "version",
    },
    "trainer": {
        "consistency",
        "doubling",
        "hub",
        "losses",
        "recording",
        "registration",
        "sites",
        "training_args",
    },
}


def imported(path: Path) -> set[str]:
    """The package's own modules that a file imports, by the name of their floor."""
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
