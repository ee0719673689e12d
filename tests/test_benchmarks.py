"""The benchmarks run, and write tables of what they measured."""

import json
from pathlib import Path

import pytest

from .recipe_runs import ROOT, run


TRUNK = "consistency, upper half, shared trunk"
RUNS = {
    "attention": ["--cases", "growth-1024", "growth-2048", "--methods", "blur", "affine"],
    "train_step": ["--models", "marian", "--methods", "blur", TRUNK, "--layers", "2", "--batch_size", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_benchmark_writes_its_table(name: str, tmp_path: Path) -> None:
    result = run(ROOT / "benchmarks" / f"{name}.py", *RUNS[name], "--repeats", "2", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    text, results = (tmp_path / f"{name}.md").read_text(), json.loads((tmp_path / f"{name}.json").read_text())
    assert results["setup"]["command"] in text and results["setup"]["hardware"] in text
    if name == "attention":
        assert set(results["growth"]) == {"sdpa", "blur", "affine"}
        # A matrix of scores would make it 2; what a process holds from the start makes it less than 1.
        assert all(exponents["peak_mb"] < 1.4 for exponents in results["growth"].values())
        rows = results["cases"]["growth-2048"]
    else:
        rows = results["models"]["marian"]
        assert list(rows) == ["sdpa", "blur", "sdpa, no dropout", TRUNK]
    assert all(row["peak_mb"] > 0 for row in rows.values())
    assert rows["sdpa"].get("ratio", 1.0) == 1.0
