"""The report on a saved classifier: figures, plots and a card, in a folder of their own."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..evaluation.classifier import ClassifierEvaluation, evaluate_classifier, save_plots
from ..evaluation.hub_access import check_path, offline_if_cut_off
from ..evaluation.perturbation_space import Normalization, check_attackable
from ..hub import CARD_FILE, METRICS_FILE, Data, describe_model, write_card
from .checkpoint import load_classifier
from .classes import class_numbers
from .labelled_data import labelled_batches, load_labelled


def evaluate_checkpoint(
    model_name: str,
    data_name: str,
    output_dir: str,
    *,
    split: str | None = None,
    config: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
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
        data_name: see [`~evaluation.labelled_data.load_labelled`], as for `split` and `config`.
        output_dir: folder for the report, empty or not there yet; nothing is written before all was measured.
        image_column, text_column, text_pair_column, label_column: where the data has what; by default images in
            `"image"`, texts in `"text"`, and no second texts.
        max_samples: evaluate on so many samples, drawn at random.
        batch_size: samples per batch.
        attacked_samples: see [`~evaluation.classifier.evaluate_classifier`].
        seed: of the samples and the attacks.
        device: such as `"cuda:0"`; by default the accelerator, if there is one.

    Raises:
        ValueError: for an output folder that is not empty or cannot be written, a device that is not there, and a
            model or data that do not fit.
    """
    if not output_dir:
        raise ValueError("--output_dir: expected a folder for the report, got nothing. Name one.")
    folder = Path(output_dir)
    _check_output_dir(folder)
    place = _find_device(device)
    check_path("MODEL", model_name, "a folder with a saved classifier, or a classifier on the Hub")
    with offline_if_cut_off(model_name):
        model, processor = load_classifier(model_name)
    if attacked_samples:
        check_attackable(model)
    is_text = isinstance(processor, PreTrainedTokenizerBase)
    columns = _columns(is_text, image_column, text_column, text_pair_column)
    check_path("--data", data_name, "a folder, a file, or a data set on the Hub")
    with offline_if_cut_off(data_name):
        dataset = load_labelled(data_name, split, config)
    labels = class_numbers(dataset, label_column, model.config)
    # Files come sorted by class, and attacks and attention are measured on the first samples.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:max_samples].tolist()
    batches = labelled_batches(dataset, labels, columns, model.config, processor, batch_size, order)
    model.to(place)
    normalization = None if is_text or not attacked_samples else Normalization.from_processor(processor)
    evaluation = evaluate_classifier(
        model, batches, attacked_samples=attacked_samples, normalization=normalization, seed=seed
    )
    plots = save_plots(folder, evaluation)
    # What a Trainer measures too goes by its names, here as in the record of a recipe.
    own = ("accuracy", "samples")
    metrics = {f"eval_{name}" if name in own else name: value for name, value in evaluation.metrics.items()}
    (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    drawn = len(order) if len(order) < len(dataset) else None
    data = _describe_data(data_name, config, dataset, drawn)
    name = Path(model_name).resolve().name if Path(model_name).exists() else model_name.split("/")[-1]
    content = describe_model(model, folder, metrics, name=name, processor=processor, data=data, plots=plots)
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


def _columns(is_text: bool, image: str | None, text: str | None, text_pair: str | None) -> dict[str, str]:
    """The columns that the model reads, each by its flag."""
    images, texts = {"--image_column": image}, {"--text_column": text, "--text_pair_column": text_pair}
    kind, read, ignored = ("texts", texts, images) if is_text else ("images", images, texts)
    for flag, column in ignored.items():
        if column is not None:
            raise ValueError(f"{flag}: the model classifies {kind}, and would ignore {column!r}. Leave it out.")
    first = next(iter(read))
    given = {flag: column for flag, column in read.items() if column is not None}
    return {first: kind.removesuffix("s"), **given}


def _describe_data(name: str, config: str | None, dataset: Any, drawn: int | None) -> Data:
    path, split = Path(name), str(dataset.split)
    if not path.exists():
        return Data(repo_id=name, config=config, split=split, drawn=drawn)
    # Of a path only the name: the rest is about this machine.
    return Data(path.resolve().name, split=split if _has_splits(path, dataset) else None, drawn=drawn)


def _has_splits(path: Path, dataset: Any) -> bool:
    """Whether local data has splits. `datasets` calls it `train` where it has none: a file, a folder of classes."""
    if not path.is_dir():
        return False
    return set(dataset.info.splits or ()) != {"train"} or any("train" in child.name for child in path.iterdir())


def _check_output_dir(folder: Path) -> None:
    """Refuses a folder that could not take the report, before minutes of work, and leaves nothing behind."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--output_dir: expected an empty folder or none, there is something in {str(folder)!r}.")
        parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise ValueError(
            f"--output_dir: expected a folder that the report can be written to, got {str(folder)!r}, and nothing can "
            f"be made there: {error}. Name another one."
        ) from error


def _find_device(name: str | None) -> str:
    """The device to measure on, after a look at whether it is there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if accelerator is None else accelerator.type
    numbered = [f"{kind}:{number}" for number in range(torch.accelerator.device_count())]
    devices = list(dict.fromkeys((kind, *numbered, "cpu")))
    if name is not None and name not in devices:
        raise ValueError(
            f"--device: expected one that this machine and its build of torch have, of {', '.join(devices)}, got "
            f"{name!r}."
        )
    return name or kind
