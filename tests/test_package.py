"""The package as a whole: its exports and dependencies."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import hf_attentiondrop
from hf_attentiondrop.version import MINIMUM_VERSIONS


ROOT = Path(__file__).parents[1]
# Imported only where an extra is used; if it is missing, the error names it.
OPTIONAL = {"PIL", "datasets", "evaluate", "matplotlib", "optuna", "scipy", "sklearn", "sqlalchemy", "tqdm", "triton"}
OPTIONAL |= {"yaml"}


def test_tab_completion_offers_what_the_package_exports() -> None:
    offered = {name for name in dir(hf_attentiondrop) if not name.startswith("__")}
    assert offered == {name for name in hf_attentiondrop.__all__ if not name.startswith("__")}
    assert {"AttentionDropTrainer", "consistency_loss", "scale_attention_drop"} <= offered
    assert {"__doc__", "__version__"} <= set(dir(hf_attentiondrop))


@pytest.mark.parametrize("name", ["AttentionDropTrainer", "AttentionDropTrainingArguments", "ConsistencyTrainerMixin"])
def test_the_trainer_without_accelerate_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=f"{name} .* needs accelerate.*pip install accelerate"):
        getattr(hf_attentiondrop, name)
    assert hf_attentiondrop.consistency_loss


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}


def test_what_is_imported_is_declared() -> None:
    imported = set()
    for path in (ROOT / "hf_attentiondrop").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            imported |= {name.split(".")[0] for name in names}
    others = imported - set(sys.stdlib_module_names) - OPTIONAL - {"hf_attentiondrop"}
    assert others <= requirements().keys()


def test_the_oldest_versions_are_those_that_import_checks() -> None:
    for name, minimum in MINIMUM_VERSIONS.items():
        (declared,) = (part.version for part in requirements()[name].specifier if part.operator == ">=")
        assert Version(declared) == Version(minimum)


def test_the_citation_names_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hf_attentiondrop.__version__
