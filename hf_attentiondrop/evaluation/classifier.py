"""Accuracy, calibration, robustness and attention of a classifier, as metrics and as plots."""

import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.parts import transformers_model
from ..validation import is_number
from .adversarial import RobustAccuracy, robustness_curve
from .attack import Attack
from .calibration import (
    ReliabilityBins,
    calibration_metrics,
    is_optimal,
    optimal_temperature,
    reliability,
)
from .diagnostics import AttentionStatistics, attention_statistics
from .items import IGNORE_INDEX, check_not_empty
from .perturbation_space import Normalization
from .running import check_batches, first_samples, labelled_samples, mode, random_state_kept, to_device_of
from .sample_maps import SampleMaps


logger = logging.getLogger(__name__)

PLOTS_FOLDER = "plots"
# Attention weights are large, and their means converge quickly.
ATTENTION_SAMPLES = 128
PIXEL_EPSILON = 8 / 255
EMBEDDING_EPSILON = 0.1  # Standard deviations of the embeddings.
# Fractions of the largest epsilon.
EPSILON_FRACTIONS = (0.0, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class ClassifierEvaluation:
    """Measurements of a classifier.

    Args:
        metrics: all metrics, in JSON types: `accuracy`, `samples`, `calibration`, and if measured, `robustness` and
            `attention`.
        bins: confidence and accuracy of the samples.
        curves: name of the attack to robust accuracies, by epsilon; empty without attacks.
        attention: stack to statistics; empty if the model returns no attention weights.
    """

    metrics: dict[str, Any]
    bins: ReliabilityBins
    curves: dict[str, tuple[RobustAccuracy, ...]]
    attention: dict[str, AttentionStatistics]


def evaluate_classifier(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    attacked_samples: int = 0,
    epsilon: float | None = None,
    normalization: Normalization | None = None,
    seed: int = 0,
) -> ClassifierEvaluation:
    """Measures an image or text classifier on labelled data, in evaluation mode.

    Calibration after temperature scaling is cross-fitted: the temperature for the even samples is fitted on the odd
    ones and vice versa, so no sample is measured at a temperature that it was used to fit. It is omitted if a half of
    the samples has no optimal temperature. The reported temperature is fitted on all samples, and omitted if they have
    none.

    Attention is measured on the first 128 samples, regardless of the batch size.

    Robustness is measured under FGSM and under PGD with 10 and 20 steps, in the L∞ norm, at a quarter, half and all of
    `epsilon`.

    Args:
        model (`torch.nn.Module`): a Transformers model with one label per sample, or a wrapper around one.
        batches (`Iterable[Mapping[str, Any]]`): inputs with `labels`; a re-iterable, such as a `DataLoader`.
        attacked_samples (`int`, defaults to 0):
            Number of samples to attack, the first ones. Each takes about 35 forward and backward passes for each of
            three epsilons.
        epsilon (`float`, *optional*):
            Bound of the strongest attack: for images a share of the pixel range, by default 8/255; for texts in
            standard deviations of the embeddings, by default 0.1.
        normalization (`Normalization`, *optional*): of the images; required to attack images.
        seed (`int`, defaults to 0): of the random starts; torch's random state does not change.

    Raises:
        ValueError: for no data, an invalid `epsilon`, unsuitable labels or logits, and see
            [`~evaluation.adversarial.attack_batch`].
        TypeError: for a single batch, or an iterator.
    """
    check_batches(batches, many_times=True)
    if epsilon is not None and not (attacked_samples > 0 and is_number(epsilon) and 0 < epsilon < math.inf):
        raise ValueError(
            "`epsilon` bounds the strongest attack, so it needs `attacked_samples` and must be a finite number above "
            f"0, got {epsilon!r} and {attacked_samples} samples."
        )
    if epsilon is not None and epsilon > 1 and "pixel_values" in next(iter(batches), {}):
        raise ValueError(
            f"`epsilon` must be at most 1 for images, got {epsilon}: it is a share of the pixel range. Divide a bound "
            "in steps of 8 bits by 255."
        )
    logits, labels = predict(model, batches)
    is_labelled = labels != IGNORE_INDEX
    logits, labels = logits[is_labelled], labels[is_labelled]
    check_not_empty(len(labels))
    scores = {"accuracy": (logits.argmax(-1) == labels).double().mean().item(), "samples": len(labels)}
    calibration: dict[str, Any] = calibration_metrics(logits, labels)
    if is_optimal(temperature := optimal_temperature(logits, labels)):
        calibration["temperature"] = temperature
    if (scaled := cross_fitted(logits, labels)) is not None:
        calibration["after_temperature"] = calibration_metrics(scaled, labels)
    else:
        logger.info("Calibration after scaling is omitted: a half of the samples has no optimal temperature.")
    metrics = {**scores, "calibration": calibration}
    curves: dict[str, tuple[RobustAccuracy, ...]] = {}
    attention: dict[str, AttentionStatistics] = {}
    if attacked_samples > 0:
        curves, metrics["robustness"] = _attacked(model, batches, attacked_samples, epsilon, normalization, seed)
    try:
        attention = attention_statistics(model, first_samples(batches, ATTENTION_SAMPLES))
        metrics["attention"] = {stack: measured.metrics() for stack, measured in attention.items()}
    except ValueError as error:
        logger.warning(f"Attention was not measured: {error}")
    return ClassifierEvaluation(metrics, reliability(logits, labels), curves, attention)


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Logits `(N, C)` in float32 and labels `(N,)` of all batches, on the CPU.

    Raises:
        ValueError: for no batch, or batches without labels.
        TypeError: for a single batch.
    """
    check_batches(batches)
    parts = []
    with mode(model, training=False):
        for batch in batches:
            inputs = to_device_of(model, batch)
            labels = inputs.pop("labels", None)
            if labels is None:
                raise ValueError(f"A batch must contain `labels`, got {sorted(batch)}.")
            outputs = model(**inputs)
            parts.append((outputs.logits.float().cpu(), labels.cpu()))
    if not parts:
        raise ValueError("Expected at least one batch to evaluate on, got none.")
    logits, labels = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(labels)


def cross_fitted(logits: Tensor, labels: Tensor) -> Tensor | None:
    """Logits `(N, C)` divided by temperatures: those of the even samples fitted on the odd ones, and vice versa.

    `None` if a half has no optimal temperature.
    """
    is_wrong = logits.argmax(-1) != labels
    # Without errors, a lower temperature is always better.
    if not (is_wrong[::2].any() and is_wrong[1::2].any()):
        return None
    of_even, of_odd = (optimal_temperature(logits[half::2], labels[half::2]) for half in (0, 1))
    if not (is_optimal(of_even) and is_optimal(of_odd)):
        return None
    scaled = logits.clone()
    scaled[::2] /= of_odd
    scaled[1::2] /= of_even
    return scaled


def save_plots(
    folder: str | Path,
    evaluation: ClassifierEvaluation | None = None,
    attention: Mapping[str, AttentionStatistics] | None = None,
    log_history: Sequence[Mapping[str, float]] = (),
    sample: SampleMaps | None = None,
) -> list[Path]:
    """Saves plots of reliability, robustness, attention and training, as far as they are given, in `folder/plots`.

    Args:
        folder (`str` or `Path`): the parent of `plots`.
        evaluation ([`ClassifierEvaluation`], *optional*): of a classifier.
        attention (`Mapping[str, AttentionStatistics]`, *optional*): by stack, for a model that is not a classifier.
        log_history (`Sequence[Mapping[str, float]]`): `trainer.state.log_history`.
        sample ([`SampleMaps`], *optional*): see [`~evaluation.sample_maps.map_first_sample`].

    Returns:
        `list[Path]`: the saved files.

    Raises:
        ImportError: if matplotlib is missing.
    """
    from ..evaluation import map_plots, plots

    figures = {}
    if evaluation is not None:
        attention = evaluation.attention
        figures["reliability"] = plots.reliability_diagram(evaluation.bins)
        if evaluation.curves:
            robustness = evaluation.metrics["robustness"]
            accuracies = {name: {r.epsilon: r.accuracy for r in curve} for name, curve in evaluation.curves.items()}
            in_pixels = robustness["space"] == "pixels"
            figures["robustness"] = plots.robust_accuracy_curve(accuracies, robustness["samples"], in_pixels)
    for stack, measured in (attention or {}).items():
        part = stack.removesuffix("attentions").strip("_")
        name = f"{part}_attention_entropy".lstrip("_")
        title = "cross-attention" if part == "cross" else part and f"the {part}"
        uniform = measured.uniform_entropy.max().item()
        figures[name] = plots.attention_entropy_map(measured.entropy, title, uniform, measured.queries)
    if sample is not None:
        figures["attention_maps"] = map_plots.plot_attention_maps(*sample)
    if any("loss" in entry for entry in log_history):
        figures["training"] = plots.training_curves(log_history)
    paths = {name: Path(folder) / PLOTS_FOLDER / f"{name}.png" for name in figures}
    for name, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        figures[name].savefig(path)
    return list(paths.values())


def _attacked(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    samples: int,
    epsilon: float | None,
    normalization: Normalization | None,
    seed: int,
) -> tuple[dict[str, tuple[RobustAccuracy, ...]], dict[str, Any]]:
    bound, space = epsilon or PIXEL_EPSILON, {"space": "pixels"}
    if "pixel_values" not in next(iter(batches)):
        deviation = transformers_model(model).get_input_embeddings().weight.detach().float().std().item()
        bound = (epsilon or EMBEDDING_EPSILON) * deviation
        space = {"space": "embeddings", "embedding_deviation": deviation}
    attacks = {
        "FGSM": Attack.fgsm(bound),
        "PGD-10": Attack.pgd(bound, steps=10),
        "PGD-20": Attack.pgd(bound, steps=20),
    }
    curves = {}
    for name, attack in attacks.items():
        with random_state_kept(model):
            torch.manual_seed(seed)
            epsilons = [fraction * bound for fraction in EPSILON_FRACTIONS]
            attacked = _attackable(model, first_samples(labelled_samples(batches), samples))
            curves[name] = robustness_curve(model, attacked, epsilons, attack, normalization)
    clean = next(iter(curves.values()))[0]
    rows = [{"name": "none", "epsilon": 0.0, "accuracy": clean.accuracy}]
    rows += [
        {"name": name, "epsilon": result.epsilon, "accuracy": result.accuracy}
        for name, curve in curves.items()
        for result in curve[1:]
    ]
    # The same by name, for comparisons of runs: attack to fraction of the largest epsilon to accuracy.
    accuracies = {
        name: {f"{fraction:g}": result.accuracy for fraction, result in zip(EPSILON_FRACTIONS, curve, strict=True)}
        for name, curve in curves.items()
    }
    return curves, {"norm": "linf", **space, "samples": clean.total, "attacks": rows, "accuracies": accuracies}


def _attackable(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Batches of texts of equal length for models that search the token ids for padding.

    Decoder classifiers use the last token before the padding, and an attack passes embeddings instead of token ids.
    """
    looks_for_padding = "pad_token_id" in inspect.getsource(type(transformers_model(model)).forward)
    for batch in batches:
        mask = batch.get("attention_mask")
        if looks_for_padding and isinstance(mask, Tensor) and mask.dim() == 2:
            yield from _by_length(batch, mask.bool())
        else:
            yield batch


def _by_length(batch: Mapping[str, Any], mask: Tensor) -> Iterator[dict[str, Any]]:
    """Splits a batch by text length, and removes the padding."""
    lengths = mask.sum(dim=-1)
    for length in lengths.unique():
        rows = lengths == length
        yield {
            name: value[rows][mask[rows]].view(-1, length) if value.shape == mask.shape else value[rows]
            for name, value in batch.items()
        }
