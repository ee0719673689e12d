"""A recipe that lacks something says in one line what, and how to get it, before it imports anything else."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .recipe_runs import RECIPES, ROOT, run


NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_that_was_copied_alone_says_so(name: str, tmp_path: Path) -> None:
    recipe = shutil.copy(RECIPES / f"{name}.py", tmp_path)
    result = run(recipe, cwd=tmp_path)
    expected = f"{recipe}: error: the folder `shared` is not beside this file: copy it along.\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)


@pytest.mark.parametrize("name", NAMES)
def test_missing_packages_are_named_with_the_command_that_installs_them(name: str, tmp_path: Path) -> None:
    # Python without site-packages.
    command = [sys.executable, "-I", "-S", RECIPES / f"{name}.py", "--output_dir", tmp_path / "out"]
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    # An isolated Python does not look beside the script, either.
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


def test_a_recipe_imports_nothing_that_it_does_not_ask_for() -> None:
    """What the recipes import is in the list that is checked, or comes with what is."""
    comes_along = {"numpy", "pyarrow", "filelock", "shared"}
    files = [*RECIPES.glob("*.py"), *(RECIPES / "shared").glob("*.py")]
    imported = {
        name
        for file in files
        for name in re.findall(r"^(?:from|import) (\w+)", file.read_text(), flags=re.MULTILINE)
        if name not in sys.stdlib_module_names
    }
    asked = set(re.findall(r'"(\w+)"', (RECIPES / "shared" / "__init__.py").read_text()))
    for file in RECIPES.glob("*.py"):
        asked |= set(re.findall(r'"(\w+)"', re.search(r"check_installed\((.*)\)", file.read_text())[1]))
    assert imported <= asked | comes_along
