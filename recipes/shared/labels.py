"""Classes of the data: the column that holds them, their numbers, and noise in the training labels."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import AutoConfig
from transformers.utils import ADAPTER_CONFIG_NAME

from .arguments import ModelArguments
from .data import LABELS, DatasetArguments
from .model import MODEL_FLAG


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


def number_as_saved(
    data: DatasetDict, arguments: LabelledArguments, model_arguments: ModelArguments, is_evaluation: bool
) -> DatasetDict:
    """Numbers the classes as the classifier `--model_name_or_path` does, if it is one for the same classes.

    A model that is only evaluated may know more classes. If it has no names for them, the order of the data counts.

    Args:
        data ([`~datasets.DatasetDict`]): the splits, with encoded classes.
        arguments ([`LabelledArguments`]): of the recipe.
        model_arguments ([`ModelArguments`]): of the recipe.
        is_evaluation (`bool`): whether the model is evaluated as it is.

    Raises:
        ValueError: if it is evaluated as it is, and does not know the classes of the data.
    """
    name, feature = model_arguments.model_name_or_path, data["train"].features[arguments.label_column]
    if name is None or Path(name, ADAPTER_CONFIG_NAME).is_file():
        return data
    saved = [str(known) for _, known in sorted(AutoConfig.from_pretrained(name).id2label.items())]
    has_names = not all(known.startswith("LABEL_") for known in saved)
    knows_all = set(feature.names) <= set(saved) if has_names else len(feature.names) == len(saved)
    if is_evaluation and not knows_all:
        raise ValueError(
            f"{MODEL_FLAG}: expected a classifier for the classes of the data, {', '.join(feature.names)}, got one "
            f"for {', '.join(saved)}. Evaluate it on data of its own classes, or train it."
        )
    if not has_names or not knows_all or not (is_evaluation or len(saved) == len(feature.names)):
        return data
    numbers, of_saved = np.array([saved.index(known) for known in feature.names]), ClassLabel(names=saved)

    def numbered(rows: Dataset) -> Dataset:
        labels = numbers[np.array(rows[arguments.label_column])]
        return rows.remove_columns(arguments.label_column).add_column(arguments.label_column, labels, feature=of_saved)

    return DatasetDict({split: numbered(rows) for split, rows in data.items()})


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
    train = train.remove_columns(column).add_column(column, noisy, feature=feature)
    metrics = {"label_noise": arguments.label_noise, "changed_labels": int(is_changed.sum())}
    return DatasetDict({**data, "train": train}), metrics
