"""The same function on a CUDA device, where other kernels run it: against the CPU in float64, and under autocast."""

import pytest
import torch

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.attention import attention_drop_forward

from .cases import CASES, AttentionCase
from .models import build, inputs
from .test_attention import VARIANTS, make_module, position_bias


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_idle_perturbation_equals_the_cpu(case: AttentionCase, variant: str) -> None:
    """The generators of the two devices differ, so the perturbation is one that leaves everything as it is."""
    drop = VARIANTS[variant]
    idle = AttentionDropConfig(variant=drop.variant, p=1e-12, k=drop.k, fill=drop.fill, sigma_max=1e-9)
    results = []
    for device in ("cpu", "cuda"):
        module = make_module(case, idle)
        tensors = [t.to(device).requires_grad_() for t in case.tensors()]
        mask, bias = case.mask(), position_bias(case)
        extras = {} if bias is None else {"position_bias": bias.to(device)}
        mask = None if mask is None else mask.to(device)
        output = attention_drop_forward(module, *tensors, mask, scaling=0.3, **extras)[0]
        gradients = torch.autograd.grad(output.square().sum(), tensors)
        results.append([output, *gradients])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["bert", "vit", "marian", "llama"])
def test_models_train_in_half_precision(family: str, variant: str, dtype: torch.dtype) -> None:
    model = build(family, attention_drop=VARIANTS[variant]).cuda().train()
    batch = {name: tensor.cuda() for name, tensor in inputs(family).items()}
    with torch.autocast("cuda", dtype=dtype):
        loss = model(**batch).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
