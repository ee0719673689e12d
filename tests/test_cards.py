"""A card is made of what it is given and of what its Trainer did, and of no file that lies beside it."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from .models import build
from .recipe_runs import load
from .test_hub import card_of, tables, trainer_of


def test_figures_of_an_older_run_in_the_folder_are_not_those_of_the_card(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"eval_accuracy": 0.999, "eval_samples": 5000}))
    Image.new("RGB", (2, 2)).save(tmp_path / "reliability_diagram.png")
    trainer = trainer_of(build("bert"), tmp_path)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    card = card_of(trainer)
    assert "5000" not in card.text and "Accuracy" not in tables(card.text)
    assert tables(card.text)["Loss"] == [f"{loss:.4g}"] and tables(card.text)["Evaluation"] == ["3"]
    assert "![" not in card.text


def test_a_card_shows_the_metrics_and_plots_that_it_is_given(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "reliability.png")
    trainer = trainer_of(build("bert"), tmp_path)
    given = {"eval_accuracy": 0.5, "eval_samples": 9}
    card = card_of(trainer, metrics=given, plots=[tmp_path / "reliability.png"])
    assert tables(card.text)["Accuracy"] == ["0.5"] and tables(card.text)["Evaluation"] == ["9"]
    assert "![Reliability](reliability.png)" in card.text
    with pytest.raises(ValueError, match=r"Expected plots in the folder of the card, .*, got '/elsewhere/a\.png'"):
        trainer.create_model_card(plots=["/elsewhere/a.png"])


def test_a_recipe_that_overwrites_a_folder_shows_its_own_figures_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load("image_classification", monkeypatch)
    (tmp_path / "plots").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "plots" / "robustness.png")
    (tmp_path / "metrics.json").write_text(json.dumps({"eval_accuracy": 0.999, "eval_samples": 5000}))
    flags = ["--max_steps", "1", "--num_hidden_layers", "1", "--consistency_weight", "0", "--max_eval_samples", "24"]
    recipe.main([*flags, "--overwrite_output_dir", "--output_dir", str(tmp_path)])
    card = ModelCard.load(tmp_path / "README.md")
    assert tables(card.text)["Evaluation"] == ["24"] and "plots/reliability.png" in card.text
    assert "robustness" not in card.text
