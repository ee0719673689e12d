"""The divergence looks at the items of the task loss, whatever the task."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_attentiondrop.training.consistency import LabelAlignment, answer_losses, has_dropout, output_divergence
from hf_attentiondrop.training.losses import consistency_loss

from .models import build


PLAIN = LabelAlignment()
CAUSAL = LabelAlignment(shifts_labels=True)


def divergence(logits: Tensor, labels: Tensor | None, alignment: LabelAlignment = PLAIN, **kwargs: Any) -> Tensor:
    return output_divergence({"logits": logits}, {"labels": labels}, alignment, **kwargs)


def test_classification_takes_the_rows_that_have_a_label() -> None:
    logits = torch.randn(6, 4)
    expected = consistency_loss(logits[[0, 2, 3, 5]])
    for labels in (torch.tensor([1, -100, 2]), torch.tensor([[1], [-100], [2]])):
        torch.testing.assert_close(divergence(logits, labels), expected)
    assert PLAIN.count_items({"labels": labels}, 3) == 2


def test_tokens_are_those_with_a_label() -> None:
    logits, labels = torch.randn(4, 5, 7), torch.tensor([[1, -100, 2, -100, -100], [3, 4, -100, 5, 6]])
    seen = torch.cat((labels, labels)).ne(-100)
    torch.testing.assert_close(divergence(logits, labels), consistency_loss(logits[seen]))
    assert PLAIN.count_items({"labels": labels}, 2) == 6


def test_causal_language_models_look_one_position_back() -> None:
    logits, labels = torch.randn(4, 5, 7), torch.tensor([[1, -100, 2, -100, -100], [3, 4, -100, 5, 6]])
    seen = torch.cat((labels, labels))[:, 1:].ne(-100)
    expected = consistency_loss(logits[:, :-1][seen])
    torch.testing.assert_close(divergence(logits, labels, CAUSAL), expected)
    assert CAUSAL.count_items({"labels": labels}, 2) == 4


def test_shifted_labels_are_taken_as_they_are() -> None:
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[1, 2, 3, -100]])
    batch = {"labels": torch.zeros(1, 4, dtype=torch.long), "shift_labels": labels}
    value = output_divergence({"logits": logits}, batch, CAUSAL)
    torch.testing.assert_close(value, consistency_loss(logits[:, :3]))
    assert CAUSAL.count_items(batch, 1) == 3


def test_virtual_tokens_stand_before_the_labels() -> None:
    logits, labels = torch.randn(2, 2 + 4, 7), torch.tensor([[1, 2, -100, 3]])
    causal = LabelAlignment(shifts_labels=True, virtual_tokens=2)
    torch.testing.assert_close(divergence(logits, labels, causal), consistency_loss(logits[:, [1, 2, 4]]))
    assert causal.count_items({"labels": labels}, 1) == 3
    plain = LabelAlignment(virtual_tokens=2)
    torch.testing.assert_close(divergence(logits, labels, plain), consistency_loss(logits[:, [2, 3, 5]]))
    # Encoder-decoder models put them into the encoder, and the logits get none.
    torch.testing.assert_close(divergence(logits[:, 2:], labels, plain), consistency_loss(logits[:, [2, 3, 5]]))


@pytest.mark.parametrize(
    ("classes", "labels", "problem_type", "resolved"),
    [
        (1, torch.randn(3), None, "regression"),
        (1, torch.tensor([1, 2, 3]), None, "regression"),
        (4, torch.rand(3, 4).round(), None, "multi_label_classification"),
        (4, torch.randn(3, 4), "regression", "regression"),
        (4, torch.tensor([0, 3, 1]), None, "single_label_classification"),
    ],
)
def test_the_kind_of_problem_is_found_as_transformers_finds_it(
    classes: int, labels: Tensor, problem_type: str | None, resolved: str
) -> None:
    logits = torch.randn(6, classes)
    value = divergence(logits, labels, problem_type=problem_type)
    torch.testing.assert_close(value, consistency_loss(logits, problem_type=resolved))
    assert PLAIN.count_items({"labels": labels}, 3) == 3


def test_answers_are_compared_by_their_start_and_their_end() -> None:
    start, end = torch.randn(4, 6), torch.randn(4, 6)
    batch = {
        "input_ids": torch.zeros(2, 6, dtype=torch.long),
        "start_positions": torch.tensor([2, 6]),
        "end_positions": torch.tensor([[3], [-1]]),
    }
    outputs = {"start_logits": start, "end_logits": end}
    value = output_divergence(outputs, batch, PLAIN)
    torch.testing.assert_close(value, torch.stack((consistency_loss(start[[0, 2]]), consistency_loss(end))))
    assert PLAIN.count_items(batch, 2).tolist() == [1, 2]
    assert LabelAlignment(virtual_tokens=1).count_items(batch, 2).tolist() == [2, 2]
    positions = torch.tensor([2, -100, 2, -100]), torch.tensor([3, 0, 3, 0])
    expected = [cross_entropy(*pair) for pair in zip((start, end), positions, strict=True)]
    torch.testing.assert_close(answer_losses(outputs, batch, PLAIN), torch.stack(expected))


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        ({"loss": torch.zeros(())}, torch.zeros(2), r"tensor `logits` in training, got \['loss'\].*fused_linear"),
        ((torch.zeros(4, 3),), torch.zeros(2), "tensor `logits` in training, got no mapping"),
        ({"logits": torch.zeros(4, 3)}, None, "labels of NoneType"),
        ({"logits": torch.zeros(4, 3, 8, 8)}, torch.zeros(2, 8, 8).long(), r"logits \(4, 3, 8, 8\)"),
        ({"logits": torch.zeros(4, 9, 3)}, torch.zeros(2, 5).long(), r"labels of 9 positions.*got shape \(2, 5\)"),
    ],
)
def test_tasks_whose_items_are_unknown_are_refused(outputs: Any, labels: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        output_divergence(outputs, {"labels": labels}, PLAIN)


def test_dropout_is_found_in_modules_and_in_functional_calls() -> None:
    assert has_dropout(build("bert")) and not has_dropout(build("bert", dropout=False))
    assert has_dropout(build("marian")) and not has_dropout(build("marian", dropout=False))
    assert not has_dropout(build("marian", dropout=False, encoder_layerdrop=0.5)), "it hits both passes alike"
    assert has_dropout(build("llama", attention_dropout=0.1)) and not has_dropout(build("llama"))
