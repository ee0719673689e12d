"""Blurred Attention Smoothing: reference, and errors for softcapped models."""

from dataclasses import replace

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

from hf_attentiondrop import BlurredSmoothing
from hf_attentiondrop.integration.functions import attention_drop_forward

from .. import reference as definitions
from ..attention import make_module
from ..cases import CASES_BY_NAME
from . import Definition


EXAMPLES = {"blur": BlurredSmoothing(sigma_max=2.0, width=5)}
IDLE = [BlurredSmoothing(sigma_max=1e-3)]


def reference(blur: BlurredSmoothing, definition: Definition) -> Definition:
    case = definition.case
    sigma = blur.sigma_max * torch.rand(case.batch_size, dtype=torch.float64)
    scores = definitions.blurred_scores(definition.scores, case.own_view, sigma, blur.width)
    return replace(definition, scores=scores)


def test_a_softcap_raises() -> None:
    case = CASES_BY_NAME["none"]
    module = make_module(case, EXAMPLES["blur"], Gemma2Attention)
    with pytest.raises(ValueError, match='caps its scores.*variant="hard"'):
        attention_drop_forward(module, *case.tensors(), None, softcap=2.0)
