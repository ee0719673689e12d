"""Labels are matched to the right class of the model, or refused."""

import math
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features
from transformers import BertConfig

from hf_attentiondrop.cli.classes import class_numbers


ANIMALS = {0: "cat", 1: "dog", 2: "owl"}
STARS = {0: "1", 1: "2", 2: "3"}
SIGNS = {0: "-1", 1: "0", 2: "1"}
RATINGS = {0: "1 star", 1: "2 stars", 2: "3 stars"}
NAMELESS = {number: f"LABEL_{number}" for number in range(3)}


def numbers(labels: list[Any], id2label: dict[int, str], names: list[str] | None = None) -> list[int]:
    features = None if names is None else Features({"kind": ClassLabel(names=names)})
    return class_numbers(Dataset.from_dict({"kind": labels}, features=features), "kind", BertConfig(id2label=id2label))


@pytest.mark.parametrize(
    ("labels", "id2label", "names", "expected"),
    [
        (["owl", "cat"], ANIMALS, None, [2, 0]),
        ([0, 2], ANIMALS, None, [0, 2]),
        ([0, 1], ANIMALS, ["owl", "dog"], [2, 1]),
        ([1, 3], STARS, None, [0, 2]),
        ([-1, 0], SIGNS, None, [0, 1]),
        ([0, 1], STARS, ["3", "1"], [2, 0]),
        ([0, 2], NAMELESS, None, [0, 2]),
        ([0, 2], {0: "class 0", 1: "class 1", 2: "class 2"}, None, [0, 2]),
        (["3 stars"], RATINGS, None, [2]),
        ([0, 2], RATINGS, None, [0, 2]),
        ([0, 1], {0: "covid-19", 1: "healthy"}, None, [0, 1]),
        ([0, 2], NAMELESS, ["cat", "dog", "owl"], [0, 2]),
        ([0, 1], NAMELESS, ["LABEL_2", "LABEL_0"], [2, 0]),
        (["LABEL_1"], NAMELESS, None, [1]),
    ],
)
def test_labels_map_to_the_classes_of_the_model(
    labels: list[Any], id2label: dict[int, str], names: list[str] | None, expected: list[int]
) -> None:
    assert numbers(labels, id2label, names) == expected


@pytest.mark.parametrize(
    ("labels", "id2label", "names", "message"),
    [
        ([0, 1], NAMELESS, ["cat", "owl"], "expected 3 classes in 'kind', got 2, cat, owl"),
        ([0], NAMELESS, ["a", "b", "c", "d"], "expected 3 classes in 'kind', got 4"),
        ([1, 2, 4], STARS, None, "classes that the model does not know, 4; it knows 1, 2, 3"),
        ([0, 1], STARS, None, "does not know, 0; it knows 1, 2, 3"),
        (
            [1, 2],
            RATINGS,
            None,
            "names in 'kind', got integers, .* class 0 is '1 star'. Write the names into the column",
        ),
        ([0, 3], ANIMALS, None, "does not know, 3; it knows 0, 1, 2"),
        ([0, 3], NAMELESS, None, "does not know, 3; it knows 0, 1, 2"),
        (["cat", "newt"], ANIMALS, None, "does not know, newt; it knows cat, dog, owl"),
        ([0, 1], ANIMALS, ["cat", "newt"], "does not know, newt"),
        (
            ["cat", "owl"],
            NAMELESS,
            None,
            "not know, cat, owl; it knows LABEL_0, .* order .* as id2label",
        ),
        (
            [0.0, 1.0, None],
            ANIMALS,
            None,
            "without a label, .* the first in row 2 of the data, counted from 0",
        ),
        ([0.0, math.nan], ANIMALS, None, "without a label, .* the first in row 1 of the data, counted from 0"),
        ([1, None], ANIMALS, None, "without a label, .* the first in row 1 of the data, counted from 0"),
        (
            [0, -1],
            ANIMALS,
            ["cat", "dog"],
            "without a label, .* the first in row 1 of the data, counted from 0",
        ),
        ([True, False], ANIMALS, None, "class names or integers in 'kind', got True in row 0"),
        ([0.0, 1.5], ANIMALS, None, "class names or integers in 'kind', got 0.0 in row 0"),
    ],
)
def test_labels_without_a_matching_class_are_refused(
    labels: list[Any], id2label: dict[int, str], names: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        numbers(labels, id2label, names)


def test_long_lists_of_names_are_truncated() -> None:
    with pytest.raises(ValueError, match=r"does not know, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, …; it knows cat"):
        numbers([f"a{number}" for number in range(10)] + ["b"], ANIMALS)
