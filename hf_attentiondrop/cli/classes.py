"""Which of a model's classes each sample of some data is of."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..evaluation.pretrained import first_of
from .labelled_data import check_column


# Of the names in a message.
SHOWN_NAMES = 10


def class_numbers(dataset: Any, column: str, config: PreTrainedConfig) -> list[int]:
    """The model's number of each sample's class.

    Names are looked up in the model's own, so that data which numbers its classes in another order is measured
    rightly; a number may be the name of a class, too. Where the model or the data has no names, the numbers of the
    data are taken as the model's.

    Raises:
        ValueError: for a column that is missing, labels that are no classes, and classes that the model does not know.
    """
    check_column("--label_column", column, dataset)
    labels, names = dataset[column][:], getattr(dataset.features[column], "names", None)
    # First of all, since whole numbers of which one is missing may come as broken ones.
    check_all_labelled(dataset, column)
    _check_labels(labels, column)
    known = _known_classes(labels, column, names, config)
    named = [str(label) if names is None else names[label] for label in labels]
    if unknown := sorted(set(named) - known.keys()):
        remedy = "Evaluate it on data of its own classes."
        if not _has_names(config) and isinstance(labels[0], str):
            remedy = (
                "The latter are no names, and names in a column have no order to tell which is which. Give its "
                "config the names, as id2label."
            )
        raise ValueError(
            f"--label_column: {column!r} has classes that the model does not know, {first_of(unknown, SHOWN_NAMES)}; "
            f"it knows {first_of(known, SHOWN_NAMES)}. {remedy}"
        )
    return [known[name] for name in named]


def check_all_labelled(dataset: Any, column: str, data: str = "the data") -> None:
    """Refuses samples without a label.

    Args:
        dataset ([`~datasets.Dataset`]): with the column.
        column (`str`): of labels.
        data (`str`): what a message calls the data.

    Raises:
        ValueError: naming the first sample whose label is missing or empty.
    """
    names = getattr(dataset.features[column], "names", None)

    def is_missing(label: Any) -> bool:
        if isinstance(label, str):
            return not label.strip()
        return label is None or label != label or (names is not None and not 0 <= label < len(names))

    if any(map(is_missing, dataset.unique(column))):
        row = next(row for row, label in enumerate(dataset[column]) if is_missing(label))
        raise ValueError(
            f"--label_column: {column!r} has samples without a label, as test splits often do, the first in row {row} "
            f"of {data}, counted from 0: they can be neither learned nor measured. Take another split, or remove them."
        )


def _check_labels(labels: Sequence[Any], column: str) -> None:
    for row, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(
                f"--label_column: expected names or whole numbers of classes in {column!r}, got {label!r} in row "
                f"{row}, counted from 0: which class of the model that is cannot be told. Write it as one of those."
            )


def _known_classes(
    labels: Sequence[int | str], column: str, names: Sequence[str] | None, config: PreTrainedConfig
) -> dict[str, int]:
    """The model's number of each class that the data may name."""
    known = {str(name): number for number, name in config.id2label.items()}
    if names is None:
        # Where numbers are names, one that is unknown is a class that the model does not have, and no position.
        is_position = all(isinstance(label, int) for label in labels) and not any(map(_is_number, known))
        return {str(number): number for number in range(config.num_labels)} if is_position else known
    if _has_names(config) or known.keys() >= set(names):
        return known
    if len(names) != config.num_labels:
        raise ValueError(
            f"--label_column: expected {config.num_labels} classes in {column!r}, got {len(names)}, "
            f"{first_of(names, SHOWN_NAMES)}: the model has no names for its classes, and which is which can only "
            "be told where there are as many. Give its config the names, as id2label."
        )
    return {name: number for number, name in enumerate(names)}


def _has_names(config: PreTrainedConfig) -> bool:
    """Whether the model's classes have names other than those that Transformers makes up."""
    return not all(str(name).startswith("LABEL_") for name in config.id2label.values())


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdigit()
