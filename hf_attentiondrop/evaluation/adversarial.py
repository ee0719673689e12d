"""Adversarial robustness: how accurate a classifier stays where its inputs are perturbed against it.

FGSM (arXiv 1412.6572) and PGD (arXiv 1706.06083), untargeted. Images are perturbed in pixel space, [0, 1], whatever
mean and standard deviation the model's own inputs are normalised with; texts in the space of their input embeddings.

**Robust accuracy under an attack is an upper bound on the true robust accuracy**: a sample that withstood this attack
may yield to a stronger one. More steps and restarts bring the bound down; what they find can only be added to.
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
    """How many samples stay correctly classified under attacks of a size: an upper bound, see the module.

    Args:
        epsilon: the bound of the perturbations; 0 for none.
        correct: number of samples that no tried input got misclassified.
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
    """Attacks a batch, and keeps per sample the worst input over all steps and restarts, the sample itself included.

    The gradient is that of `log((1 - p) / p)`, `p` being the probability of the label. Cross-entropy is an increasing
    function of it, so both have the same direction; but cross-entropy's own gradient vanishes in float32 where a model
    is sure of itself, and would make it look robust. In the Adversarial Robustness Toolbox, which takes that one, the
    last iterate counts; otherwise the iterates are the same.

    The model runs in evaluation mode, where AttentionDrop is stock attention. Its modes, parameters and gradients are
    left as they were, and it may be called under `torch.no_grad`.

    Args:
        model (`torch.nn.Module`):
            A classifier with one label per sample, of images or texts, whose outputs have `logits` `(B, C)`.
        batch (`Mapping[str, Any]`):
            The model's inputs and `labels` `(B,)`: with `pixel_values` `(B, ..., channels, height, width)`, or with
            `input_ids` `(B, length)`. Every token that `attention_mask` shows is perturbed, special ones too.
        attack (`Attack`, *optional*): [`Attack`]'s defaults by default.
        normalization (`Normalization`, *optional*): of the images; they need one.

    Returns:
        [`AttackResult`], on the model's device.

    Raises:
        ValueError: for anything that is no such classifier or batch, for labels outside of the logits, logits or
            gradients that are not finite, pixels outside of [0, 1], and models that look at token ids as well as
            at their embeddings.
        TypeError: for texts, if there is no Transformers model in `model`.
    """
    attack = attack or Attack()
    # A mode without gradients around the call must not reach in here, nor the tensors that were made in it.
    with mode(model, training=False), torch.inference_mode(False), torch.enable_grad():
        device = next(model.parameters()).device
        inputs = {name: value.to(device).clone() if torch.is_tensor(value) else value for name, value in batch.items()}
        labels = _require_classes(model, inputs.pop("labels", None))
        space = _space(model, inputs, normalization)
        with torch.no_grad():
            logits = _logits(model, space.clean, labels)
            _require_same(logits, model, space)
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
    """Robust accuracy by `epsilon`, in one pass over the data. At `epsilon` 0 it is the clean accuracy.

    It never rises with `epsilon`, by construction: a perturbation of a smaller ball lies in every larger one, so that
    a sample misclassified under it counts as misclassified from there on.

    Args:
        model (`torch.nn.Module`): see [`attack_batch`].
        batches (`Iterable[Mapping[str, Any]]`): batches such as [`attack_batch`] takes, for example a `DataLoader`.
        epsilons (`Iterable[float]`): the bounds to try.
        attack (`Attack`, *optional*): [`Attack.scaled_to`] each of them; [`Attack`]'s defaults by default.
        normalization (`Normalization`, *optional*): of the images; they need one.

    Returns:
        `tuple[RobustAccuracy, ...]`: one per `epsilon`, ascending.

    Raises:
        ValueError: if there is no batch or no `epsilon`, and as [`attack_batch`] does.
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
        raise ValueError("Expected at least one batch to attack, got none: of no samples there is no accuracy.")
    return tuple(RobustAccuracy(a.epsilon, count, total) for a, count in zip(attacks, correct, strict=True))


def robust_accuracy(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    attack: Attack | None = None,
    normalization: Normalization | None = None,
) -> RobustAccuracy:
    """Robust accuracy under one attack: an upper bound on the true one.

    Arguments and errors are those of [`robustness_curve`], which gives it for several bounds at once.
    """
    attack = attack or Attack()
    return robustness_curve(model, batches, [attack.epsilon], attack, normalization)[0]


def _space(model: nn.Module, inputs: dict[str, Any], normalization: Normalization | None) -> Space:
    if "pixel_values" in inputs:
        return pixel_space(model, inputs, normalization)
    if "input_ids" in inputs:
        return embedding_space(model, inputs)
    raise ValueError(
        f"A batch must hold `pixel_values` or `input_ids` to perturb, got {sorted(inputs)}: only images and texts can "
        "be attacked."
    )


def _iterates(model: nn.Module, space: Space, labels: Tensor, attack: Attack) -> Iterator[tuple[Tensor, Tensor]]:
    """The perturbations that an attack goes through from all its starts, each with the logits that it leads to."""
    ball = BALLS[attack.norm]
    for _ in range(attack.restarts if attack.epsilon > 0 else 0):
        perturbation = space.zero
        if attack.random_start:
            perturbation = space.clip(ball.draw(space.is_free, attack.epsilon))
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
            "The model's logits have no gradient with respect to its inputs: it detaches them somewhere, and an "
            "attack that follows the gradient would find nothing and make it look robust. Let it pass them through."
        )
    if not gradient.isfinite().all():
        raise ValueError(
            "The gradient with respect to the inputs holds NaN or infinite values, so no attack can follow it. Attack "
            "the model in float32: model.float()."
        )
    return gradient


def _logits(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """The model's logits `(B, C)`, float32 at least, checked against the labels."""
    logits = getattr(model(**inputs), "logits", None)
    if logits is None or logits.dim() != 2 or logits.shape[-1] < 2 or len(logits) != len(labels):
        got = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"{type(model).__name__} returned {got} for {len(labels)} labels, expected (B, C) with C >= 2 classes: "
            "robust accuracy is measured on models with a classification head, one label per sample."
        )
    if not logits.isfinite().all():
        raise ValueError(
            f"{type(model).__name__} returned logits that are NaN or infinite: every class would count as wrong. Look "
            "for a diverged training run or an overflow of half precision."
        )
    if labels.min() < 0 or labels.max() >= logits.shape[-1]:
        raise ValueError(
            f"`labels` must be classes from 0 to {logits.shape[-1] - 1}, as the logits have {logits.shape[-1]}, got "
            f"{labels.min().item()} to {labels.max().item()}. Use the numbering that the model was trained with."
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _require_classes(model: nn.Module, labels: Any) -> Tensor:
    problem_type = getattr(getattr(model, "config", None), "problem_type", None)
    if problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"{type(model).__name__} has problem_type={problem_type!r}, expected 'single_label_classification': "
            "without one right class per sample there is no robust accuracy."
        )
    if not torch.is_tensor(labels) or labels.dim() != 1 or labels.is_floating_point() or len(labels) == 0:
        got = f"{tuple(labels.shape)} of {labels.dtype}" if torch.is_tensor(labels) else repr(labels)
        raise ValueError(
            f"A batch must hold `labels`, one integer per sample, shape (B,), got {got}: an attack raises the loss "
            "of the right class."
        )
    return labels.long()


def _require_same(logits: Tensor, model: nn.Module, space: Space) -> None:
    """Refuses a model that makes something else of embeddings than of the tokens that they belong to."""
    if "input_ids" not in space.clean:
        return
    embedded = model(**space.inputs(space.zero)).logits
    scale = max(1.0, logits.abs().max().item())
    if not torch.allclose(
        embedded.to(logits.dtype), logits, rtol=0, atol=16 * torch.finfo(embedded.dtype).eps * scale
    ):
        raise ValueError(
            f"{type(model).__name__} gives other logits for embeddings than for their tokens: it reads positions or "
            "the last token off `input_ids`, so attacking embeddings would measure another model. Pad on the other "
            "side, or make batches of texts of one length."
        )
