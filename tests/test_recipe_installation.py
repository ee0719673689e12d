"""A recipe with missing packages or files exits with one line that says how to get them, before other imports."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .recipe_runs import RECIPES, ROOT, run


NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_copied_without_its_shared_code(name: str, tmp_path: Path) -> None:
    recipe = shutil.copy(RECIPES / f"{name}.py", tmp_path)
    result = run(recipe, cwd=tmp_path)
    expected = f"{recipe}: error: the folder `shared` must be next to this file: copy it too.\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)


@pytest.mark.parametrize("name", NAMES)
def test_missing_packages_are_named_with_the_command_that_installs_them(name: str, tmp_path: Path) -> None:
    # Python without site-packages.
    command = [sys.executable, "-I", "-S", RECIPES / f"{name}.py", "--output_dir", tmp_path / "out"]
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    # Isolated Python does not put the folder of the script on the path, either.
    assert result.returncode == 2 and "`shared`" in result.stderr

    script = f"import sys; sys.path.insert(0, {str(RECIPES)!r}); sys.argv = ['{name}.py']; import {name}"
    command = [sys.executable, "-I", "-S", "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    match = re.fullmatch(
        rf"{name}\.py: error: not installed: (.*)\. Run `pip install -e '\.\[recipes\]'` in {ROOT}\.\n", result.stderr
    )
    assert result.returncode == 2 and result.stdout == ""
    assert match, result.stderr
    missing = set(match[1].split(", "))
    own = {"causal_lm": {"peft"}, "image_classification": {"PIL", "sklearn"}, "translation": {"sacrebleu", "babel"}}
    assert {"torch", "transformers", "accelerate", "datasets", "matplotlib"} | own.get(name, set()) <= missing


def test_every_import_is_checked() -> None:
    """Every import of the recipes is checked by `check_installed`, or is a dependency of one that is."""
    dependencies = {"numpy", "pyarrow", "filelock", "shared"}
    files = [*RECIPES.glob("*.py"), *(RECIPES / "shared").glob("*.py")]
    imported = {
        name
        for file in files
        for name in re.findall(r"^(?:from|import) (\w+)", file.read_text(), flags=re.MULTILINE)
        if name not in sys.stdlib_module_names
    }
    checked = set(re.findall(r'"(\w+)"', (RECIPES / "shared" / "__init__.py").read_text()))
    for file in RECIPES.glob("*.py"):
        checked |= set(re.findall(r'"(\w+)"', re.search(r"check_installed\((.*)\)", file.read_text())[1]))
    assert imported <= checked | dependencies
