"""The package as a whole: its exports and dependencies."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import hf_attentiondrop
from hf_attentiondrop.training.card import R_DROP
from hf_attentiondrop.training.dropconnect import CITATION as DROPCONNECT
from hf_attentiondrop.version import MINIMUM_VERSIONS


ROOT = Path(__file__).parents[1]
REFERENCES = (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")
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


def test_the_citations_and_the_changelog_name_the_version() -> None:
    heading = r"^## (\S+) - (\d{4}-\d\d-\d\d)$"
    version, date = re.search(heading, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE).groups()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], str(citation["date-released"])) == (version, date)
    assert f"  version = {{{version}}},\n  year    = {{{date[:4]}}}\n" in REFERENCES
    current = Version(hf_attentiondrop.__version__)
    assert current == Version(version) or (current.is_devrelease and current > Version(version))


def test_every_paper_that_the_code_names_can_be_cited() -> None:
    page = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
    sources = [*(ROOT / "hf_attentiondrop").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    named = {number for path in sources for number in re.findall(r"arXiv (\d{4}\.\d{5})", path.read_text("utf-8"))}
    assert len(named) > 8 and named <= set(re.findall(r"https://arxiv\.org/abs/([\d.]+)\)", page))
    entries = re.findall(r"^@\w+\{(\w+),$", REFERENCES, re.MULTILINE)
    assert len(entries) == len(set(entries))
    assert set(entries) == set(re.findall(r"`(\w+)`", " ".join(re.findall(r"\| ([^|]*) \|$", page, re.MULTILINE))))
    assert R_DROP in REFERENCES and DROPCONNECT in REFERENCES
