"""DropKey: reference, and computation without a score matrix."""

from dataclasses import replace

import pytest
import torch

from hf_attentiondrop import DropKey
from hf_attentiondrop.integration.functions import attention_drop_forward
from hf_attentiondrop.methods import dropkey

from .. import reference as definitions
from ..attention import check_against_the_definition, make_module
from ..cases import CASES, CASES_BY_NAME, AttentionCase
from . import Definition


EXAMPLES = {"dropkey": DropKey(p=0.5), "dropkey_column": DropKey(p=0.5, axis="column")}
IDLE = [DropKey(p=1e-9), DropKey(p=1e-9, axis="column")]


def reference(dropkey: DropKey, definition: Definition) -> Definition:
    visible = definition.visible
    shape = visible.shape if dropkey.axis == "score" else (*visible.shape[:2], 1, visible.shape[-1])
    uniform = torch.rand(shape)
    dropped = definitions.dropped_keys(visible, uniform.expand(visible.shape), p=dropkey.p)
    return replace(definition, visible=visible & ~dropped)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_columns_in_blocks_equal_the_definition(case: AttentionCase, small_blocks: None) -> None:
    check_against_the_definition(case, [EXAMPLES["dropkey_column"]], dropout=0.0)


@pytest.mark.parametrize(
    ("axis", "name", "is_blockwise"),
    [
        ("score", "none", True),
        ("score", "position_bias", False),
        ("column", "none", False),
        ("column", "padding_left", False),
        ("column", "causal_without_mask", True),
        ("column", "packed", True),
    ],
)
def test_blocks_run_where_they_are_faster(
    axis: str, name: str, is_blockwise: bool, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = [], dropkey.dropkey_attention
    monkeypatch.setattr(dropkey, "dropkey_attention", lambda *a, **k: calls.append(a) or original(*a, **k))
    case = CASES_BY_NAME[name]
    extras = {"position_bias": torch.zeros(1, 4, 9, 9)} if case.position_bias else {}
    module = make_module(case, DropKey(axis=axis))
    attention_drop_forward(module, *case.tensors(torch.float32), case.mask(), **extras)
    assert bool(calls) is is_blockwise
