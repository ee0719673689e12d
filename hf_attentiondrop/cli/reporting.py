"""The report on a saved classifier: metrics.json, plots and a model card in a new folder."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..evaluation.classifier import ClassifierEvaluation, evaluate_classifier, save_plots
from ..evaluation.hub_access import check_path, offline_if_cut_off
from ..evaluation.perturbation_space import Normalization, check_attackable
from ..evaluation.sample_maps import map_first_sample
from ..hub import CARD_FILE, METRICS_FILE, Data, describe_model, write_card
from .checkpoint import load_classifier
from .classes import class_numbers
from .flags import naming_flag
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
    epsilon: float | None = None,
    seed: int = 0,
    device: str | None = None,
) -> ClassifierEvaluation:
    """Measures a saved image or text classifier and writes metrics.json, plots and README.md.

    Args:
        model_name (`str`): a folder, or a model on the Hub.
        data_name (`str`), split, config (`str`, *optional*): see [`~labelled_data.load_labelled`].
        output_dir (`str`): folder for the report, empty or missing; written only after everything was measured.
        image_column, text_column, text_pair_column (`str`, *optional*), label_column (`str`, defaults to `"label"`):
            columns of the data; by default images in `"image"`, texts in `"text"`, and no second texts.
        max_samples (`int`, *optional*): size of a random subset to evaluate on.
        batch_size (`int`, defaults to 32): samples per batch.
        attacked_samples (`int`, defaults to 0), epsilon (`float`, *optional*):
            see [`~evaluation.classifier.evaluate_classifier`].
        seed (`int`, defaults to 0): for the order of samples and the attacks.
        device (`str`, *optional*): such as `"cuda:0"`; defaults to the accelerator, or the CPU if there is none.

    Raises:
        ValueError: for an output folder that is not empty or not writable, a device that does not exist, and a model
            and data that do not fit. The message starts with the flag.
    """
    if not output_dir:
        raise ValueError("--output_dir: expected a folder for the report, got nothing. Name one.")
    folder = Path(output_dir)
    _check_output_dir(folder)
    device = _find_device(device)
    with naming_flag("MODEL"):
        check_path(model_name, "a folder with a saved classifier, or a classifier on the Hub")
        with offline_if_cut_off(model_name):
            model, processor = load_classifier(model_name)
    if attacked_samples:
        with naming_flag("--evaluate_robustness"):
            check_attackable(model)
    is_text = isinstance(processor, PreTrainedTokenizerBase)
    columns = _columns(is_text, image_column, text_column, text_pair_column)
    with naming_flag("--data"):
        check_path(data_name, "a folder, a file, or a data set on the Hub")
    with offline_if_cut_off(data_name):
        dataset = load_labelled(data_name, split, config)
    with naming_flag("--label_column"):
        labels = class_numbers(dataset, label_column, model.config)
    # Files are sorted by class, and attacks and attention are measured on the first samples.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:max_samples].tolist()
    batches = labelled_batches(dataset, labels, columns, model.config, processor, batch_size, order)
    model.to(device)
    normalization = None if is_text or not attacked_samples else Normalization.from_processor(processor)
    evaluation = evaluate_classifier(
        model,
        batches,
        attacked_samples=attacked_samples,
        epsilon=epsilon,
        normalization=normalization,
        seed=seed,
    )
    ((_, most_frequent),) = Counter(labels[row] for row in order).most_common(1)
    evaluation = replace(evaluation, metrics={"majority_accuracy": most_frequent / len(order), **evaluation.metrics})
    plots = save_plots(folder, evaluation, sample=map_first_sample(model, batches, processor))
    # Metrics that a Trainer reports too have the same names, here and in the metrics.json of a recipe.
    prefixed = ("accuracy", "samples")
    metrics = {f"eval_{name}" if name in prefixed else name: value for name, value in evaluation.metrics.items()}
    (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    subset = len(order) if len(order) < len(dataset) else None
    data = _describe_data(data_name, config, dataset, subset)
    name = Path(model_name).resolve().name if Path(model_name).exists() else model_name.split("/")[-1]
    content = describe_model(model, folder, metrics, name=name, processor=processor, data=data, plots=plots)
    # The card is not in the folder of the weights, so it names the path that they are loaded from.
    write_card(replace(content, repo_id=f"path/to/{name}" if Path(model_name).exists() else model_name), folder)
    return evaluation


def summarize(evaluation: ClassifierEvaluation, output_dir: str) -> str:
    """A summary of the report in a few lines."""
    metrics = evaluation.metrics
    rows: dict[str, Any] = {
        "samples": metrics["samples"],
        "accuracy": f"{metrics['accuracy']:.4f} (always the most frequent class: {metrics['majority_accuracy']:.4f})",
        "calibration error": f"{metrics['calibration']['expected_calibration_error']:.4f}",
    }
    for name, curve in evaluation.curves.items():
        rows[f"under {name}"] = f"{curve[-1].accuracy:.4f} at epsilon {curve[-1].epsilon:.4g}"
    rows["report"] = Path(output_dir, CARD_FILE)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _columns(is_text: bool, image: str | None, text: str | None, text_pair: str | None) -> dict[str, str]:
    """Flag to column, for the columns that the model reads."""
    images, texts = {"--image_column": image}, {"--text_column": text, "--text_pair_column": text_pair}
    kind, read, ignored = ("texts", texts, images) if is_text else ("images", images, texts)
    for flag, column in ignored.items():
        if column is not None:
            raise ValueError(f"{flag}: the model classifies {kind}, and would ignore {column!r}. Leave it out.")
    first = next(iter(read))
    given = {flag: column for flag, column in read.items() if column is not None}
    return {first: kind.removesuffix("s"), **given}


def _describe_data(name: str, config: str | None, dataset: Any, subset: int | None) -> Data:
    path, split = Path(name), str(dataset.split)
    if not path.exists():
        return Data(repo_id=name, config=config, split=split, subset=subset)
    # Only the last part of a path: the rest concerns this machine.
    return Data(path.resolve().name, split=split if _has_splits(path, dataset) else None, subset=subset)


def _has_splits(path: Path, dataset: Any) -> bool:
    """Whether local data has splits; `datasets` calls the data of a file or a folder of classes `train`."""
    if not path.is_dir():
        return False
    return set(dataset.info.splits or ()) != {"train"} or any("train" in child.name for child in path.iterdir())


def _check_output_dir(folder: Path) -> None:
    """Checks that the report can be written, before minutes of work, and leaves nothing behind."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"--output_dir: expected an empty folder or none, there is something in {str(folder)!r}. Name another "
                "one."
            )
        parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise ValueError(
            f"--output_dir: expected a writable folder for the report, got {str(folder)!r}: {error}. Name another one."
        ) from error


def _find_device(name: str | None) -> str:
    """The device to measure on, checked to exist."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if accelerator is None else accelerator.type
    numbered = [f"{kind}:{number}" for number in range(torch.accelerator.device_count())]
    devices = list(dict.fromkeys((kind, *numbered, "cpu")))
    if name is not None and name not in devices:
        raise ValueError(
            f"--device: expected a device of this machine and its build of torch, one of {', '.join(devices)}, got "
            f"{name!r}."
        )
    return name or kind
