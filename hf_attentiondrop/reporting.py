"""The report on a saved classifier: figures, plots and a card, in a folder of their own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .evaluation.checkpoint import class_numbers, labelled_batches, load_classifier, load_labelled
from .evaluation.classifier import ClassifierEvaluation, evaluate_classifier, save_plots
from .evaluation.perturbation_space import Normalization
from .hub import CARD_FILE, METRICS_FILE, Data, describe_model, write_card


def evaluate_checkpoint(
    model_name: str,
    data_name: str,
    output_dir: str,
    *,
    split: str | None = None,
    config: str | None = None,
    image_column: str = "image",
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    max_samples: int | None = None,
    batch_size: int = 32,
    attacked_samples: int = 0,
    seed: int = 0,
    device: str | None = None,
) -> ClassifierEvaluation:
    """Measures a saved classifier of images or texts, and writes metrics.json, plots and README.md.

    Args:
        model_name: a folder, or a model on the Hub.
        data_name: see [`~evaluation.checkpoint.load_labelled`], as for `split` and `config`.
        output_dir: folder for the report, empty or not there yet; nothing is written before all was measured.
        image_column, text_column, text_pair_column, label_column: where the data has what.
        max_samples: evaluate on so many samples, drawn at random.
        batch_size: samples per batch.
        attacked_samples: see [`~evaluation.classifier.evaluate_classifier`].
        seed: of the samples and the attacks.
        device: such as `"cuda:0"`; by default the accelerator, if there is one.

    Raises:
        ValueError: for an output folder that is not empty, and a model or data that do not fit.
        OSError: if there is no such model.
    """
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir: expected an empty folder or none, there is something in {output_dir!r}.")
    model, processor = load_classifier(model_name)
    dataset = load_labelled(data_name, split, config)
    # Files come sorted by class, and attacks and attention are measured on the first samples.
    dataset = dataset.shuffle(seed=seed)
    if max_samples is not None and max_samples < len(dataset):
        dataset = dataset.select(range(max_samples))
    is_image = hasattr(processor, "image_mean")
    columns = [image_column] if is_image else list(filter(None, (text_column, text_pair_column)))
    labels = class_numbers(dataset, label_column, model.config)
    batches = labelled_batches(dataset, labels, columns, processor, batch_size)
    model.to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    normalization = Normalization.from_processor(processor) if is_image and attacked_samples else None
    evaluation = evaluate_classifier(
        model, batches, attacked_samples=attacked_samples, normalization=normalization, seed=seed
    )
    save_plots(folder, evaluation)
    # What a Trainer measures too goes by its names, here as in the record of a recipe.
    own = ("accuracy", "samples")
    metrics = {f"eval_{name}" if name in own else name: value for name, value in evaluation.metrics.items()}
    (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    is_local = Path(data_name).exists()
    # Of a path only the name: the rest is about this machine.
    data = Data(Path(data_name).resolve().name) if is_local else Data(None, data_name, config, split)
    name = Path(model_name).resolve().name if Path(model_name).exists() else model_name.split("/")[-1]
    content = describe_model(model, folder, metrics, name=name, processor=processor, data=data)
    # The card lies beside its pictures, not beside the weights.
    write_card(replace(content, repo_id=f"path/to/{name}" if Path(model_name).exists() else model_name), folder)
    return evaluation


def summary(evaluation: ClassifierEvaluation, output_dir: str) -> str:
    """The report in a few lines."""
    metrics = evaluation.metrics
    rows: dict[str, Any] = {
        "samples": metrics["samples"],
        "accuracy": f"{metrics['accuracy']:.4f}",
        "calibration error": f"{metrics['calibration']['expected_calibration_error']:.4f}",
    }
    for name, curve in evaluation.curves.items():
        rows[f"under {name}"] = f"{curve[-1].accuracy:.4f} at epsilon {curve[-1].epsilon:.4g}"
    rows["report"] = Path(output_dir, CARD_FILE)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
