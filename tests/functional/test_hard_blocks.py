"""Hard attention in blocks: derivatives, checkpointing, precision, and the keys that it skips."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from hf_attentiondrop.functional import hard_attention, mask_top_scores, sample_masked_ranks
from hf_attentiondrop.functional.blockwise import blocks

from ..cases import CASES_BY_NAME


NAMES = [
    "none",
    "causal_without_mask",
    "padding_left",
    "masks_per_head_grouped",
    "fully_masked",
    "cross_random",
    "cached",
]
ADDITIVE = ["float_with_bias", "fully_masked_float", "fully_masked_float_minus_infinity", "bias_grouped"]
FILLS = ["mask", "zero"]


pytestmark = pytest.mark.usefixtures("small_blocks")


def attend(name: str, fill: str, dropout: float = 0.0) -> tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]:
    """Hard attention on a mask of the table, as a function of query, key and value alone, and these."""
    case = CASES_BY_NAME[name]
    masked_ranks, mask = case.masked_ranks(fill), case.mask()
    tensors = tuple(tensor[..., :4].requires_grad_() for tensor in case.tensors())

    def function(*states: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return hard_attention(*states, masked_ranks, mask, is_causal=case.is_causal, fill=fill, dropout=dropout)

    return function, tensors


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", [*NAMES, *ADDITIVE])
def test_gradients_are_the_slopes(name: str, fill: str, dropout: float) -> None:
    assert gradcheck(*attend(name, fill, dropout), fast_mode=True)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("name", "dropout"), [("causal_without_mask", 0.0), ("masks_per_head_grouped", 0.3), ("float_with_bias", 0.3)]
)
def test_the_operator_follows_the_rules_of_torch(name: str, dropout: float, fill: str) -> None:
    case, (_, tensors) = CASES_BY_NAME[name], attend(name, fill)
    masked_ranks, seed = case.masked_ranks(fill), torch.tensor(5) if dropout else None
    operator = torch.ops.hf_attentiondrop.hard_attention.default
    torch.library.opcheck(operator, (*tensors, masked_ranks, case.mask(), seed, case.is_causal, 0.5, fill, dropout))


def weights(name: str, fill: str, dropout: float, draws: int = 1) -> torch.Tensor:
    """The attention weights, `(draws, B, H, Q, K)`, each draw of which masks the same scores."""
    case = CASES_BY_NAME[name]
    query, key, _ = case.tensors()
    value = torch.eye(case.keys, dtype=torch.float64).expand(case.batch_size, case.kv_heads, -1, -1)
    masked_ranks = case.masked_ranks(fill)
    options = {"is_causal": case.is_causal, "fill": fill, "dropout": dropout}
    results = [hard_attention(query, key, value, masked_ranks, case.mask(), **options) for _ in range(draws)]
    return torch.stack(results).transpose(2, 3)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", ["causal_without_mask", "masks_per_head_grouped", "fully_masked_float"])
def test_dropout_has_its_rate_and_scales_the_kept_weights(name: str, fill: str) -> None:
    rate, draws = 0.3, 80
    plain, dropped = weights(name, fill, 0.0), weights(name, fill, rate, draws)
    is_kept = dropped != 0
    torch.testing.assert_close(dropped, plain.div(1 - rate).where(is_kept, 0.0), rtol=1e-4, atol=0)
    kept = is_kept[:, plain[0] > 0].double()  # (draws, weights)
    error = (rate * (1 - rate) / draws) ** 0.5
    assert ((kept.mean(dim=0) - (1 - rate)).abs() < 5 * error).all()
    assert (kept.mean(dim=1).std() / (rate * (1 - rate) / kept.shape[1]) ** 0.5 - 1).abs() < 0.3, "not independent"


def test_dropout_is_independent_between_blocks_and_samples() -> None:
    is_kept = weights("none", "zero", 0.5)[0] != 0  # (B, H, Q, K)
    rows = is_kept.flatten(0, 2)
    assert len(rows.unique(dim=0)) > 0.75 * len(rows)  # 9 bits each


@pytest.mark.parametrize(("rate", "kept"), [(1.0, 0.0), (1e-9, 1.0)])
def test_dropout_at_its_limits(rate: float, kept: float) -> None:
    torch.testing.assert_close(weights("none", "mask", rate), kept * weights("none", "mask", 0.0))


def test_a_mask_that_requires_a_gradient_is_rejected() -> None:
    mask = torch.zeros(1, 1, 9, 9, requires_grad=True)
    tensors = CASES_BY_NAME["none"].tensors(torch.float32)
    with pytest.raises(ValueError, match="constant mask.*mask_top_scores"):
        hard_attention(*tensors, torch.ones(3, 4, 9, 3) > 0, mask)


@pytest.mark.parametrize("fill", FILLS)
def test_values_may_have_another_size(fill: str) -> None:
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
    masked_ranks = torch.rand(2, 4, 9, 3) < 0.5
    output = hard_attention(query, key, value, masked_ranks, fill=fill)
    again = hard_attention(query, key, torch.cat([value, value], dim=-1), masked_ranks, fill=fill)
    assert output.shape == (2, 9, 4, 5)
    torch.testing.assert_close(again, torch.cat([output, output], dim=-1))


def test_a_masked_rank_masks_the_score_of_that_rank() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0])
    masked_ranks = torch.tensor([False, True, False]).view(1, 1, 1, 3)
    key, value = scores.view(1, 1, 4, 1), torch.eye(4)[None, None]
    weights = hard_attention(torch.ones(1, 1, 1, 1), key, value, masked_ranks)
    torch.testing.assert_close(weights.flatten(), scores.masked_fill(scores == 2, -torch.inf).softmax(dim=-1))


@pytest.mark.parametrize("fill", FILLS)
def test_no_gradient_flows_through_a_masked_score(fill: str) -> None:
    """With one query and one component, the gradient of a key is the gradient of its score."""
    key = torch.randn(1, 1, 9, 1, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, 1, 9, 4, dtype=torch.float64)
    hard_attention(torch.ones_like(key[:, :, :1]), key, value, torch.ones(1, 1, 1, 3) > 0, fill=fill).sum().backward()
    is_masked = mask_top_scores(key.detach().mT, p=1.0, k=3).flatten() == -torch.inf
    assert is_masked.sum() == 3
    assert (key.grad.flatten()[is_masked] == 0).all() and (key.grad.flatten()[~is_masked] != 0).all()


@pytest.mark.parametrize("name", ["padding_right", "sliding_window", "causal_without_mask", "packed"])
def test_keys_that_no_query_of_a_block_sees_are_skipped(name: str) -> None:
    case = CASES_BY_NAME[name]
    query, key, _ = case.tensors()
    mask = case.mask()
    found = list(blocks.each_block(query, key, mask, case.is_causal))
    work = sum(
        (b.heads.stop - b.heads.start) * (b.queries.stop - b.queries.start) * (b.keys.stop - b.keys.start)
        for b in found
    )
    assert case.visible.sum() <= work < 0.85 * case.visible.numel()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("fill", FILLS)
def test_checkpointing_repeats_the_draw(fill: str, dropout: float, use_reentrant: bool) -> None:
    def layer(*states: torch.Tensor) -> torch.Tensor:
        return hard_attention(*states, torch.rand(3, 4, 9, 3) < 0.5, fill=fill, dropout=dropout)

    gradients = []
    for run in (layer, lambda *states: checkpoint(layer, *states, use_reentrant=use_reentrant)):
        tensors = [tensor.requires_grad_() for tensor in CASES_BY_NAME["none"].tensors()]
        torch.manual_seed(0)
        run(*tensors).square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, repeated)


@pytest.mark.parametrize("name", ["none", "float_with_bias"])
def test_compiled_into_one_graph_it_draws_the_same(name: str) -> None:
    tensors = attend(name, "mask")[1]
    mask, num_visible = CASES_BY_NAME[name].mask(), CASES_BY_NAME[name].visible.sum(dim=-1, keepdim=True)

    def total(*states: torch.Tensor) -> torch.Tensor:
        masked_ranks = sample_masked_ranks((3, 4, 9, 9), num_visible, p=0.5, k=3)
        return hard_attention(*states, masked_ranks, mask, dropout=0.3).square().sum()

    torch._dynamo.reset()
    results = []
    for run in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(run(*tensors), tensors))
    for plain, from_graph in zip(*results, strict=True):
        torch.testing.assert_close(plain, from_graph)


@pytest.mark.parametrize("fill", FILLS)
def test_autocast_does_not_change_the_precision(fill: str) -> None:
    function, tensors = attend("causal_without_mask", fill)
    states = [tensor.detach().to(torch.bfloat16).requires_grad_() for tensor in tensors]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = function(*states)
            results.append([output, *torch.autograd.grad(output.float().square().sum(), states)])
    assert all(a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_second_derivative_raises() -> None:
    function, tensors = attend("none", "mask")
    gradient = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient[0].sum().backward()
