"""Installation: the instructions, the first example of the README, and the files of the wheel."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

from hf_attentiondrop import __version__, cli
from hf_attentiondrop.evaluation.metrics import load_metric
from hf_attentiondrop.evaluation.plots import training_curves
from hf_attentiondrop.hub import build_card

from .recipe_runs import ROOT
from .test_hub import content


TEXTS = (
    "*.md",
    "docs/**/*.md",
    "model_cards/*/*.md",
    "studies/*.md",
    ".github/**/*.*",
    "recipes/**/*.py",
    "recipes/**/*.yaml",
)
TEXTS += ("hf_attentiondrop/**/*.py", "hf_attentiondrop/**/*.md")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_no_text_installs_the_package_by_its_name() -> None:
    sources = [path for pattern in TEXTS for path in ROOT.glob(pattern)]
    assert len(sources) > 50
    assert [path for path in sources if re.search(r"pip install \S*hf.attentiondrop\b", path.read_text())] == []


def test_a_card_starts_with_how_to_load_learned_weights() -> None:
    text = build_card(content(needs_plugin=True)).text
    first = re.search(r"```\w+\n(.*?)\n", text)[1]
    assert first.startswith("import hf_attentiondrop")
    described = text[: text.index("```")]
    assert "the package `hf-attentiondrop`" in described and "`import hf_attentiondrop`" in described


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Builds the source distribution, and the wheel from it, without network, in a copy that keeps the clone clean."""
    source, unpacked, output = (tmp_path_factory.mktemp(name) for name in ("source", "unpacked", "dist"))
    for name in ("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_attentiondrop", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))

    def build(kind: str, folder: Path) -> Path:
        program = f"import setuptools.build_meta as backend; backend.build_{kind}({str(output)!r})"
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        [distribution] = output.glob("*.tar.gz" if kind == "sdist" else "*.whl")
        return distribution

    sdist = build("sdist", source)
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    return {"sdist": sdist, "wheel": build("wheel", next(unpacked.iterdir()))}


def test_the_wheel_holds_the_package_and_nothing_else(built: dict[str, Path]) -> None:
    with ZipFile(built["wheel"]) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        metadata = Parser().parsestr(wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))).decode())
    package = ROOT / "hf_attentiondrop"
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert sorted(names) == sorted(path.relative_to(ROOT).as_posix() for path in files)
    assert metadata["Name"] == "hf-attentiondrop" and metadata["Version"] == __version__


def test_the_source_distribution_holds_no_test(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml"} <= names
    assert [name for name in names if name.startswith("tests")] == []


def test_the_first_example_of_the_readme_runs_with_the_wheel_alone(built: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder]
    subprocess.run([*pip, built["wheel"]], check=True, timeout=300)
    environment = os.environ | {"PYTHONPATH": str(folder)}

    def output(*command: str | Path) -> str:
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
        return subprocess.run(command, check=True, **options).stdout

    example = python_blocks((ROOT / "README.md").read_text())[0] + "print(hf_attentiondrop.__file__)\n"
    printed = output(sys.executable, "-c", example)
    assert "BertForSequenceClassification: 2 of 2 attention modules are perturbed" in printed
    assert str(folder) in printed
    assert output(folder / "bin" / "hf-attentiondrop", "--version") == f"hf-attentiondrop {__version__}\n"


def test_what_is_missing_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # None in sys.modules makes an import fail.
    for module in ("datasets", "matplotlib", "matplotlib.figure", "evaluate"):
        monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["evaluate", "model", "--data", "data", "--output_dir", "report"]) == 2
    line = "hf-attentiondrop: error: evaluate needs datasets, matplotlib: `pip install datasets matplotlib`.\n"
    assert capsys.readouterr().err == line
    with pytest.raises(ImportError, match=r"`pip install matplotlib`"):
        training_curves([{"loss": 1.0, "step": 1}])
    with pytest.raises(ImportError, match=r"`pip install evaluate scikit-learn`"):
        load_metric("accuracy")
