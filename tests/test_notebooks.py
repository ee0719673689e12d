"""The notebooks: their code runs in order, and what is committed is the output of such a run."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import logging

from hf_attentiondrop.methods import PERTURBATIONS

from .recipe_runs import ROOT


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LARGEST_IMAGES = 400_000  # Bytes, all images of a notebook together: git keeps every version.


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 3


@pytest.fixture
def verbosity() -> Iterator[None]:
    """Notebooks silence Transformers."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("verbosity")
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes"), *sys.path])
    names: dict[str, Any] = {"__name__": "__main__"}
    with patch.dict(PERTURBATIONS):  # One notebook adds its own.
        for number, cell in enumerate(code_cells(path), start=1):
            source = "".join(cell["source"]).removeprefix("%matplotlib inline\n")
            source = re.sub(r"^EPOCHS = \d+$", "EPOCHS = 1", source, flags=re.MULTILINE)
            exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_outputs_are_those_of_one_clean_run(path: Path) -> None:
    size = 0
    for number, cell in enumerate(code_cells(path), start=1):
        assert cell["execution_count"] == number
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", output
            data = output.get("data", {})
            size += len("".join(data.get("image/png", ""))) * 3 // 4
            text = "".join(output.get("text", "")) + "".join(data.get("text/plain", ""))
            assert not re.search(r"(?<![\w.])/\w+/", text), f"an absolute path: {text}"
    assert size < LARGEST_IMAGES
