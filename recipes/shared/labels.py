"""Classes of the data: the column that holds them, their numbers, and noise in the training labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import PreTrainedConfig

from hf_attentiondrop.cli.classes import class_numbers
from hf_attentiondrop.cli.flags import naming_flag

from .data import LABELS, DatasetArguments, encode_classes


@dataclass
class LabelledArguments(DatasetArguments):
    """Data with a class per sample."""

    label_column: str = field(default="label", metadata={"help": "Column of the classes."})
    label_noise: float = field(
        default=0.0,
        metadata={
            "help": "Probability that the label of a training sample is replaced by another class. Drawn by --seed: "
            "runs with the same seed and training samples have the same labels."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_noise < 1:
            raise ValueError(f"--label_noise: expected a probability in [0, 1), got {self.label_noise}.")


def encode_labels(
    data: DatasetDict, column: str, saved: PreTrainedConfig | None = None, is_trained: bool = True
) -> DatasetDict:
    """Encodes labels as class indices, the same in every split, and those of a saved classifier for the same classes.

    Args:
        data ([`~datasets.DatasetDict`]): the splits.
        column (`str`): of the labels.
        saved ([`~transformers.PreTrainedConfig`], *optional*): of the model that was saved.
        is_trained (`bool`, defaults to `True`): whether it is trained, or evaluated as it is.

    Raises:
        ValueError: see [`encode_classes`], and [`class_numbers`] for a model that is evaluated as it is.
    """
    known = [] if saved is None else [str(name) for _, name in sorted(saved.id2label.items())]
    if saved is not None and not is_trained:
        with naming_flag("--label_column"):
            numbers = {split: class_numbers(rows, column, saved) for split, rows in data.items()}
        return DatasetDict({split: _numbered(rows, column, numbers[split], known) for split, rows in data.items()})
    data = encode_classes(data, column)
    names = data["train"].features[column].names
    if names == known or sorted(names) != sorted(known):
        return data
    order = np.array([known.index(name) for name in names])
    return DatasetDict({split: _numbered(rows, column, order[rows[column]], known) for split, rows in data.items()})


def _numbered(rows: Dataset, column: str, labels: Sequence[int] | np.ndarray, names: list[str]) -> Dataset:
    return rows.remove_columns(column).add_column(column, np.array(labels), feature=ClassLabel(names=names))


def add_label_noise(
    data: DatasetDict, arguments: LabelledArguments, seed: int
) -> tuple[DatasetDict, dict[str, float | int]]:
    """Replaces each training label with the probability `--label_noise` by another class, all of them equally likely.

    The draw depends on the seed and the number of rows alone, not on torch's random state, so it is the same for all
    methods. The labels that a lower probability replaces are among those that a higher one replaces.

    Args:
        data ([`~datasets.DatasetDict`]): the splits, with encoded classes.
        arguments ([`LabelledArguments`]): of the recipe.
        seed (`int`): that of the run.

    Returns:
        `tuple`: the data, and the metrics `label_noise` and `changed_labels`, the number of replaced labels. Without
        noise, the data as they are, and no metrics.
    """
    if not arguments.label_noise:
        return data, {}
    train, column = data["train"], arguments.label_column
    feature = train.features[column]
    labels = np.array(train[column])
    rng = np.random.default_rng([seed, LABELS])
    is_changed = rng.random(len(labels)) < arguments.label_noise
    others = (labels + rng.integers(1, feature.num_classes, len(labels))) % feature.num_classes
    noisy = np.where(is_changed, others, labels)
    train = _numbered(train, column, noisy, feature.names)
    metrics = {"label_noise": arguments.label_noise, "changed_labels": int(is_changed.sum())}
    return DatasetDict({**data, "train": train}), metrics
