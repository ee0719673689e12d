"""The divergences match their plain formulas: value, gradient, extreme logits, weights, precision."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hf_attentiondrop.training.losses as losses
from hf_attentiondrop.training.losses import DIVERGENCES, PROBLEM_TYPES, consistency_loss


SHAPES = {"rows": (8, 5), "tokens": (6, 7, 11), "one_class": (4, 1), "grid": (4, 2, 3, 6)}
# Of the value, computed in float32 or float64, and of the gradient, which has the dtype of the logits.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (2e-5, 1e-2),
    torch.float16: (2e-5, 2e-3),
}
NO_CATEGORIES = [kind for kind in PROBLEM_TYPES if kind != "single_label_classification"]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def divergence_of(log_p: Tensor, log_q: Tensor, divergence: str) -> Tensor:
    """The formula, item by item."""
    if divergence == "symmetric_kl":
        return (kl(log_p, log_q) + kl(log_q, log_p)) / 2
    if divergence == "kl":
        return kl(log_p, log_q)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def plain(logits: Tensor, weights: Tensor, divergence: str) -> Tensor:
    items = divergence_of(*logits.double().log_softmax(-1).chunk(2), divergence)
    return (items * weights.double()).sum() / weights.double().sum()


def random_logits(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_match_the_formula(divergence: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, weights = random_logits(*shape, dtype=dtype), torch.rand(shape[0] // 2, *shape[1:-1])
    value, reference = consistency_loss(logits, weights, divergence), plain(logits, weights, divergence)
    assert value.shape == () and value.dtype == torch.promote_types(dtype, torch.float32)
    (gradient,), (expected,) = (torch.autograd.grad(loss, logits) for loss in (value, reference))
    assert gradient.dtype == dtype
    of_value, of_gradient = TOLERANCES[dtype]
    torch.testing.assert_close(value.double(), reference, rtol=of_value, atol=1e-7)
    torch.testing.assert_close(gradient, expected, rtol=of_gradient, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence: str) -> None:
    weights = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]], dtype=torch.float64)
    logits = random_logits(4, 3, 5)
    assert torch.autograd.gradcheck(lambda z: consistency_loss(z, weights, divergence), logits)
    for problem_type in NO_CATEGORIES:
        loss = lambda z, kind=problem_type: consistency_loss(z, weights[:, 2], divergence, kind)  # noqa: E731
        assert torch.autograd.gradcheck(loss, random_logits(4, 3))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_multi_label_sums_the_bernoulli_divergences_of_the_labels(divergence: str) -> None:
    logits, weights = random_logits(10, 4), torch.rand(5)
    two_sided = torch.stack((F.logsigmoid(logits), F.logsigmoid(-logits)), dim=-1)
    items = divergence_of(*two_sided.chunk(2), divergence).sum(-1)
    expected = (items * weights).sum() / weights.sum()
    value = consistency_loss(logits, weights, divergence, "multi_label_classification")
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (value, expected)]
    torch.testing.assert_close(*gradients)


def test_regression_is_the_mean_squared_difference() -> None:
    logits, targets = random_logits(10, 3), torch.randn(5, 3, dtype=torch.float64)
    value = consistency_loss(logits, problem_type="regression")
    first, second = logits.chunk(2)
    torch.testing.assert_close(value, F.mse_loss(first, second))
    published = F.mse_loss(first, targets) + F.mse_loss(second, targets) + F.mse_loss(first, second)
    torch.testing.assert_close(published, 2 * (F.mse_loss(logits, torch.cat((targets, targets))) + 0.5 * value))


PUBLISHED = {
    # R-Drop's classifiers sum the divergences over the rows of a batch and average the cross entropies.
    "vit": (lambda kls: 0.3 * kls.sum(), lambda rows: 0.3 * rows),
    "bert": (lambda kls: 0.25 * kls.sum(), lambda rows: 0.25 * rows),
    "translation": (lambda kls: 5 * 0.5 * kls.mean(), lambda rows: 2.5),
    "language_model": (lambda kls: 1 * 0.5 * kls.mean(), lambda rows: 0.5),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_settings_are_twice_the_loss_with_the_weight_in_the_documentation(preset: str) -> None:
    logits, labels = random_logits(2 * 8, 5), torch.randint(5, (8,))
    log_p, log_q = logits.log_softmax(-1).chunk(2)
    penalty, weight = PUBLISHED[preset]
    cross_entropies = F.nll_loss(log_p, labels) + F.nll_loss(log_q, labels)
    published = cross_entropies + penalty(kl(log_p, log_q) + kl(log_q, log_p))
    task_loss = F.cross_entropy(logits, torch.cat((labels, labels)))
    torch.testing.assert_close(published, 2 * (task_loss + weight(8) * consistency_loss(logits)))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_equal_passes_have_no_divergence_and_others_have_some(divergence: str, dtype: torch.dtype) -> None:
    half = random_logits(4, 50, dtype=dtype).detach()
    logits = torch.cat((half, half)).requires_grad_()
    value = consistency_loss(logits, divergence=divergence)
    assert value == 0 and torch.autograd.grad(value, logits)[0].abs().max() < 1e-6
    assert consistency_loss(torch.cat((half, half.flip(-1))), divergence=divergence) > 0.1


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_both_passes_get_a_gradient(divergence: str) -> None:
    logits = random_logits(6, 5)
    consistency_loss(logits, divergence=divergence).backward()
    assert all(row.abs().max() > 1e-3 for row in logits.grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_vocabulary_contributes_nothing(divergence: str) -> None:
    kept = torch.tensor([0, 2, 3, 6])
    logits = random_logits(6, 7, dtype=torch.float32).detach()
    masked = torch.full_like(logits, -math.inf).index_copy(-1, kept, logits[:, kept]).requires_grad_()
    value = consistency_loss(masked, divergence=divergence)
    torch.testing.assert_close(value, consistency_loss(logits[:, kept], divergence=divergence))
    value.backward()
    assert masked.grad.isfinite().all() and masked.grad[:, [1, 4, 5]].eq(0).all() and masked.grad[:, kept].ne(0).all()


def test_classes_masked_only_in_the_first_pass() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    p, q = logits.detach().double().softmax(-1)
    for divergence, expected in {
        "kl": (p[1:] * (p[1:] / q[1:]).log()).sum(),
        "js": (q[0] * math.log(2) + sum(x[1:] @ (2 * x[1:] / (p + q)[1:]).log() for x in (p, q))) / 2,
    }.items():
        value = consistency_loss(logits, divergence=divergence)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
        assert torch.autograd.grad(value, logits)[0].isfinite().all()
    assert consistency_loss(logits) > 1e30, "the symmetric divergence is infinite and must not vanish"


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_stay_finite(divergence: str) -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]], requires_grad=True)
    value = consistency_loss(logits, divergence=divergence)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()
    assert value.item() == pytest.approx(math.log(2) if divergence == "js" else 2e4, rel=1e-5)


def test_js_keeps_its_precision_for_nearly_equal_passes() -> None:
    half = torch.randn(4, 100)
    logits = torch.cat((half, half + 1e-3 * torch.randn(4, 100)))
    torch.testing.assert_close(
        consistency_loss(logits, divergence="js").double(), plain(logits, torch.ones(4), "js"), rtol=2e-2, atol=0
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_items_without_weight_are_skipped(divergence: str) -> None:
    logits = random_logits(8, 5)
    kept = torch.tensor([True, False, True, False])
    poisoned = torch.where(kept.repeat(2)[:, None], logits.detach(), torch.nan).requires_grad_()
    value = consistency_loss(poisoned, kept, divergence)
    torch.testing.assert_close(value, consistency_loss(logits[kept.repeat(2)], divergence=divergence))
    value.backward()
    assert poisoned.grad[kept.repeat(2)].ne(0).all() and poisoned.grad[~kept.repeat(2)].eq(0).all()


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_a_second_pass_of_some_rows(problem_type: str) -> None:
    """Compared with the stacked logits of these rows: value, and gradient in the place of each row."""
    logits, rows, weights = random_logits(5 + 2, 4), torch.tensor([3, 1]), torch.tensor([0.5, 2.0])
    stacked = torch.cat((logits[rows], logits[5:]))
    results = []
    for value in (
        consistency_loss(logits, weights, problem_type=problem_type, rows=rows),
        consistency_loss(stacked, weights, problem_type=problem_type),
    ):
        results.append((value, torch.autograd.grad(value, logits)[0]))
    torch.testing.assert_close(*results)
    assert results[0][0] > 0
    nothing = consistency_loss(logits[:5], rows=rows[:0], problem_type=problem_type)
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].eq(0).all()


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_without_items_the_loss_is_zero(problem_type: str) -> None:
    logits = random_logits(8, 5)
    value = consistency_loss(logits, torch.zeros(4), problem_type=problem_type)
    value.backward()
    assert value == 0 and logits.grad.eq(0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_chunk_size_does_not_change_the_result(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, weights = random_logits(20, 3, 7), (torch.rand(10, 3) > 0.3).double()
    results = []
    for elements in (1, 50, 10**6):
        monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", elements)
        value = consistency_loss(logits, weights, divergence)
        results.append((value, torch.autograd.grad(value, logits)[0]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_a_loss_scale_saves_float16_gradients_from_underflow() -> None:
    """The backward pass applies the scale before rounding; an unscaled gradient would round to 0 in float16."""
    logits = random_logits(2 * 512, 64, dtype=torch.float16, scale=0.02)
    (gradient,) = torch.autograd.grad(65536 * consistency_loss(logits), logits)
    (expected,) = torch.autograd.grad(65536 * plain(logits, torch.ones(512), "symmetric_kl"), logits)
    assert (gradient - expected).abs().max() < 2e-3 * expected.abs().max()
    assert gradient.ne(0).float().mean() > 0.99


def test_it_runs_in_a_compiled_step() -> None:
    weight = torch.randn(5, 6)

    def step(x: Tensor) -> Tensor:
        return consistency_loss(x @ weight)

    x = torch.randn(4, 5, requires_grad=True)
    results = [(loss, torch.autograd.grad(loss, x)[0]) for loss in (step(x), torch.compile(step, backend="eager")(x))]
    torch.testing.assert_close(*results)


def test_autocast_does_not_lower_the_precision() -> None:
    logits, weights = random_logits(6, 7, dtype=torch.float32), torch.rand(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = consistency_loss(logits, weights)
    assert torch.equal(value, consistency_loss(logits, weights))


def test_a_second_derivative_raises() -> None:
    logits = random_logits(4, 5)
    (gradient,) = torch.autograd.grad(consistency_loss(logits).square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("`divergence` must be one of .*'symmetric_kl'.*got 'hellinger'", {"divergence": "hellinger"}),
        ("`problem_type` must be one of .*got 'ranking'", {"problem_type": "ranking"}),
        (r"stack two passes as \(2B, ..., C\), got shape \(3, 5\)", {"logits": torch.zeros(3, 5)}),
        (r"stack two passes as \(2B, ..., C\), got shape \(4,\)", {"logits": torch.zeros(4)}),
        (r"one entry per item, shape \(2,\), got \(4,\)", {"weights": torch.ones(4)}),
    ],
)
def test_bad_arguments_raise(message: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=message):
        consistency_loss(**{"logits": torch.zeros(4, 5), **arguments})


@pytest.mark.slow
def test_the_benchmark_measures_less_memory_than_the_plain_form(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    options = {
        "items": 128,
        "classes": 30000,
        "repeats": 1,
        "dtypes": "float32",
        "divergences": "js",
        "output": tmp_path,
    }
    command = [sys.executable, root / "benchmarks" / "consistency_loss.py"]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(root)})
    (case,) = json.loads((tmp_path / "consistency_loss.json").read_text())["cases"]
    gradient = 2 * 128 * 30000 * 4 / 1e6
    assert gradient < case["lean"]["peak_mb"] < 1.6 * gradient < 4 * gradient < case["plain"]["peak_mb"]
    assert "| js | float32 |" in (tmp_path / "consistency_loss.md").read_text()
