"""The divergence averages over the items of the task loss, for every task."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_attentiondrop.training.alignment import LabelAlignment
from hf_attentiondrop.training.arguments import ConsistencyArguments
from hf_attentiondrop.training.batch import ConsistencyBatch
from hf_attentiondrop.training.card import DIVERGENCE_FORMULAS, consistency_card
from hf_attentiondrop.training.checks import has_dropout
from hf_attentiondrop.training.losses import DIVERGENCES, consistency_loss

from .models import build


PLAIN = LabelAlignment()
CAUSAL = LabelAlignment(shifts_labels=True)


def batch_of(labels: Tensor | None, alignment: LabelAlignment = PLAIN, **values: Any) -> ConsistencyBatch:
    batch_size = 2 if labels is None else len(labels)
    return ConsistencyBatch({"labels": labels}, batch_size, alignment, **values)


def test_classification_takes_the_rows_with_a_label() -> None:
    logits = torch.randn(6, 4)
    for labels in (torch.tensor([1, -100, 2]), torch.tensor([[1], [-100], [2]])):
        batch = batch_of(labels)
        torch.testing.assert_close(batch.divergence({"logits": logits}), consistency_loss(logits[[0, 2, 3, 5]]))
        assert batch.num_items == 2


def test_token_tasks_take_the_tokens_with_a_label() -> None:
    logits, labels = torch.randn(4, 5, 7), torch.tensor([[1, -100, 2, -100, -100], [3, 4, -100, 5, 6]])
    mask = torch.cat((labels, labels)).ne(-100)
    batch = batch_of(labels)
    torch.testing.assert_close(batch.divergence({"logits": logits}), consistency_loss(logits[mask]))
    assert batch.num_items == 6


def test_causal_language_models_shift_the_labels() -> None:
    logits, labels = torch.randn(4, 5, 7), torch.tensor([[1, -100, 2, -100, -100], [3, 4, -100, 5, 6]])
    mask = torch.cat((labels, labels))[:, 1:].ne(-100)
    batch = batch_of(labels, CAUSAL)
    torch.testing.assert_close(batch.divergence({"logits": logits}), consistency_loss(logits[:, :-1][mask]))
    assert batch.num_items == 4


def test_shifted_labels_are_not_shifted_again() -> None:
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[1, 2, 3, -100]])
    batch = ConsistencyBatch({"labels": torch.zeros(1, 4, dtype=torch.long), "shift_labels": labels}, 1, CAUSAL)
    torch.testing.assert_close(batch.divergence({"logits": logits}), consistency_loss(logits[:, :3]))
    assert batch.num_items == 3


def test_virtual_tokens_precede_the_labels() -> None:
    logits, labels = torch.randn(2, 2 + 4, 7), torch.tensor([[1, 2, -100, 3]])
    causal = batch_of(labels, LabelAlignment(shifts_labels=True, virtual_tokens=2))
    torch.testing.assert_close(causal.divergence({"logits": logits}), consistency_loss(logits[:, [1, 2, 4]]))
    assert causal.num_items == 3
    plain = batch_of(labels, LabelAlignment(virtual_tokens=2))
    expected = consistency_loss(logits[:, [2, 3, 5]])
    torch.testing.assert_close(plain.divergence({"logits": logits}), expected)
    # Encoder-decoder models insert them into the encoder, so the logits have no positions for them.
    torch.testing.assert_close(plain.divergence({"logits": logits[:, 2:]}), expected)


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
def test_the_problem_type_is_inferred_as_in_transformers(
    classes: int, labels: Tensor, problem_type: str | None, resolved: str
) -> None:
    logits, batch = torch.randn(6, classes), batch_of(labels, problem_type=problem_type)
    torch.testing.assert_close(batch.divergence({"logits": logits}), consistency_loss(logits, problem_type=resolved))
    assert batch.num_items == 3


def test_question_answering_compares_start_and_end_positions() -> None:
    start, end = torch.randn(4, 6), torch.randn(4, 6)
    inputs = {
        "input_ids": torch.zeros(2, 6, dtype=torch.long),
        "start_positions": torch.tensor([2, 6]),
        "end_positions": torch.tensor([[3], [-1]]),
    }
    outputs, batch = {"start_logits": start, "end_logits": end}, ConsistencyBatch(inputs, 2)
    expected = torch.stack((consistency_loss(start[[0, 2]]), consistency_loss(end)))
    torch.testing.assert_close(batch.divergence(outputs), expected)
    assert batch.num_items.tolist() == [1, 2]
    assert ConsistencyBatch(inputs, 2, LabelAlignment(virtual_tokens=1)).num_items.tolist() == [2, 2]
    positions = torch.tensor([2, -100, 2, -100]), torch.tensor([3, 0, 3, 0])
    losses = torch.stack([cross_entropy(*pair) for pair in zip((start, end), positions, strict=True)])
    torch.testing.assert_close(batch.task_loss(torch.tensor(torch.nan), outputs, torch.ones(2)), losses)


def test_the_task_loss_stays_where_the_items_of_a_batch_weigh_the_same() -> None:
    loss = torch.tensor(3.0)
    inputs = {"input_ids": torch.zeros(2, 6), "start_positions": torch.ones(2), "end_positions": torch.ones(2)}
    assert ConsistencyBatch(inputs, 2).task_loss(loss, {}, torch.ones(2)) is loss
    assert batch_of(torch.tensor([1, -100])).task_loss(loss, {}, torch.ones(())) is loss


def test_the_task_loss_without_items_is_zero_and_sends_no_gradient_through_the_logits() -> None:
    hidden, balance = torch.ones(4, 3, requires_grad=True), torch.ones((), requires_grad=True)
    logits = 2 * hidden
    loss = logits.sum() / 0 + balance
    value = batch_of(torch.tensor([-100, -100])).task_loss(loss, {"logits": logits}, torch.ones(()))
    value.backward()
    assert value == 0 and hidden.grad.eq(0).all() and balance.grad == 1


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
def test_a_task_with_unknown_items_raises(outputs: Any, labels: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_of(labels).divergence(outputs)


def test_dropout_is_found_in_modules_and_in_functional_calls() -> None:
    assert has_dropout(build("bert")) and not has_dropout(build("bert", dropout=False))
    assert has_dropout(build("marian")) and not has_dropout(build("marian", dropout=False))
    assert not has_dropout(build("marian", dropout=False, encoder_layerdrop=0.5)), "it skips a layer in both passes"
    assert has_dropout(build("llama", attention_dropout=0.1)) and not has_dropout(build("llama"))


def test_every_divergence_has_a_formula_on_the_card() -> None:
    assert DIVERGENCE_FORMULAS.keys() == DIVERGENCES.keys()
    for name, formula in DIVERGENCE_FORMULAS.items():
        card = consistency_card(ConsistencyArguments(consistency_weight=0.5, consistency_divergence=name))
        assert formula in card.formula and "2106.14448" in card.citation
        expected = {"consistency_weight": 0.5, "consistency_divergence": name, "consistency_warmup_steps": 0}
        assert card.settings == expected
