"""Other kernels as base attention: masks are translated for them, and the results equal those of SDPA."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, CLIPConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from hf_attentiondrop import AffineScaledConfig, AttentionDropConfig, report, set_base_attention
from hf_attentiondrop.attention.kernels import attend_with
from hf_attentiondrop.attention.parts import configs_of
from hf_attentiondrop.methods.method import Perturbation

from . import reference
from .attention import position_bias
from .cases import CASES, AttentionCase
from .models import build, inputs


FLASH, OTHER = "flash_in_float64", "sdpa_that_counts"
WINDOW = 3
SELF_ATTENTION = [case for case in CASES if not case.is_cross and not case.position_bias]
# Masks that packing cannot express.
ONLY_SDPA = {
    "arbitrary", "bias_grouped", "cached", "cached_one_query", "cached_padding_left", "float_bias_far_from_zero",
    "fully_masked", "fully_masked_causal", "fully_masked_float", "fully_masked_float_minus_1e9",
    "fully_masked_float_minus_infinity",
    "float_minus_100_with_bias", "float_minus_1e4", "float_minus_1e9_per_head", "float_minus_infinity",
    "float_padding", "float_with_bias", "masks_per_head", "masks_per_head_grouped", "one_query", "pooled_keys",
    "static_prefill",
}  # fmt: skip


class Kernels:
    """Registers the two kernels of this file and records their calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def flash(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        """Imitates FlashAttention: no mask, but documents packed into one row."""
        assert attention_mask is None and options.get("position_ids") is None
        self.calls.append({"name": module.config._attn_implementation, "shape": tuple(query.shape), **options})
        length = query.shape[-2]
        position = torch.arange(length)
        starts = options.get("cu_seq_lens_q", torch.tensor([0, length]))
        run = torch.bucketize(position, starts[1:], right=True)
        visible = run[:, None] == run
        if options["is_causal"]:
            visible &= position[:, None] >= position
        if options.get("sliding_window"):
            visible &= (position[:, None] - position).abs() < options["sliding_window"]
        scaling = query.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"]
        scores = reference.final_scores(query, key, scaling=scaling)
        return reference.attend(scores, value, visible.expand_as(scores))[0], None

    def other(self, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
        self.calls.append(options)
        return sdpa_attention_forward(*arguments, **options)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    kernels = Kernels()
    # Replaces the FlashAttention functions that Transformers imports, because they need a GPU.
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda name: None)
    AttentionInterface.register(FLASH, kernels.flash)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    AttentionInterface.register(OTHER, kernels.other)
    AttentionMaskInterface.register(OTHER, sdpa_mask)
    yield kernels
    for name in (FLASH, OTHER):
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


def module_of(case: AttentionCase) -> nn.Module:
    module = nn.Module()
    module.config = PreTrainedConfig()
    module.num_key_value_groups = case.heads // case.kv_heads
    return module


def expected(case: AttentionCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = reference.final_scores(query, key, scaling=query.shape[-1] ** -0.5, bias=case.bias)
    return reference.attend(scores, value, case.visible)[0]


@pytest.mark.parametrize("case", SELF_ATTENTION, ids=lambda case: case.name)
def test_flash_attends_where_it_can_express_the_mask(kernels: Kernels, case: AttentionCase) -> None:
    states = [states.requires_grad_() for states in case.tensors()]
    options = {"sliding_window": WINDOW} if "window" in case.name else {}
    output = attend_with(FLASH, module_of(case), *states, case.mask(), is_causal=case.is_causal, **options)
    if output is None:
        assert case.name in ONLY_SDPA and not kernels.calls
        return
    assert case.name not in ONLY_SDPA and len(kernels.calls) == 1
    # Models discard outputs of padding, and FlashAttention does not compute them.
    is_real = case.visible.diagonal(dim1=-2, dim2=-1)[:, 0, :, None, None]
    right = expected(case, *states) * is_real
    assert torch.allclose(output * is_real, right, atol=1e-12)
    weight = torch.randn(right.shape, dtype=right.dtype, generator=torch.Generator().manual_seed(1)) * is_real
    for found, correct in zip(
        torch.autograd.grad(output, states, weight), torch.autograd.grad(right, states, weight), strict=True
    ):
        assert torch.allclose(found, correct, atol=1e-12)


def test_flash_takes_no_padding_into_its_rows(kernels: Kernels) -> None:
    case = next(case for case in CASES if case.name == "causal_padding_left")
    attend_with(FLASH, module_of(case), *case.tensors(), case.mask(), is_causal=True)
    (call,) = kernels.calls
    assert call["name"] == FLASH
    assert call["shape"] == (1, case.heads, 9 + 6 + 3, 8)
    assert call["cu_seq_lens_q"].tolist() == [0, 9, 15, 18] and call["max_length_k"] == 9


def test_flash_is_named_to_the_module_alone(kernels: Kernels) -> None:
    case = next(case for case in CASES if case.name == "causal_without_mask")
    module = module_of(case)
    module.config = CLIPConfig(attn_implementation="sdpa")
    attend_with(FLASH, module, *case.tensors(), None, is_causal=True)
    assert kernels.calls[0]["name"] == FLASH
    assert {config._attn_implementation for config in configs_of(module.config)} == {"sdpa"}


def test_flash_without_a_mask_gets_the_batch_as_it_is(kernels: Kernels) -> None:
    case = next(case for case in CASES if case.name == "causal_without_mask")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]])
    attend_with(FLASH, module_of(case), *case.tensors(), None, is_causal=True, position_ids=positions)
    (call,) = kernels.calls
    assert call["shape"] == (3, case.heads, 9, 8) and "cu_seq_lens_q" not in call


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flex_attends_under_every_boolean_mask(case: AttentionCase) -> None:
    states = case.tensors(torch.float32, head_dim=16)
    mask = case.mask()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        options = {"position_bias": bias.float()} if (bias := position_bias(case)) is not None else {}
        output = attend_with("flex_attention", module_of(case), *states, mask, is_causal=case.is_causal, **options)
    if case.position_bias or (mask is not None and mask.dtype != torch.bool):
        assert output is None
    else:
        assert torch.allclose(output, expected(case, *states), atol=1e-5)


def reals(batch: dict[str, Tensor], states: Tensor) -> Tensor:
    return states[batch["attention_mask"].bool()]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("method", ["attentiondrop", "affine_scaled"])
def test_models_on_flash_are_those_on_sdpa(kernels: Kernels, family: str, padding: str, method: str) -> None:
    options: dict[str, Any] = {"attention_drop": AttentionDropConfig(variant="blur", sigma_max=2.0)}
    if method == "affine_scaled":
        options["attention_reweighting"] = AffineScaledConfig(init="paper")
    batch = {name: value for name, value in inputs(family, padding=padding).items() if name != "labels"}
    states = {}
    for name in ("sdpa", FLASH):
        model = build(family, dropout=False, attn_implementation=method, **options).double()
        set_base_attention(model, name)
        for training in (False, True):
            torch.manual_seed(0)
            output = model.train(training)(**batch, output_hidden_states=True)
            states[name, training] = reals(batch, output.hidden_states[-1])
    assert len(kernels.calls) == 2 * 2  # evaluation and training, two layers
    for training in (False, True):
        assert torch.allclose(states["sdpa", training], states[FLASH, training], atol=1e-10)
    assert not torch.allclose(states[FLASH, False], states[FLASH, True])


def runs(model: PreTrainedModel, family: str) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    output = model(**inputs(family))
    output.loss.backward()
    return [output.logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("family", ["bert", "vit", "marian", "llama"])
@pytest.mark.parametrize("drop", [AttentionDropConfig(variant="blur"), AttentionDropConfig()], ids=["blur", "hard"])
def test_an_implementation_with_the_masks_of_sdpa_gets_them(kernels: Kernels, family: str, drop: Perturbation) -> None:
    model = build(family, attention_drop=drop).train()
    on_sdpa = runs(model, family)
    set_base_attention(model, OTHER)
    assert all(map(torch.equal, runs(model, family), on_sdpa))
    # Hard masking has one mask per query and so uses SDPA; Marian's cross-attention is not perturbed.
    own = {"blur": len(report(model).rows), "hard": sum(row.kind == "cross" for row in report(model).rows)}
    assert len(kernels.calls) == own[drop.variant]
    set_base_attention(model, "sdpa")
    kernels.calls.clear()
    assert all(map(torch.equal, runs(model, family), on_sdpa)) and not kernels.calls


def test_cross_attention_stays_on_sdpa_under_flash(kernels: Kernels) -> None:
    model = build("marian")
    set_base_attention(model, FLASH)
    on_flash = {row.kind for row in report(model).rows if row.implementation == f"attentiondrop on {FLASH}"}
    assert on_flash == {"encoder_self", "decoder_self"}
    model.set_attn_implementation("attentiondrop")  # new module states keep the base attention
    assert f"attentiondrop on {FLASH}" in str(report(model))


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("nonsense", ValueError, "nonsense"),
        ("eager", ValueError, "boolean masks of SDPA"),
        ("affine_scaled", ValueError, "cannot compute the base attention"),
    ],
)
def test_an_unsupported_base_raises(name: str, error: type[Exception], words: str) -> None:
    model = build("bert")
    with pytest.raises(error, match=words):
        set_base_attention(model, name)
    assert {row.implementation for row in report(model).rows} == {"attentiondrop"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="FlashAttention may be installed")
def test_flash_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(ImportError, match="(?i)flash"):
        set_base_attention(build("bert"), "flash_attention_2")


def test_a_model_without_our_attention_raises() -> None:
    with pytest.raises(ValueError, match="another base attention would have no effect"):
        set_base_attention(build("bert", attn_implementation="sdpa"), "flex_attention")
