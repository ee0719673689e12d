"""DropHead: reference and statistics."""

from dataclasses import replace

import pytest
import torch

from hf_attentiondrop import DropHead
from hf_attentiondrop.functional.drophead import sample_head_scale

from . import Definition


EXAMPLES = {"drophead": DropHead(p=0.5)}
IDLE = [DropHead(p=1e-9)]


def reference(drophead: DropHead, definition: Definition) -> Definition:
    batch_size, heads = definition.case.batch_size, definition.case.heads
    uniform = torch.rand(batch_size, heads)
    scale = torch.zeros(batch_size, heads, 1, 1, dtype=torch.float64)
    for sample in range(batch_size):
        kept = [head for head in range(heads) if uniform[sample, head] >= drophead.p]
        kept = kept or [int(uniform[sample].argmax())]
        for head in kept:
            scale[sample, head] = heads / len(kept)
    return replace(definition, scale=definition.scale * scale)


def test_a_head_is_dropped_with_probability_p_and_the_expectation_stays() -> None:
    torch.manual_seed(0)
    scale = sample_head_scale(20_000, 12, p=0.3)
    assert abs((scale == 0).double().mean() - 0.3) < 0.005
    torch.testing.assert_close(scale.sum(dim=-1), torch.full((20_000,), 12.0))
    torch.testing.assert_close(scale.mean(dim=0), torch.ones(12), rtol=0, atol=0.02)
    together = ((scale[:, 0] == 0) & (scale[:, 1] == 0)).double().mean()
    assert abs(together - 0.09) < 0.01, "heads are not independent"


@pytest.mark.parametrize("p", [0.9, 1.0])
def test_one_head_chosen_uniformly_survives(p: float) -> None:
    torch.manual_seed(0)
    scale = sample_head_scale(20_000, 4, p=p)
    kept = scale > 0
    assert kept.any(dim=-1).all()
    alone = kept[kept.sum(dim=-1) == 1]
    assert ((alone.double().mean(dim=0) - 0.25).abs() < 0.015).all()
    assert (scale[kept.sum(dim=-1) == 1].amax(dim=-1) == 4).all()


def test_a_tensor_is_as_good_as_a_number() -> None:
    results = []
    for p in (0.4, torch.tensor(0.4, dtype=torch.float64)):
        torch.manual_seed(0)
        results.append(sample_head_scale(8, 4, p=p))
    assert torch.equal(*results)
