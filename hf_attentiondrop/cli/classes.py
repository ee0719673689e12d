"""The model's class number of each sample in a data set."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..evaluation.pretrained import first_of
from ..evaluation.reading import check_all_labelled, check_column


# The number of class names that a message lists.
SHOWN_NAMES = 10


def class_numbers(dataset: Any, column: str, config: PreTrainedConfig) -> list[int]:
    """Maps the labels of a data set to the class numbers of a model.

    Classes are matched by name, so the data may number them in another order; numbers can be names too. If the model
    or the data has no class names, the numbers of the data are those of the model, unless they may be the numbers in
    its names.

    Args:
        dataset ([`~datasets.Dataset`]): to measure on.
        column (`str`): of labels.
        config ([`~transformers.PreTrainedConfig`]): of the model.

    Raises:
        ValueError: for a missing column, labels that are not classes, and classes that the model does not know.
    """
    check_column(dataset, column)
    labels, names = dataset[column][:], getattr(dataset.features[column], "names", None)
    # Checked first: integers with a missing value may be loaded as floats.
    check_all_labelled(dataset, column)
    _check_labels(labels, column)
    known = _known_classes(labels, column, names, config)
    named = [str(label) if names is None else names[label] for label in labels]
    if unknown := sorted(set(named) - known.keys()):
        remedy = "Evaluate it on data of its own classes."
        if not _has_names(config) and isinstance(labels[0], str):
            remedy = (
                "The latter are Transformers' placeholders, and the order of the data's classes is unknown. Set the "
                "names as id2label in its config."
            )
        raise ValueError(
            f"{column!r} has classes that the model does not know, {first_of(unknown, SHOWN_NAMES)}; "
            f"it knows {first_of(known, SHOWN_NAMES)}. {remedy}"
        )
    return [known[name] for name in named]


def _check_labels(labels: Sequence[Any], column: str) -> None:
    for row, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(
                f"expected class names or integers in {column!r}, got {label!r} in row {row}, counted from 0: it "
                "cannot be matched to a class of the model. Convert the column."
            )


def _known_classes(
    labels: Sequence[int | str], column: str, names: Sequence[str] | None, config: PreTrainedConfig
) -> dict[str, int]:
    """The class number of each name that the data may use."""
    known = {str(name): number for number, name in config.id2label.items()}
    if names is None:
        # If the model's class names are numbers, an unknown number is an unknown class rather than a position.
        is_position = all(isinstance(label, int) for label in labels) and not any(map(_is_number, known))
        if not is_position:
            return known
        in_names = {name: set(re.findall(r"\d+", name)) for name in known}
        fits_names = {str(label) for label in labels} <= set().union(*in_names.values())
        for name, number in known.items():
            if fits_names and in_names[name] and str(number) not in in_names[name]:
                raise ValueError(
                    f"expected class names in {column!r}, got integers, which may be positions or the numbers in the "
                    f"model's class names: class {number} is {name!r}. Write the names into the column."
                )
        return {str(number): number for number in range(config.num_labels)}
    if _has_names(config) or known.keys() >= set(names):
        return known
    if len(names) != config.num_labels:
        raise ValueError(
            f"expected {config.num_labels} classes in {column!r}, got {len(names)}, {first_of(names, SHOWN_NAMES)}: "
            "the model has no class names, and matching by position needs the same number of classes. Set the names "
            "as id2label in its config."
        )
    return {name: number for number, name in enumerate(names)}


def _has_names(config: PreTrainedConfig) -> bool:
    """Whether the classes have names other than the placeholders of Transformers."""
    return not all(str(name).startswith("LABEL_") for name in config.id2label.values())


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdigit()
