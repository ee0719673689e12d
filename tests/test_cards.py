"""A card shows the given metrics and plots and the state of its Trainer, never other files in its folder."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import BertConfig, EncoderDecoderConfig, ViTImageProcessorPil

from hf_attentiondrop import AttentionDropTrainer, DropKey, configure
from hf_attentiondrop.cli.reporting import evaluate_checkpoint
from hf_attentiondrop.hub import CardContent
from hf_attentiondrop.hub.loading import loading_code, loading_text
from hf_attentiondrop.hub.training import describe_dropout

from .models import build
from .recipe_runs import load
from .test_hub import card_of, tables, trainer_of


def test_metrics_of_an_older_run_in_the_folder_are_not_on_the_card(tmp_path: Path) -> None:
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


def test_a_card_names_an_optimizer_that_was_passed(tmp_path: Path) -> None:
    model = build("bert", dropout=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    plain = trainer_of(model, tmp_path)
    trainer = AttentionDropTrainer(
        model, plain.args, train_dataset=plain.train_dataset, optimizers=(optimizer, scheduler)
    )
    trainer.train()
    shown = tables(card_of(trainer).text)
    assert (shown["Optimizer"], shown["Learning rate"]) == (["SGD"], ["ConstantLR"])
    assert "Weight decay" not in shown


def test_a_card_counts_the_samples_that_were_evaluated(tmp_path: Path) -> None:
    trainer = trainer_of(build("bert"), tmp_path)
    trainer.evaluate(trainer.train_dataset)
    assert tables(card_of(trainer).text)["Evaluation"] == ["4"]
    trainer.evaluate()
    assert tables(card_of(trainer).text)["Evaluation"] == ["3"]


def test_a_card_keeps_evaluation_and_test_apart(tmp_path: Path) -> None:
    trainer = trainer_of(build("bert"), tmp_path)
    trainer.evaluate()
    samples = len(trainer.eval_dataset)
    trainer.evaluate([*trainer.train_dataset] * 3, metric_key_prefix="test")
    assert tables(card_of(trainer).text)["Evaluation"] == [str(samples)]


def test_a_card_takes_metrics_of_numpy_and_torch_and_plots_of_any_name(tmp_path: Path) -> None:
    trainer = trainer_of(build("bert"), tmp_path)
    (tmp_path / "plots").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "plots" / "roc (1).png")
    metrics = {"eval_accuracy": np.float32(0.9), "test_accuracy": torch.tensor(0.5)}
    trainer.create_model_card(metrics=metrics, plots=["plots/roc (1).png"])
    card = ModelCard.load(tmp_path / "README.md")
    assert tables(card.text)["Accuracy"][0] == "0.9" and "0.5" in card.text
    assert "![Roc (1)](plots/roc%20%281%29.png)" in card.text


def test_the_code_of_a_card_loads_adapted_classifiers_and_names_unknown_classes() -> None:
    content = CardContent("model", "BertForSequenceClassification", "trained", base_model="a/b", adapter="LORA")
    assert 'from_pretrained("a/b", num_labels=5, ignore_mismatched_sizes=True)' in loading_code(
        replace(content, num_labels=5)
    )
    own = CardContent("model", "OwnModel", "trained from scratch")
    assert "# Import OwnModel from the code that defines it" in loading_code(own)
    assert "import OwnModel" not in loading_code(own) and "stock Transformers" not in loading_text(own)


def test_the_dropout_of_all_parts_is_on_the_card() -> None:
    parts = BertConfig(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0), BertConfig(hidden_dropout_prob=0.2)
    described = describe_dropout(EncoderDecoderConfig.from_encoder_decoder_configs(*parts))
    assert described == "hidden_dropout_prob 0.1; attention_probs_dropout_prob 0.1, hidden_dropout_prob 0.2"
    assert describe_dropout(parts[0]) == "hidden_dropout_prob 0.1"


def test_a_card_shows_the_evaluations_of_several_data_sets(tmp_path: Path) -> None:
    trainer = trainer_of(build("bert"), tmp_path)
    trainer.eval_dataset = {"clean": trainer.train_dataset, "noisy": trainer.train_dataset[:2]}
    measured = trainer.evaluate()
    shown = tables(card_of(trainer).text)
    assert shown["Clean loss"] == [f"{measured['eval_clean_loss']:.4g}"] and "Noisy loss" in shown
    assert "Noisy runtime" not in shown and "Evaluation" not in shown


def test_a_recipe_that_overwrites_a_folder_shows_its_own_metrics_and_plots(
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


def images(folder: Path) -> Path:
    """Two classes of images, in a folder each."""
    for number in range(8):
        path = folder / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 30 * number).save(path)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT for these images whose config has an entry for AttentionDrop, and which was never trained with it."""
    folder = tmp_path_factory.mktemp("classifier")
    names = {0: "class 0", 1: "class 1"}
    model = build("vit", attention_drop={"p": 0.2}, id2label=names)
    model.save_pretrained(folder)
    grey = {"do_convert_rgb": False, "image_mean": [0.5], "image_std": [0.5]}
    ViTImageProcessorPil(size={"height": 8, "width": 8}, **grey).save_pretrained(folder)
    return folder


def evaluated(model: Path, data: Path, report: Path) -> ModelCard:
    evaluate_checkpoint(str(model), str(data), str(report))
    return ModelCard.load(report / "README.md")


def test_an_entry_of_a_saved_config_is_called_configured(classifier: Path, tmp_path: Path) -> None:
    card = evaluated(classifier, images(tmp_path / "images"), tmp_path / "report")
    assert "### AttentionDrop: hard attention masking (configured)" in card.text and "| `p` | 0.2 |" in card.text
    assert "whether its weights were trained with it is not recorded" in card.text
    assert card.data.tags == ["hf-attentiondrop"]


@pytest.mark.parametrize(
    ("layout", "described"),
    [
        ("validation", "validation"),
        ("photos/test", "photos, evaluated on the split `test`"),
        ("photos/train", "photos, evaluated on the split `train`"),
    ],
)
def test_a_split_is_named_if_the_data_has_one(classifier: Path, tmp_path: Path, layout: str, described: str) -> None:
    images(tmp_path / "images" / layout)
    card = evaluated(classifier, tmp_path / "images" / layout.split("/")[0], tmp_path / "report")
    assert f"\n## Data\n\n{described}\n" in card.text


def test_a_trained_model_is_called_perturbed_only_if_it_was(tmp_path: Path) -> None:
    model = build("bert", attention_drop={"p": 0.3})
    model.set_attn_implementation("sdpa")
    trainer = trainer_of(model, tmp_path, consistency_weight=0.0)
    trainer.train()
    assert "Method" not in card_of(trainer).text
    model.set_attn_implementation("attentiondrop")  # too late
    card = card_of(trainer)
    assert "hard attention masking (configured)" in card.text and "attentiondrop" not in card.data.tags
    trainer.train()
    model.set_attn_implementation("sdpa")  # after all was perturbed
    card = card_of(trainer)
    assert "### AttentionDrop: hard attention masking\n" in card.text and "| `p` | 0.3 |" in card.text
    assert "attentiondrop" in card.data.tags


def test_a_method_that_was_configured_after_the_training_did_not_take_part(tmp_path: Path) -> None:
    trainer = trainer_of(build("bert", attention_drop={"p": 0.3}), tmp_path, consistency_weight=0.0)
    trainer.train()
    configure(trainer.model, DropKey(p=0.4))
    trainer.model.set_attn_implementation("sdpa")
    trainer.model.set_attn_implementation("attentiondrop")
    card = card_of(trainer)
    assert "### AttentionDrop: hard attention masking\n" in card.text and "### DropKey (configured)" in card.text
    assert "attentiondrop" in card.data.tags and "dropkey" not in card.data.tags
    trainer.train()
    card = card_of(trainer)
    assert "### AttentionDrop: hard attention masking\n" in card.text and "### DropKey\n" in card.text
    configure(trainer.model, DropKey(p=0.2))
    trainer.train()
    assert card_of(trainer).text.count("### DropKey\n") == 1 and "| `p` | 0.2 |" in card_of(trainer).text


def test_a_model_trained_with_the_default_settings_names_the_method(tmp_path: Path) -> None:
    trainer = trainer_of(build("bert"), tmp_path, consistency_weight=0.0)
    trainer.train()
    card = card_of(trainer)
    assert "### AttentionDrop: hard attention masking\n" in card.text and "| `p` | 0.1 |" in card.text
    assert card.data.tags == ["hf-attentiondrop", "attentiondrop"]
