"""Attacks match closed forms and the Adversarial Robustness Toolbox, and do not change the model."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    ViTImageProcessorPil,
)

from hf_attentiondrop.evaluation.adversarial import (
    Attack,
    AttackResult,
    Normalization,
    attack_batch,
    robust_accuracy,
    robustness_curve,
)

from ..models import build, inputs


DIGITS = Normalization(mean=(0.3,), std=(0.25,))
ATTACKS = [
    Attack.fgsm(),
    Attack.fgsm(epsilon=0.5, norm="l2"),
    Attack.pgd(random_start=False),
    Attack.pgd(steps=20, restarts=2),
    Attack.pgd(epsilon=0.5, norm="l2"),
]


def images(count: int = 8) -> dict[str, Tensor]:
    """Random normalized images of one channel, with labels; some pixels are black and some white."""
    pixels = (torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.2).clamp(0, 1)
    return {"pixel_values": (pixels - DIGITS.mean[0]) / DIGITS.std[0], "labels": torch.arange(count) % 2}


def pixels(result_or_batch: Any) -> Tensor:
    values = getattr(result_or_batch, "inputs", result_or_batch)["pixel_values"]
    return values * DIGITS.std[0] + DIGITS.mean[0]


def size(perturbation: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(perturbation.flatten(1), ord=math.inf if norm == "linf" else 2, dim=1)


class LinearClassifier(nn.Module):
    """Logits that are a linear function of three-channel images, times a scale."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 4 * 4, 3)
        self.scale = scale

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.scale * self.head(pixel_values.flatten(1)))


class Ring(nn.Module):
    """Misclassifies only between 0.05 and 0.12 from the sample; further away the loss is higher, but it is right."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(2.5))

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        distance = pixel_values.flatten(1) - 0.5
        wrong = F.pad(self.slope * distance, (1, 1)) + torch.tensor([0.0, 0.0, -1.0])
        right = torch.cat((0 * distance, *[self.slope * distance - 0.4] * 2), dim=1)
        return SimpleNamespace(logits=torch.where((distance > 0.05) & (distance < 0.12), wrong, right))


# The first of these samples can be pushed into the ring, the second is too far away.
TWO_PIXELS = {"pixel_values": torch.tensor([0.5, 0.1]).view(2, 1, 1, 1), "labels": torch.tensor([0, 0])}


@pytest.fixture(scope="module")
def digits() -> list[dict[str, Tensor]]:
    """Batches of handwritten digits, 0 to 4, normalized."""
    bunch = load_digits(n_class=5)
    data = torch.tensor(bunch.images / 16, dtype=torch.float32).unsqueeze(1)
    samples = zip((data - DIGITS.mean[0]) / DIGITS.std[0], torch.tensor(bunch.target), strict=True)
    return list(DataLoader([{"pixel_values": image, "labels": label} for image, label in samples], batch_size=32))


@pytest.fixture(scope="module")
def trained(digits: list[dict[str, Tensor]]) -> PreTrainedModel:
    """A ViT trained on them."""
    model = build("vit", num_labels=5, initializer_range=0.15).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(4):
        for batch in digits[:-4]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def test_a_linear_model_matches_the_closed_form() -> None:
    model = LinearClassifier()
    normalization = Normalization(mean=(0.2, 0.4, 0.6), std=(0.1, 0.5, 2.0))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (normalization.mean, normalization.std))
    clean = torch.full((2, 3, 4, 4), 0.5)
    batch = {"pixel_values": (clean - mean) / std, "labels": torch.tensor([0, 2])}
    logits = model(batch["pixel_values"]).logits
    for row, label in enumerate(batch["labels"]):
        error = logits[row].softmax(-1) - F.one_hot(label, 3)
        gradient = (error @ model.head.weight).view(3, 4, 4) / std
        linf = attack_batch(model, batch, Attack.fgsm(epsilon=0.1), normalization)
        torch.testing.assert_close(linf.perturbation[row], 0.1 * gradient.sign())
        l2 = attack_batch(model, batch, Attack.fgsm(epsilon=0.1, norm="l2"), normalization)
        torch.testing.assert_close(l2.perturbation[row], 0.1 * gradient / gradient.norm())
        after = model(batch["pixel_values"] + l2.perturbation / std).logits
        torch.testing.assert_close(l2.loss, F.cross_entropy(after, batch["labels"], reduction="none"))


def test_confident_predictions_are_attacked() -> None:
    # Its cross-entropy is exactly 0 in float32, and so is the gradient.
    unsure, sure = LinearClassifier(), LinearClassifier(scale=1e4)
    sure.load_state_dict(unsure.state_dict())
    batch = {"pixel_values": torch.rand(16, 3, 4, 4)}
    batch["labels"] = unsure(batch["pixel_values"]).logits.argmax(-1)
    result = attack_batch(sure, batch, Attack.pgd(epsilon=0.2), Normalization())
    assert (result.clean_loss == 0).any() and result.was_correct.all()
    assert not result.is_correct.any()


@pytest.mark.parametrize("implementation", ["attentiondrop", "affine_scaled"])
@pytest.mark.parametrize(
    ("norm", "epsilon", "step_size"), [("linf", 8 / 255, 2 / 255), ("l2", 0.5, 0.1), ("l2", 1.0, 0.25)]
)
def test_they_agree_with_the_adversarial_robustness_toolbox(
    norm: str, epsilon: float, step_size: float, implementation: str
) -> None:
    class Logits(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return model(pixel_values).logits

    model, batch = build("vit", attn_implementation=implementation, initializer_range=0.1), images()
    estimator = PyTorchClassifier(
        Logits(),
        nn.CrossEntropyLoss(),
        input_shape=(1, 8, 8),
        nb_classes=2,
        clip_values=(0.0, 1.0),
        preprocessing=(np.float32(DIGITS.mean), np.float32(DIGITS.std)),
        device_type="cpu",
    )
    order = np.inf if norm == "linf" else 2
    theirs = [FastGradientMethod(estimator, norm=order, eps=epsilon)]
    theirs += [
        ProjectedGradientDescentPyTorch(
            estimator, norm=order, eps=epsilon, eps_step=step_size, max_iter=steps, verbose=False
        )
        for steps in (10, 20)
    ]
    ours = [Attack.fgsm(epsilon, norm)]
    ours += [Attack(norm, epsilon, step_size, steps=steps, random_start=False) for steps in (10, 20)]
    for their_attack, attack in zip(theirs, ours, strict=True):
        expected = torch.tensor(their_attack.generate(pixels(batch).numpy(), batch["labels"].numpy()))
        result = attack_batch(model, batch, attack, DIGITS)
        logits = model((expected - DIGITS.mean[0]) / DIGITS.std[0]).logits
        their_loss = F.cross_entropy(logits, batch["labels"], reduction="none")
        differences = (pixels(batch) + result.perturbation - expected).flatten(1).abs().amax(1)
        # They keep the last iterate, we the worst one: if they differ, ours has the higher loss.
        is_equal = differences < 2e-6
        assert is_equal.float().mean() >= 0.5
        assert (is_equal | (result.loss > their_loss)).all()


def test_two_attacks_break_a_trained_model_and_pgd_more_than_fgsm(
    trained: PreTrainedModel, digits: list[dict[str, Tensor]]
) -> None:
    attacks = [Attack.fgsm(0.1), Attack.pgd(0.1), Attack.pgd(0.1, steps=20, restarts=3)]
    clean = robust_accuracy(trained, digits[-4:], Attack(epsilon=0.0), DIGITS).accuracy
    fgsm, pgd, strong = (robust_accuracy(trained, digits[-4:], attack, DIGITS).accuracy for attack in attacks)
    assert clean > 0.9
    assert strong <= pgd < fgsm < clean - 0.2


def test_the_curve_falls_from_clean_accuracy(trained: PreTrainedModel, digits: list[dict[str, Tensor]]) -> None:
    held_out = digits[-4:]
    with torch.no_grad():
        clean = sum((trained(**batch).logits.argmax(-1) == batch["labels"]).sum().item() for batch in held_out)
    weak = Attack.pgd(epsilon=0.1, steps=2)
    curve = robustness_curve(trained, iter(held_out), [0.2, 0, 0.05, 0.4], weak, DIGITS)
    assert [point.epsilon for point in curve] == [0, 0.05, 0.2, 0.4]
    assert (curve[0].correct, curve[0].total) == (clean, sum(len(batch["labels"]) for batch in held_out))
    counts = [point.correct for point in curve]
    assert counts == sorted(counts, reverse=True) and counts[1] > counts[-1]


def test_robust_accuracy_never_increases_with_epsilon() -> None:
    # One step of the larger epsilon skips the misclassified region within the smaller ball.
    alone = [robust_accuracy(Ring(), [TWO_PIXELS], Attack.fgsm(size), Normalization()).correct for size in (0.1, 0.15)]
    curve = robustness_curve(Ring(), [TWO_PIXELS], [0, 0.1, 0.15], Attack.fgsm(), Normalization())
    assert alone == [1, 2]
    assert [point.accuracy for point in curve] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_epsilon_zero_changes_nothing(family: str) -> None:
    model = build(family)
    batch = images() if family == "vit" else inputs("bert", padding="right")
    result = attack_batch(model, batch, Attack(epsilon=0.0), DIGITS)
    assert not result.perturbation.any()
    assert torch.equal(result.loss, result.clean_loss) and torch.equal(result.is_correct, result.was_correct)
    model_inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(model(**result.inputs).logits, model(**model_inputs).logits)
    if family == "vit":
        assert torch.equal(result.inputs["pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_images_stay_in_the_ball_and_in_range(attack: Attack) -> None:
    batch = images()
    result = attack_batch(build("vit", initializer_range=0.1), batch, attack, DIGITS)
    assert (size(result.perturbation, attack.norm) <= attack.epsilon * (1 + 1e-6)).all()
    assert (size(result.perturbation, attack.norm) > 0.5 * attack.epsilon).any()
    assert pixels(result).min() >= -1e-6 and pixels(result).max() <= 1 + 1e-6
    torch.testing.assert_close(pixels(result) - pixels(batch), result.perturbation, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_texts_stay_in_the_ball_and_padding_is_unchanged(attack: Attack) -> None:
    model, batch = build("bert", initializer_range=0.2), inputs("bert", padding="right")
    result = attack_batch(model, batch, attack)
    assert (size(result.perturbation, attack.norm) <= attack.epsilon * (1 + 1e-6)).all()
    is_padding = batch["attention_mask"] == 0
    assert is_padding.any() and not result.perturbation[is_padding].any()
    assert (result.perturbation[~is_padding] != 0).any(-1).all()
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    torch.testing.assert_close(result.inputs["inputs_embeds"], embeddings + result.perturbation)
    with torch.no_grad():
        loss = F.cross_entropy(model(**result.inputs).logits, batch["labels"], reduction="none")
    torch.testing.assert_close(result.loss, loss)
    assert (result.loss > result.clean_loss).all()


def test_padding_is_unchanged_even_if_it_affects_the_logits() -> None:
    class Averaging(BertForSequenceClassification):
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, attention_mask: Any = None) -> Any:
            embeddings = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            return SimpleNamespace(logits=self.classifier(embeddings.mean(1)))

    batch = inputs("bert", padding="right")
    result = attack_batch(Averaging(build("bert").config).eval(), batch, Attack.fgsm(0.5, norm="l2"))
    assert not result.perturbation[batch["attention_mask"] == 0].any()
    torch.testing.assert_close(size(result.perturbation, "l2"), torch.full((4,), 0.5))


def test_rounded_pixels_do_not_widen_the_ball() -> None:
    batch = {"pixel_values": torch.full((3, 3, 4, 4), 1.001), "labels": torch.arange(3)}
    result = attack_batch(LinearClassifier(), batch, Attack(epsilon=1e-4, steps=1), Normalization())
    assert result.perturbation.any() and (size(result.perturbation, "linf") <= 1.001e-4).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_are_uniform_in_the_ball(norm: str) -> None:
    # Steps this short leave a perturbation where it started. It is kept if it raised the loss of a linear model: if it
    # lies in one half of the ball, where lengths are distributed as in the whole.
    model = LinearClassifier()
    batch = {"pixel_values": torch.full((400, 3, 4, 4), 0.5), "labels": torch.zeros(400, dtype=torch.long)}
    attack = Attack(norm, epsilon=0.1, step_size=1e-9, steps=1)
    result = attack_batch(model, batch, attack, Normalization())
    lengths = size(result.perturbation, norm)[result.loss > result.clean_loss] / 0.1
    dimensions = 48
    # The norm of a uniform sample from a unit ball in d dimensions has the mean d / (d + 1), in both norms.
    assert lengths.numel() > 100 and lengths.max() <= 1 + 1e-6
    assert abs(lengths.mean().item() - dimensions / (dimensions + 1)) < 0.005


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_best_loss_never_falls_over_steps_and_restarts(norm: str) -> None:
    # Steps that are too long for the ball make the loss oscillate.
    model, batch = build("vit", initializer_range=0.2), images()

    def loss(**values: Any) -> Tensor:
        torch.manual_seed(3)
        return attack_batch(model, batch, Attack(norm, epsilon=1.0, step_size=0.8, **values), DIGITS).loss

    by_steps = torch.stack([loss(steps=steps, random_start=False) for steps in (1, 2, 3, 5, 8)])
    assert (by_steps.diff(dim=0) >= -1e-6).all() and (by_steps[-1] > by_steps[0]).any()
    by_restarts = torch.stack([loss(steps=1, restarts=restarts) for restarts in (1, 2, 4)])
    assert (by_restarts.diff(dim=0) >= -1e-6).all() and (by_restarts[-1] > by_restarts[0]).any()
    clean = attack_batch(model, batch, Attack(epsilon=0.0), DIGITS).loss
    assert (by_steps >= clean).all()


def test_one_misclassified_iterate_is_enough() -> None:
    passes = attack_batch(Ring(), TWO_PIXELS, Attack("linf", 0.15, 0.1, 2, random_start=False), Normalization())
    jumps = attack_batch(Ring(), TWO_PIXELS, Attack("linf", 0.15, 0.15, 2, random_start=False), Normalization())
    assert passes.was_correct.all() and passes.is_correct.tolist() == [False, True]
    assert jumps.is_correct.all() and (jumps.loss > jumps.clean_loss).all()


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_the_model_is_unchanged(family: str) -> None:
    model = build(family).train()
    dropout = next(module for module in model.modules() if isinstance(module, nn.Dropout))
    dropout.eval()
    frozen = next(model.parameters()).requires_grad_(False)
    batch = images() if family == "vit" else inputs("bert")
    model(**batch).loss.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    result = attack_batch(model, batch, Attack(), DIGITS)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not frozen.requires_grad and all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    # The result keeps no graph alive.
    tensors = [result.perturbation, result.loss, *result.inputs.values()]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_the_mode_is_restored_after_an_error_too() -> None:
    model = build("vit").train()
    with pytest.raises(ValueError, match="labels"):
        attack_batch(model, images() | {"labels": torch.full((8,), 7)}, Attack(), DIGITS)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_gradients_may_be_off_and_parameters_frozen(family: str) -> None:
    model = build(family)
    batch = images() if family == "vit" else inputs("bert", padding="right")

    def attack() -> AttackResult:
        torch.manual_seed(2)
        return attack_batch(model, batch, Attack(), DIGITS)

    expected = attack()
    with torch.no_grad():
        assert torch.equal(attack().perturbation, expected.perturbation)
    with torch.inference_mode():
        batch = {name: value.clone() for name, value in batch.items()}
        assert torch.equal(attack().perturbation, expected.perturbation)
    model.requires_grad_(False)
    assert torch.equal(attack().perturbation, expected.perturbation)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_a_half_precision_model_is_attacked_in_float32(family: str) -> None:
    model = build(family, initializer_range=0.2).to(torch.bfloat16)
    batch = images() if family == "vit" else inputs("bert", padding="right")
    result = attack_batch(model, batch, Attack.pgd(), DIGITS)
    assert result.perturbation.dtype == result.loss.dtype == torch.float32
    assert result.inputs["pixel_values" if family == "vit" else "inputs_embeds"].dtype == torch.bfloat16
    assert (result.loss >= result.clean_loss).all() and (result.loss > result.clean_loss).any()


def test_random_starts_come_from_the_global_generator() -> None:
    model, batch = build("vit"), images()
    first, again, other = (
        torch.manual_seed(seed) and attack_batch(model, batch, Attack(), DIGITS) for seed in (1, 1, 2)
    )
    assert torch.equal(first.perturbation, again.perturbation)
    assert not torch.equal(first.perturbation, other.perturbation)
    state = torch.get_rng_state()
    attack_batch(model, batch, Attack.fgsm(), DIGITS)
    assert torch.equal(torch.get_rng_state(), state)


def test_defaults_are_the_common_ones() -> None:
    attack = Attack()
    assert (attack.norm, attack.epsilon, attack.steps) == ("linf", 8 / 255, 10)
    assert attack.step_size == pytest.approx(2 / 255)
    assert attack.scaled_to(4 / 255).step_size == pytest.approx(1 / 255)
    assert Attack.from_dict(attack.to_dict()) == attack


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"do_normalize": False, "rescale_factor": 1 / 127.5},
    ],
)
def test_the_normalization_of_an_image_processor_is_undone(options: dict[str, Any]) -> None:
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, **options)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    values = processor(image, return_tensors="pt")["pixel_values"][0]
    for holder in (processor, SimpleNamespace(image_processor=processor)):
        normalization = Normalization.from_processor(holder)
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (normalization.mean, normalization.std))
        torch.testing.assert_close(values * std + mean, torch.tensor(image).permute(2, 0, 1) / 255)


def test_a_processor_that_does_not_rescale_gets_pixels() -> None:
    processor = ViTImageProcessorPil(do_rescale=False, image_mean=0.5, image_std=0.25)
    assert Normalization.from_processor(processor) == Normalization((0.5,), (0.25,))


def test_processors_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(TypeError, match="Expected a Transformers image processor, got dict.*Pass Normalization"):
        Normalization.from_processor({})
    processor = ViTImageProcessorPil()
    processor.rescale_offset = True
    with pytest.raises(ValueError, match="rescale_offset=True: it shifts"):
        Normalization.from_processor(processor)


@pytest.mark.parametrize("values", [((0.5,), (0.0,)), ((0.5,), (0.5, 0.5)), ((math.nan,), (1.0,)), ((), ())])
def test_bad_normalizations_are_refused(values: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="one finite number per channel, `std` positive, got"):
        Normalization(*values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm": "l1"}, r"`norm` must be one of \('linf', 'l2'\), got 'l1'"),
        ({"epsilon": -0.1}, "`epsilon` must be a finite number >= 0, got -0.1"),
        ({"epsilon": math.nan}, "`epsilon` must be .*got nan"),
        ({"epsilon": "8/255"}, "`epsilon` must be .*got '8/255'"),
        ({"step_size": 0.0}, "`step_size` must be a finite number > 0, got 0.0"),
        ({"steps": 0}, "`steps` must be an integer >= 1, got 0"),
        ({"steps": 2.5}, "`steps` must be an integer >= 1, got 2.5"),
        ({"random_start": 1}, "`random_start` must be True or False, got 1"),
        ({"restarts": 0}, "`restarts` must be an integer >= 1.*got 0"),
        ({"restarts": 2, "random_start": False}, "`restarts` must be .*1 if random_start is False, got 2"),
    ],
)
def test_bad_attacks_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attack(**values)


def test_an_attack_with_epsilon_zero_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match="epsilon=0 cannot be scaled"):
        Attack(epsilon=0.0).scaled_to(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, r"must contain `labels`, one integer per sample, shape \(B,\), got None"),
        ({"labels": torch.rand(8)}, r"must contain `labels`.* got \(8,\) of torch.float32"),
        ({"labels": torch.zeros(8, 2, dtype=torch.long)}, r"must contain `labels`.* got \(8, 2\)"),
        ({"labels": torch.full((8,), 2)}, "`labels` must be in 0 … 1, .*got 2 to 2"),
        ({"labels": torch.full((8,), -100)}, "`labels` must be in 0 … 1, .*got -100 to -100"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"logits of shape \(8, 2\) for 3 labels"),
        ({"pixel_values": 4 * torch.rand(8, 1, 8, 8)}, r"gives pixels from .* expected \[0, 1\]"),
        ({"pixel_values": torch.full((8, 1, 8, 8), math.nan)}, "gives pixels from nan"),
        ({"pixel_values": torch.rand(8, 64)}, r"`pixel_values` must be images .*got shape \(8, 64\)"),
    ],
)
def test_bad_batches_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack_batch(build("vit"), images() | change, Attack(), DIGITS)


def test_unsuitable_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="Pass `normalization`: Normalization.from_processor"):
        attack_batch(build("vit"), images())
    with pytest.raises(ValueError, match=r"with 3 channels as in .* got shape \(8, 1, 8, 8\)"):
        attack_batch(build("vit"), images(), Attack(), Normalization((0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ValueError, match=r"must contain `pixel_values` or `input_ids`, got \['input_values'\]"):
        attack_batch(build("vit"), {"input_values": torch.rand(2, 100), "labels": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of `input_ids`, \(4, 10\), got"):
        attack_batch(build("bert"), inputs("bert") | {"attention_mask": torch.ones(4, 1, 10, 10)})


def test_models_that_are_not_classifiers_are_refused() -> None:
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    batch = inputs("bert")
    with pytest.raises(ValueError, match=r"BertModel returned no logits .*expected \(B, C\) with C >= 2"):
        attack_batch(BertModel(BertConfig(**small)), batch)
    with pytest.raises(ValueError, match=r"logits of shape \(4, 10, 2\) for 4 labels"):
        attack_batch(BertForTokenClassification(BertConfig(**small)), batch)
    with pytest.raises(ValueError, match=r"logits of shape \(4, 1\)"):
        attack_batch(build("bert", num_labels=1), batch)
    with pytest.raises(ValueError, match="problem_type='multi_label_classification', expected"):
        attack_batch(build("bert", problem_type="multi_label_classification"), batch)


def test_broken_models_are_refused() -> None:
    model = build("vit")
    with torch.no_grad():
        model.classifier.bias[0] = math.nan
    with pytest.raises(ValueError, match="returned logits with NaN or infinity.*diverged"):
        attack_batch(model, images(), Attack(), DIGITS)

    class Detached(LinearClassifier):
        def forward(self, pixel_values: Tensor) -> SimpleNamespace:
            return super().forward(pixel_values.detach())

    batch = {"pixel_values": torch.rand(2, 3, 4, 4), "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="logits have no gradient with respect to its inputs"):
        attack_batch(Detached(), batch, Attack(), Normalization())
    with pytest.raises(ValueError, match="logits have no gradient with respect to its inputs"):
        attack_batch(Detached().requires_grad_(False), batch, Attack(), Normalization())

    class Kinked(LinearClassifier):
        def forward(self, pixel_values: Tensor) -> SimpleNamespace:
            return super().forward(pixel_values + (0 * pixel_values).sqrt())

    with pytest.raises(ValueError, match="gradient .* contains NaN or infinity"):
        attack_batch(Kinked(), batch, Attack(), Normalization())


def test_a_model_that_reads_its_token_ids_is_refused_if_its_logits_differ() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config).eval()
    labels = torch.arange(4) % 2
    # It classifies by the last token, which cannot be found in embeddings that end in padding.
    with pytest.raises(ValueError, match="returns different logits for embeddings than .*Pad on the other"):
        attack_batch(model, inputs("llama", padding="right") | {"labels": labels})
    result = attack_batch(model, inputs("llama", padding="left") | {"labels": labels}, Attack.pgd(epsilon=0.01))
    assert (result.loss > result.clean_loss).all()


def test_empty_batches_and_epsilons_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected at least one batch to attack, got none"):
        robust_accuracy(build("vit"), [], Attack(), DIGITS)
    with pytest.raises(ValueError, match="`epsilons` must name at least one bound"):
        robustness_curve(build("vit"), [images()], [], Attack(), DIGITS)
    with pytest.raises(ValueError, match="`epsilon` must be a finite number >= 0, got -1"):
        robustness_curve(build("vit"), [images()], [0, -1.0], Attack(), DIGITS)
