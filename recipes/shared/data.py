"""Loading and checking the data of a recipe."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value

from hf_attentiondrop.cli.flags import naming_flag
from hf_attentiondrop.evaluation.reading import check_all_labelled, check_column, load_splits

from .arguments import check_at_least_one, check_path


# Held-out samples and subsets do not depend on --seed, so that runs can be compared.
SPLIT_SEED = 0
# Second entries of the seeds of what --seed draws, so that one draw does not change another.
ROWS, LABELS = 1, 2
# Split to its name in the metrics, in the order of the flags that name files.
SPLITS = {"train": "train", "validation": "eval", "test": "test"}


@dataclass
class DatasetArguments:
    """The data to train and evaluate on; each recipe adds its local files and columns."""

    _argument_group_name = "data"
    _needing: ClassVar = {"dataset_name": ("dataset_config_name", "train_split", "validation_split", "test_split")}

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, or a folder that load_dataset can read."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split of the data set to train on."})
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on; by default validation, or a held-out share of the training split."},
    )
    validation_fraction: float = field(
        default=0.2, metadata={"help": "Share of the training split to hold out if there is no validation split."}
    )
    test_split: str | None = field(
        default=None, metadata={"help": "Split to test the trained model on, once; by default it is not tested."}
    )
    test_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training split to hold out as test data before anything else; the same rows for "
            "every --seed."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Maximum number of training samples; the same ones for every --seed."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Maximum number of evaluation samples."})
    train_samples: int | None = field(
        default=None,
        metadata={
            "help": "Number of training samples to draw by --seed, with the classes in proportion, after "
            "--max_train_samples. Runs with the same seed train on the same ones."
        },
    )

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_train_samples", "max_eval_samples", "train_samples")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"--test_fraction: expected a share in [0, 1), got {self.test_fraction}.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction: expected a share in (0, 1), got {self.validation_fraction}.")


def load_from_hub(arguments: DatasetArguments) -> DatasetDict:
    """Loads the data set of `--dataset_name`.

    Returns:
        [`~datasets.DatasetDict`]: `train`, `validation` if there is such a split, and `test` if it is named.

    Raises:
        ValueError: if the data set or a split does not exist, or the test split is used for anything else.
    """
    check_path("--dataset_name", arguments.dataset_name)
    name = arguments.dataset_name
    with naming_flag("--dataset_name"):
        splits = load_splits(name, name, arguments.dataset_config_name)
    names = {"train": arguments.train_split}
    if arguments.validation_split or "validation" in splits:
        names["validation"] = arguments.validation_split or "validation"
    check_separate("--validation_split", arguments.validation_split, arguments.train_split)
    if arguments.test_split:
        check_separate("--test_split", arguments.test_split, *names.values())
        names["test"] = arguments.test_split
    for key, name in names.items():
        if name not in splits:
            raise ValueError(
                f"--{key}_split: {arguments.dataset_name} has no split {name!r}; it has {', '.join(splits)}."
            )
    return DatasetDict({key: splits[name] for key, name in names.items()})


def load_local(builder: str, files: dict[str, str | None], **options: Any) -> DatasetDict:
    """Loads local files.

    Args:
        builder (`str`): name of the `datasets` builder, such as `"imagefolder"`.
        files (`dict[str, str | None]`):
            Flag to path or pattern, first of the training files, then of the evaluation and of the test files.
        options: further arguments of [`~datasets.load_dataset`].

    Raises:
        ValueError: if a split cannot be read.
    """
    given = {flag: path for flag, path in files.items() if path is not None}
    splits = {split: path for split, path in zip(SPLITS, files.values(), strict=False) if path is not None}
    try:
        with naming_flag(" and ".join(given)):
            return load_splits(", ".join(splits.values()), builder, data_files=splits, **options)
    except ValueError as error:
        of_all = error
    # Loading them one by one raises the error of the broken one.
    for flag, path in given.items():
        with naming_flag(flag):
            load_splits(path, builder, data_files=path, **options)
    raise of_all


def check_separate(flag: str, held_out: str | None, *others: str | None) -> None:
    """Checks that the data for the evaluation, or for the test, are not used for anything before it.

    Args:
        flag (`str`): flag that names these data.
        held_out (`str`, *optional*): a path, or a split.
        others (`str`, *optional*): the paths or splits of the data that are used before.

    Raises:
        ValueError: if one of them is the same.
    """
    paths = [Path(other).resolve() for other in others if other is not None]
    if held_out is not None and Path(held_out).resolve() in paths:
        purpose, uses = ("test", "trains or evaluates") if flag.startswith("--test") else ("evaluation", "trains")
        raise ValueError(
            f"{flag}: expected data for the {purpose} alone, got {held_out}, which the run also {uses} on: the model "
            "would look better than it is. Name other data, or leave the flag out."
        )


def check_columns(data: DatasetDict, columns: dict[str, str]) -> None:
    """Checks that every split has the columns.

    Args:
        data ([`~datasets.DatasetDict`]): the splits.
        columns (`dict[str, str]`): flag to the column that it names.

    Raises:
        ValueError: if a column is missing.
    """
    for split, dataset in data.items():
        for flag, column in columns.items():
            with naming_flag(flag):
                check_column(dataset, column, f"the {split} data")


def encode_classes(data: DatasetDict, column: str) -> DatasetDict:
    """Encodes labels as class indices, the same in every split, and checks that each class can be learned.

    Raises:
        ValueError: if labels are not classes, some are missing, or a class occurs in no training sample.
    """
    # First, because a missing label turns a column of integers into floats.
    for split, dataset in data.items():
        with naming_flag("--label_column"):
            check_all_labelled(dataset, column, f"the {split} data")
    feature = data["train"].features[column]
    if not isinstance(feature, ClassLabel):
        if not isinstance(feature, Value) or "float" in feature.dtype:
            raise ValueError(f"expected class names or numbers as labels, the column {column!r} holds {feature}.")
        # By name, because integers in the data need not be class indices.
        data = data.cast_column(column, Value("string"))
        names = sorted({name for dataset in data.values() for name in dataset.unique(column)})
        data = data.cast_column(column, ClassLabel(names=names))
    labels = {split: set(dataset.unique(column)) for split, dataset in data.items()}
    names = data["train"].features[column].names
    for split, found in labels.items():
        unseen = sorted(names[label] for label in found - labels["train"])
        if unseen:
            raise ValueError(f"the {split} data has classes that are not in the training data: {', '.join(unseen)}.")
    if len(labels["train"]) < 2:
        raise ValueError(f"expected at least two classes in {column!r}, the training data has {len(labels['train'])}.")
    return data


def hold_out(data: DatasetDict, arguments: DatasetArguments, stratify_by_column: str | None = None) -> DatasetDict:
    """Holds out a test split with `--test_fraction`, then a validation split if there is none, and limits the number
    of training and validation samples.

    Raises:
        ValueError: if there are such data already, or too few rows of a class to hold some out.
    """
    fractions = {"test": arguments.test_fraction} if arguments.test_fraction else {}
    if fractions and "test" in data:
        raise ValueError("--test_fraction: expected no other test data, another flag names some: give one of them.")
    if "validation" not in data:
        fractions["validation"] = arguments.validation_fraction
    elif arguments.validation_fraction != DatasetArguments.validation_fraction:
        raise ValueError("--validation_fraction would have no effect: there are validation data. Leave it out.")
    splits = dict(data)
    for split, fraction in fractions.items():
        parts = splits["train"].train_test_split(fraction, seed=SPLIT_SEED, stratify_by_column=stratify_by_column)
        splits |= {"train": parts["train"], split: parts["test"]}
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    return DatasetDict({split: _subset(splits[split], limits.get(split)) for split in SPLITS if split in splits})


def draw_training_rows(
    data: DatasetDict, arguments: DatasetArguments, seed: int, label_column: str | None = None
) -> DatasetDict:
    """Draws the training rows of `--train_samples`; without the flag, returns the data as they are.

    The draw depends on the seed alone, so runs of different methods with the same seed train on the same rows. With
    classes, each has at least one row, and otherwise its share. The rows keep their order, and those of a smaller
    number are among those of a larger one.

    Args:
        data ([`~datasets.DatasetDict`]): the splits.
        arguments ([`DatasetArguments`]): of the recipe.
        seed (`int`): that of the run.
        label_column (`str`, *optional*): the column of the classes.

    Raises:
        ValueError: if there are fewer rows, or more classes.
    """
    count = arguments.train_samples
    if count is None:
        return data
    train = data["train"]
    labels = np.array(train[label_column]) if label_column else np.zeros(len(train))
    classes = np.unique(labels)
    if not len(classes) <= count <= len(train):
        raise ValueError(
            f"--train_samples: expected a number from {len(classes)}, one sample per class, to {len(train)}, all "
            f"training data, got {count}."
            if label_column
            else f"--train_samples: expected at most {len(train)}, all training data, got {count}."
        )
    order = np.random.default_rng([seed, ROWS]).permutation(len(train))
    # The position of each row within its class, as a fraction of the class: the first rows by it have all classes.
    position = np.empty(len(train))
    for label in classes:
        members = order[labels[order] == label]
        position[members] = np.arange(len(members)) / len(members)
    chosen = order[np.argsort(position[order], kind="stable")[:count]]
    return DatasetDict({**data, "train": train.select(np.sort(chosen))})


def sample_counts(data: DatasetDict) -> dict[str, int]:
    """The number of samples of each split, as the metrics name it: `train_samples`, `eval_samples`, `test_samples`."""
    return {f"{SPLITS[split]}_samples": len(rows) for split, rows in data.items()}


def _subset(dataset: Dataset, limit: int | None) -> Dataset:
    if limit is None or limit >= len(dataset):
        return dataset
    # Files are sorted by class, so the first ones would all be of one class.
    return dataset.shuffle(seed=SPLIT_SEED).select(range(limit))
