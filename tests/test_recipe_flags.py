"""What the flags of a recipe mean: which ones go before the others, and which have an effect."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from hf_attentiondrop import AttentionDropConfig

from .recipe_runs import load, refusal


QUICK = ["--max_steps", "1", "--max_eval_samples", "8", "--consistency_weight", "0", "--num_hidden_layers", "1"]
HARD = {"variant": "hard", "p": 0.2, "k": 3}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("text_classification", monkeypatch)


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def run_with(recipe: ModuleType, folder: Path, settings: dict[str, Any], *flags: str) -> Path:
    """Runs a recipe with a file of settings and flags over it, and gives its output folder."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    recipe.main(["--config", str(file), *QUICK, *flags, "--output_dir", str(folder / "out")])
    return folder / "out"


@pytest.mark.parametrize(
    ("settings", "flags", "expected", "left_out"),
    [
        (HARD, ["--attn_implementation", "affine_scaled"], None, "variant, p, k"),
        (HARD, ["--attn_implementation", "affine_scaled", "--p", "0.3"], {"p": 0.3}, "variant, k"),
        ({**HARD, "attn_implementation": "affine_scaled"}, [], HARD, None),
        (HARD, ["--attn_implementation", "attentiondrop", "--p", "0.3"], {**HARD, "p": 0.3}, None),
        (HARD, ["--attn_implementation", "sdpa"], None, "variant, p, k"),
        (
            {**HARD, "attn_implementation": "sdpa", "k": 5},
            ["--attn_implementation", "attentiondrop"],
            {"p": 0.2},
            None,
        ),
        (
            {"attn_implementation": "affine_scaled", "attention_reweighting": {"init": "paper"}, "p": 0.2},
            ["--attn_implementation", "attentiondrop"],
            {"p": 0.2},
            "attention_reweighting",
        ),
        (
            {"attn_implementation": "affine_scaled", "attention_reweighting": {"gate": True}},
            ["--attn_implementation", "attention_sink"],
            None,
            "attention_reweighting",
        ),
        ({**HARD, "layers": [0]}, ["--variant", "blur"], {"variant": "blur", "layers": [0]}, "p, k"),
    ],
)
def test_settings_of_a_file_are_those_of_its_method(
    recipe: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    flags: list[str],
    expected: dict[str, Any] | None,
    left_out: str | None,
) -> None:
    folder = run_with(recipe, tmp_path, settings, *flags)
    drop = None if expected is None else AttentionDropConfig(**expected)
    assert read(folder, "config.json").get("attention_drop") == (drop and drop.to_dict())
    record = yaml.safe_load((folder / "run.yaml").read_text())
    assert {name: record[name] for name in ("p", "k", "layers") if name in record} == (
        {name: value for name, value in drop.to_dict().items() if name in ("p", "k", "layers") and value is not None}
        if drop
        else {}
    )
    notes = [line for line in capsys.readouterr().err.splitlines() if ": note: " in line]
    assert len(notes) == (left_out is not None)
    if left_out is not None:
        assert f"do not apply: {left_out}. " in notes[0] and str(tmp_path / "config.yaml") in notes[0]


def test_settings_without_effect_are_refused(
    recipe: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refusal(recipe, capfd, "--attn_implementation", "sdpa", "--p", "0.3", "--output_dir", tmp_path / "out")
    assert "--p: settings of AttentionDrop need --attn_implementation attentiondrop or" in line
    assert list(tmp_path.iterdir()) == []
