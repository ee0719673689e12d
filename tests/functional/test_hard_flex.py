"""Hard attention by FlexAttention: the ranking kernel, the bits, the blocks, and compilation.

Without a GPU the kernel runs in Triton's interpreter, and FlexAttention as the tensor functions that define it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint


pytest.importorskip("triton", reason="Triton is there on Linux only")
from hf_attentiondrop.functional import block_mask, flex_hard_attention, hard_attention, sample_masked_ranks
from hf_attentiondrop.functional.hard.flex import pack_masked_keys
from hf_attentiondrop.functional.hard.top_scores import KEYS_PER_TILE, QUERIES_PER_TILE, top_score_indices

from .. import reference
from ..cases import CASES_BY_NAME


FILLS = ["mask", "zero"]
NAMES = [
    "none",
    "causal_without_mask",
    "sliding_window",
    "cross_padding",
    "grouped_queries_causal",
    "masks_per_head_grouped",
    "fully_masked_causal",
    "static_prefill",
    "pooled_keys",
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


pytestmark = pytest.mark.usefixtures("flex_attention")


def states(queries: int, keys: int, size: int = 16, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key and value, grouped, in the memory layout of models."""
    shapes = [(queries, 2), (keys, 1), (keys, 1)]
    made = [torch.randn(2, *shape, size, device=DEVICE, dtype=dtype).transpose(1, 2) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=DEVICE).tril()


def padding(queries: int, keys: int) -> torch.Tensor:
    lengths = torch.tensor([keys, 2], device=DEVICE)
    return (torch.arange(keys, device=DEVICE) < lengths[:, None])[:, None, None]


def window(queries: int, keys: int) -> torch.Tensor:
    return causal(queries, keys) & ~causal(queries, keys).tril(-6) & padding(queries, keys)


def scattered(queries: int, keys: int) -> torch.Tensor:
    return torch.rand(2, 2, queries, keys, device=DEVICE) < 0.3


MASKS: dict[str, Callable[[int, int], torch.Tensor | None]] = {
    "none": lambda queries, keys: None,
    "causal": causal,
    "padding": padding,
    "window": window,
    "scattered": scattered,
}


@pytest.mark.parametrize(
    ("mask", "size", "dtype", "k"),
    [
        ("causal", 40, torch.float32, 5),
        ("padding", 64, torch.bfloat16, 8),
        ("window", 72, torch.float16, 5),
        ("scattered", 80, torch.bfloat16, 8),
        ("causal_without_mask", 128, torch.bfloat16, 5),
        ("scattered", 32, torch.float16, 1),
        ("none", 16, torch.float32, 3),
    ],
)
def test_the_kernel_finds_what_topk_finds(mask: str, size: int, dtype: torch.dtype, k: int) -> None:
    queries, keys = QUERIES_PER_TILE[dtype] + 5, KEYS_PER_TILE + 5
    query, key, _ = states(queries, keys, size, dtype)
    is_causal = mask == "causal_without_mask"
    visible = None if is_causal else MASKS[mask](queries, keys)
    shown = causal(queries, keys) if is_causal else visible
    shown = (torch.ones_like(causal(queries, keys)) if shown is None else shown).expand(2, 2, queries, keys)
    scores = (query.double() @ key.double().repeat_interleave(2, dim=1).mT).masked_fill(~shown, -torch.inf)
    top = scores.topk(k)
    index = top_score_indices(query.detach(), key.detach(), k, visible, is_causal)
    assert torch.equal(index, torch.where(top.values > -torch.inf, top.indices, -1).int())


def test_the_kernel_follows_the_rules_of_torch() -> None:
    query, key, _ = (tensor.detach() for tensor in states(5, 5))
    torch.library.opcheck(top_score_indices, (query, key, 2, causal(5, 5)))


def test_nan_and_infinite_scores_do_not_hang() -> None:
    query, key, _ = (tensor.detach() for tensor in states(5, 40))
    key[0, 0, 3] = torch.nan
    key[0, 0, 4] = torch.inf
    index = top_score_indices(query, key, 3)
    assert ((index >= -1) & (index < 40)).all() and (index[1] >= 0).all()


def test_every_key_has_its_bit() -> None:
    num_keys = 70
    index = torch.stack([torch.randperm(num_keys)[:40] for _ in range(6)])
    is_masked = torch.rand(6, 40) < 0.5
    words = pack_masked_keys(index, is_masked, num_keys)
    keys = torch.arange(num_keys)
    found = (words[:, keys // 32] >> (keys % 32)) & 1
    assert words.shape == (6, 3)
    assert torch.equal(found.bool(), torch.zeros(6, num_keys, dtype=torch.bool).scatter(-1, index, is_masked))


@pytest.mark.parametrize("mask", ["causal", "padding", "window", "scattered", "causal_without_mask"])
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (40, 270), (257, 128)])
def test_blocks_are_those_of_the_mask(mask: str, queries: int, keys: int) -> None:
    is_causal = mask == "causal_without_mask"
    visible = None if is_causal else MASKS[mask](queries, keys)
    shown = (causal(queries, keys) if is_causal else visible).expand(2, 2, queries, keys)
    found = block_mask(visible, is_causal, queries, keys, DEVICE)
    wanted = flex.create_block_mask(lambda b, h, q, k: shown[b, h, q, k], 2, 2, queries, keys, device=DEVICE)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        counts = getattr(wanted, name)
        assert torch.equal(getattr(found, name).expand_as(counts), counts), name
    assert torch.equal(found.to_dense().expand_as(wanted.to_dense()), wanted.to_dense())
    assert torch.equal(flex.create_mask(found.mask_mod, 2, 2, queries, keys, DEVICE), shown)


def with_gradients(attend: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> list[torch.Tensor]:
    output = attend(*tensors)
    return [output, *torch.autograd.grad(output.square().sum(), tensors)]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_definition_forward_and_backward(name: str, fill: str) -> None:
    case = CASES_BY_NAME[name]
    masked_ranks = case.masked_ranks(fill)
    mask = case.mask() if case.mask() is None else case.mask().to(DEVICE)

    def library(*tensors: torch.Tensor) -> torch.Tensor:
        on_device = (tensor.to(DEVICE, torch.float32) for tensor in tensors)
        options = {"is_causal": case.is_causal, "scaling": 0.3, "fill": fill}
        return flex_hard_attention(*on_device, masked_ranks.to(DEVICE), mask, **options).double().cpu()

    def definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores, visible = reference.final_scores(query, key, scaling=0.3), case.visible
        candidates = scores.detach().masked_fill(~visible, -torch.inf).argsort(dim=-1, descending=True)[..., :3]
        masked = torch.zeros_like(visible).scatter(-1, candidates, masked_ranks) & visible
        scores, visible = reference.with_masked_scores(scores, visible, masked, fill)
        return reference.attend(scores, value, visible)[0]

    tensors = [tensor.float().double().requires_grad_() for tensor in case.tensors(head_dim=16)]
    found, wanted = with_gradients(library, *tensors), with_gradients(definition, *tensors)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("fill", FILLS)
def test_values_may_have_another_size(fill: str) -> None:
    query, key, value = states(9, 9)
    value = torch.cat([value, value], dim=-1)
    masked_ranks = torch.rand(2, 2, 9, 3, device=DEVICE) < 0.5
    found = with_gradients(lambda *tensors: flex_hard_attention(*tensors, masked_ranks, fill=fill), query, key, value)
    wanted = with_gradients(lambda *tensors: hard_attention(*tensors, masked_ranks, fill=fill), query, key, value)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_changing_lengths_recompile_only_once() -> None:
    torch._dynamo.reset()
    counters.clear()
    for length in (11, 14, 19):
        visible = window(length, length)
        num_visible = visible.sum(dim=-1, keepdim=True)
        masked_ranks = sample_masked_ranks((2, 2, length, length), num_visible, p=0.5, k=3, device=DEVICE)
        flex_hard_attention(*states(length, length), masked_ranks, visible)
    assert counters["stats"]["unique_graphs"] == 2  # one for the first length, and one for all others


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_draw(use_reentrant: bool) -> None:
    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        return flex_hard_attention(*tensors, torch.rand(2, 2, 9, 3, device=DEVICE) < 0.5)

    tensors, gradients = states(9, 9), []
    for run in (layer, lambda *tensors: checkpoint(layer, *tensors, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        output = run(*tensors)
        output.square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
        for tensor in tensors:
            tensor.grad = None
    torch.testing.assert_close(*gradients)


def test_autocast_accepts_states_of_two_dtypes() -> None:
    query, key, value = states(9, 9)
    masked_ranks = torch.rand(2, 2, 9, 3, device=DEVICE) < 0.5
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = flex_hard_attention(query, key, value.bfloat16(), masked_ranks)
    assert output.dtype == torch.bfloat16
    rounded = (tensor.bfloat16() for tensor in (query, key, value))
    torch.testing.assert_close(output, hard_attention(*rounded, masked_ranks), rtol=0, atol=2e-2)


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_and_stays_in_their_registers(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.kernel_resources"]
    printed = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout
    kernels = [json.loads(line) for line in printed.splitlines()]
    assert {kernel["capability"] for kernel in kernels} == {80, 90}
    assert all(kernel["stack"] <= 32 and kernel["shared"] <= 48 * 1024 for kernel in kernels), kernels
