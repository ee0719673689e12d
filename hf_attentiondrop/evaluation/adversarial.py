"""Adversarial robustness: the accuracy of a classifier under worst-case perturbations of its inputs.

FGSM (arXiv 1412.6572) and PGD (arXiv 1706.06083), untargeted. Images are perturbed in pixel space, [0, 1], before the
normalization of the image processor; texts in the space of their input embeddings.

**Robust accuracy under an attack is an upper bound on the true robust accuracy**: a stronger attack may succeed on
samples that withstood this one. More steps and restarts tighten the bound.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attack import BALLS, Attack, AttackResult
from .perturbation_space import Normalization, Space, embedding_space, pixel_space
from .running import mode


@dataclass(frozen=True)
class RobustAccuracy:
    """Robust accuracy under one perturbation bound: an upper bound on the true one, see the module.

    Args:
        epsilon: the perturbation bound; 0 for the clean samples.
        correct: number of samples that were classified correctly at every input the attack tried.
        total: number of samples.
    """

    epsilon: float
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of the samples, in [0, 1]."""
        return self.correct / self.total


def attack_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    attack: Attack | None = None,
    normalization: Normalization | None = None,
) -> AttackResult:
    """Attacks a batch and keeps, for each sample, the worst input over all steps and restarts, including the sample.

    The attack follows the gradient of `log((1 - p) / p)`, where `p` is the probability of the label. Cross-entropy is
    an increasing function of it, so both gradients have the same direction; but the gradient of cross-entropy
    underflows in float32 for confident predictions, which would make the model look robust. The Adversarial Robustness
    Toolbox uses cross-entropy and returns the last iterate; otherwise the iterates are the same.

    The model runs in evaluation mode, where AttentionDrop is stock attention. Its modes, parameters and gradients do
    not change. Calls under `torch.no_grad` work.

    Args:
        model (`torch.nn.Module`):
            A classifier with one label per sample, of images or texts, whose outputs have `logits` `(B, C)`.
        batch (`Mapping[str, Any]`):
            The model's inputs and `labels` `(B,)`: with `pixel_values` `(B, ..., channels, height, width)`, or with
            `input_ids` `(B, length)`. All tokens that are not padding are perturbed, including special tokens.
        attack (`Attack`, *optional*): defaults to `Attack()`.
        normalization (`Normalization`, *optional*): of the images; required for images.

    Returns:
        [`AttackResult`], on the model's device.

    Raises:
        ValueError: for any other model or batch, labels outside the range of the logits, logits or gradients that are
            not finite, pixels outside [0, 1], and models whose logits depend on token ids beyond their embeddings.
        TypeError: for texts, if `model` contains no Transformers model.
    """
    attack = attack or Attack()
    # The caller may be in no_grad or inference mode; tensors created there cannot require gradients.
    with mode(model, training=False), torch.inference_mode(False), torch.enable_grad():
        device = next(model.parameters()).device
        inputs = {name: value.to(device).clone() if torch.is_tensor(value) else value for name, value in batch.items()}
        labels = _check_labels(model, inputs.pop("labels", None))
        space = _space(model, inputs, normalization)
        with torch.no_grad():
            logits = _logits(model, space.clean, labels)
            _check_embeddings_suffice(logits, model, space)
        worst, clean_margin = space.zero, _margin(logits, labels)
        highest, was_correct = clean_margin, logits.argmax(-1) == labels
        is_correct = was_correct
        for perturbation, logits in _iterates(model, space, labels, attack):
            margin = _margin(logits, labels)
            is_worse = margin > highest
            worst = torch.where(is_worse.view(-1, *[1] * (worst.dim() - 1)), perturbation, worst)
            highest = torch.where(is_worse, margin, highest)
            is_correct = is_correct & (logits.argmax(-1) == labels)
        with torch.no_grad():
            inputs = space.inputs(worst)
    return AttackResult(inputs, worst, F.softplus(clean_margin), F.softplus(highest), was_correct, is_correct)


def robustness_curve(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    epsilons: Iterable[float],
    attack: Attack | None = None,
    normalization: Normalization | None = None,
) -> tuple[RobustAccuracy, ...]:
    """Robust accuracy for each `epsilon`, in one pass over the data. At `epsilon` 0 it is the clean accuracy.

    It never increases with `epsilon`: every ball contains the smaller ones, so a sample that is misclassified at one
    `epsilon` counts as misclassified at all larger ones.

    Args:
        model (`torch.nn.Module`): see [`attack_batch`].
        batches (`Iterable[Mapping[str, Any]]`): batches for [`attack_batch`], such as a `DataLoader`.
        epsilons (`Iterable[float]`): the perturbation bounds.
        attack (`Attack`, *optional*): scaled to each of them by [`Attack.scaled_to`]; defaults to `Attack()`.
        normalization (`Normalization`, *optional*): of the images; required for images.

    Returns:
        `tuple[RobustAccuracy, ...]`: one per `epsilon`, in ascending order.

    Raises:
        ValueError: if `batches` or `epsilons` is empty, and see [`attack_batch`].
    """
    attack = attack or Attack()
    attacks = [replace(attack, epsilon=0.0) if epsilon == 0 else attack.scaled_to(epsilon) for epsilon in epsilons]
    attacks = sorted(attacks, key=lambda attack: attack.epsilon)
    if not attacks:
        raise ValueError("`epsilons` must name at least one bound to attack with, such as [0, 8/255], got none.")
    correct, total = [0] * len(attacks), 0
    for batch in batches:
        survivors: Tensor | bool = True
        for index, attack_ in enumerate(attacks):
            survivors = attack_batch(model, batch, attack_, normalization).is_correct & survivors
            correct[index] += int(survivors.sum())
            if not survivors.any():
                break
        total += len(batch["labels"])
    if total == 0:
        raise ValueError("Expected at least one batch to attack, got none: accuracy over no samples is undefined.")
    return tuple(RobustAccuracy(a.epsilon, count, total) for a, count in zip(attacks, correct, strict=True))


def robust_accuracy(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    attack: Attack | None = None,
    normalization: Normalization | None = None,
) -> RobustAccuracy:
    """Robust accuracy under one attack: an upper bound on the true one.

    Arguments and errors are those of [`robustness_curve`], which covers several bounds at once.
    """
    attack = attack or Attack()
    return robustness_curve(model, batches, [attack.epsilon], attack, normalization)[0]


def _space(model: nn.Module, inputs: dict[str, Any], normalization: Normalization | None) -> Space:
    if "pixel_values" in inputs:
        return pixel_space(model, inputs, normalization)
    if "input_ids" in inputs:
        return embedding_space(model, inputs)
    raise ValueError(
        f"A batch must contain `pixel_values` or `input_ids`, got {sorted(inputs)}: only images and texts can be "
        "attacked."
    )


def _iterates(model: nn.Module, space: Space, labels: Tensor, attack: Attack) -> Iterator[tuple[Tensor, Tensor]]:
    """The perturbations that an attack tries, over all steps and restarts, each with its logits."""
    ball = BALLS[attack.norm]
    for _ in range(attack.restarts if attack.epsilon > 0 else 0):
        perturbation = space.zero
        if attack.random_start:
            perturbation = space.clip(ball.sample(space.is_free, attack.epsilon))
        for _ in range(attack.steps):
            perturbation = perturbation.detach().requires_grad_()
            logits = _logits(model, space.inputs(perturbation), labels)
            gradient = _gradient(_margin(logits, labels), perturbation)
            perturbation = perturbation.detach()
            yield perturbation, logits.detach()
            step = attack.step_size * ball.direction(gradient * space.is_free)
            perturbation = ball.project(space.clip(perturbation + step), attack.epsilon)
        with torch.no_grad():
            logits = _logits(model, space.inputs(perturbation), labels)
        yield perturbation, logits


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """`log((1 - p) / p)` of the labels' probabilities, `(B,)`: cross-entropy is its softplus."""
    of_label = logits.gather(-1, labels[:, None])
    of_others = logits.scatter(-1, labels[:, None], -torch.inf).logsumexp(-1)
    return of_others - of_label.squeeze(-1)


def _gradient(margin: Tensor, perturbation: Tensor) -> Tensor:
    gradient = None
    if margin.requires_grad:
        (gradient,) = torch.autograd.grad(margin.sum(), perturbation, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "The model's logits have no gradient with respect to its inputs: the model detaches them, and a "
            "gradient-based attack would find nothing and make it look robust. Remove the detach."
        )
    if not gradient.isfinite().all():
        raise ValueError(
            "The gradient with respect to the inputs contains NaN or infinity, so no attack can follow it. Attack the "
            "model in float32: model.float()."
        )
    return gradient


def _logits(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """The model's logits `(B, C)` in at least float32, checked against the labels."""
    logits = getattr(model(**inputs), "logits", None)
    if logits is None or logits.dim() != 2 or logits.shape[-1] < 2 or len(logits) != len(labels):
        got = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"{type(model).__name__} returned {got} for {len(labels)} labels, expected (B, C) with C >= 2 classes: "
            "robust accuracy is measured on models with a classification head, one label per sample."
        )
    if not logits.isfinite().all():
        raise ValueError(
            f"{type(model).__name__} returned logits with NaN or infinity: every prediction would count as wrong. "
            "Look for a diverged training run or an overflow in half precision."
        )
    if labels.min() < 0 or labels.max() >= logits.shape[-1]:
        raise ValueError(
            f"`labels` must be in 0 … {logits.shape[-1] - 1}, since the logits have {logits.shape[-1]} classes, got "
            f"{labels.min().item()} to {labels.max().item()}. Use the class numbers that the model was trained with."
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_labels(model: nn.Module, labels: Any) -> Tensor:
    problem_type = getattr(getattr(model, "config", None), "problem_type", None)
    if problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"{type(model).__name__} has problem_type={problem_type!r}, expected 'single_label_classification': "
            "without one right class per sample, robust accuracy is undefined."
        )
    if not torch.is_tensor(labels) or labels.dim() != 1 or labels.is_floating_point() or len(labels) == 0:
        got = f"{tuple(labels.shape)} of {labels.dtype}" if torch.is_tensor(labels) else repr(labels)
        raise ValueError(
            f"A batch must contain `labels`, one integer per sample, shape (B,), got {got}: an attack maximizes the "
            "loss of the right class."
        )
    return labels.long()


def _check_embeddings_suffice(logits: Tensor, model: nn.Module, space: Space) -> None:
    """Raises for a model whose logits for the embeddings differ from those for the token ids."""
    if "input_ids" not in space.clean:
        return
    embedded = model(**space.inputs(space.zero)).logits
    scale = max(1.0, logits.abs().max().item())
    if not torch.allclose(
        embedded.to(logits.dtype), logits, rtol=0, atol=16 * torch.finfo(embedded.dtype).eps * scale
    ):
        raise ValueError(
            f"{type(model).__name__} returns different logits for embeddings than for their token ids: it derives "
            "positions or the last token from `input_ids`, so attacking embeddings would measure another model. Pad "
            "on the other side, or batch texts of equal length."
        )
