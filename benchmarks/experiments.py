"""Shared by the experiments: runs of recipes, and means with confidence intervals."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as t_distribution


RECIPES = Path(__file__).parents[1] / "recipes"
CONFIDENCE = 0.95


def run_recipe(name: str, folder: str, **options: Any) -> dict[str, Any]:
    """Runs a recipe without checkpoints and intermediate evaluations, and returns its metrics.

    Args:
        name (`str`): File name of the recipe, without extension.
        folder (`str`): Output folder.
        options: Flags of the recipe.
    """
    # The built-in tasks need nothing from the Hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    if str(RECIPES) not in sys.path:
        sys.path.insert(0, str(RECIPES))
    options |= {"eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "output_dir": folder}
    importlib.import_module(name).main([f"--{option}={value}" for option, value in options.items()])
    return json.loads(Path(folder, "metrics.json").read_text())


def mean_and_interval(values: list[float]) -> dict[str, float]:
    """Returns the mean and the half-width of its confidence interval (t-distribution)."""
    standard_error = np.std(values, ddof=1) / len(values) ** 0.5
    quantile = t_distribution.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return {"mean": float(np.mean(values)), "half_width": float(quantile * standard_error)}


def summarize(runs: list[dict[str, Any]], by: str, measures: list[str]) -> list[dict[str, Any]]:
    """Returns one row per value of `by`: the means of the measures, and of their per-seed differences from the first
    value."""
    groups = {run[by]: [other for other in runs if other[by] == run[by]] for run in runs}
    first = next(iter(groups.values()))
    rows = []
    for value, group in groups.items():
        row: dict[str, Any] = {by: value}
        for measure in measures:
            values, reference = ([run[measure] for run in of] for of in (group, first))
            row[measure] = mean_and_interval(values)
            if group is not first:
                row[measure]["difference"] = mean_and_interval(np.subtract(values, reference).tolist())
        rows.append(row)
    return rows


def cell(value: dict[str, float], sign: str = "", digits: int = 4) -> str:
    """Formats a mean and its interval for a table."""
    return f"{value['mean']:{sign}.{digits}f} ± {value['half_width']:.{digits}f}"


def write_results(folder: Path, name: str, results: dict[str, Any], table: str) -> None:
    """Writes the results as JSON and Markdown, and prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)
    print(table)
