"""The divergence averages over the items of the task loss, for every task."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_attentiondrop.training.alignment import LabelAlignment
from hf_attentiondrop.training.arguments import CONSISTENCY_DEFAULTS, ConsistencyArguments
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
        expected = {"consistency_weight": 0.5, "consistency_divergence": name}
        # The shared trunk changes the speed only.
        assert card.settings | {"consistency_shared_trunk": False} == CONSISTENCY_DEFAULTS | expected
        assert "consistency_shared_trunk" not in card.settings


def test_the_card_states_the_share_of_rows_and_the_interval() -> None:
    card = consistency_card(ConsistencyArguments(consistency_weight=0.5))
    assert "Only" not in card.text and "one in" not in card.text and "steps" not in card.formula
    card = consistency_card(
        ConsistencyArguments(consistency_weight=0.5, consistency_fraction=0.25, consistency_interval=4)
    )
    assert "Only a random share of 0.25 of the rows runs twice; D is the mean over these rows." in card.text
    assert "one in 4 optimizer steps" in card.text
    assert "λ = consistency_weight in optimizer steps 0, 4, 8, …" in card.formula


# --- a share of the rows


def test_the_expected_number_of_repeated_rows_is_the_fraction() -> None:
    """Also of a batch of one row; every row is as likely, and none comes twice."""
    for batch_size, fraction in ((1, 0.3), (4, 0.5), (5, 0.3)):
        batch, counts, numbers = batch_of(torch.zeros(batch_size)), torch.zeros(batch_size), set()
        for _ in range(2000):
            sampled = batch.sample_rows(fraction)
            rows = torch.arange(batch_size) if sampled.rows is None else sampled.rows
            assert len(rows) == len(rows.unique()) == sampled.num_repeated and sampled.fraction == fraction
            counts[rows] += 1
            numbers.add(len(rows))
        torch.testing.assert_close(counts / 2000, torch.full_like(counts, fraction), rtol=0, atol=0.05)
        assert numbers == {math.floor(fraction * batch_size), math.ceil(fraction * batch_size)}


def test_a_fraction_of_one_samples_nothing() -> None:
    batch, state = batch_of(torch.zeros(4)), torch.get_rng_state()
    assert batch.sample_rows(1.0) is batch and batch.rows is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rows", [[], [2], [2, 0], [0, 1, 2]])
def test_only_repeated_rows_are_compared(rows: list[int]) -> None:
    """Their items and divergence are those of a batch of these rows alone, for every kind of label."""
    again, n = torch.tensor(rows, dtype=torch.long), len(rows)
    tokens = torch.tensor([[1, -100, 2, 4], [3, 4, -100, 5], [-100, -100, -100, 6]])
    cases = [
        ({"logits": torch.randn(3 + n, 4)}, {"labels": torch.tensor([1, -100, 2])}, PLAIN),
        ({"logits": torch.randn(3 + n, 1)}, {"labels": torch.randn(3)}, PLAIN),
        ({"logits": torch.randn(3 + n, 4)}, {"labels": torch.rand(3, 4).round()}, PLAIN),
        ({"logits": torch.randn(3 + n, 4, 7)}, {"labels": tokens}, PLAIN),
        ({"logits": torch.randn(3 + n, 4, 7)}, {"labels": tokens}, CAUSAL),
        ({"logits": torch.randn(3 + n, 4, 7)}, {"labels": tokens, "shift_labels": tokens.flip(0)}, CAUSAL),
        (
            {"start_logits": torch.randn(3 + n, 6), "end_logits": torch.randn(3 + n, 6)},
            {"start_positions": torch.tensor([2, 6, 0]), "end_positions": torch.tensor([[3], [-1], [9]])},
            PLAIN,
        ),
    ]
    for outputs, labels, alignment in cases:
        labels = {"input_ids": torch.zeros(3, 6, dtype=torch.long), **labels}
        batch = ConsistencyBatch(labels, 3, alignment, rows=again, fraction=0.5)
        alone = ConsistencyBatch({name: value[again] for name, value in labels.items()}, n, alignment)
        pairs = {name: torch.cat((value[again], value[3:])) for name, value in outputs.items()}
        torch.testing.assert_close(batch.divergence(outputs), alone.divergence(pairs))
        assert torch.equal(batch.num_repeated_items, alone.num_items)
        assert torch.equal(batch.num_task_items, batch.num_items + alone.num_items)
        # The mean over both passes keeps its weight, however many rows run twice.
        torch.testing.assert_close(batch.item_weights[0], (batch.num_items + alone.num_items) / (1 + n / 3))
        torch.testing.assert_close(batch.item_weights[1], alone.num_items / 0.5)
        assert batch.first_pass(outputs).keys() == outputs.keys()
        assert all(len(value) == 3 for value in batch.first_pass(outputs).values())
