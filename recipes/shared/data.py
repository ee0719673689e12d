"""Loading and checking the data of a recipe."""

from dataclasses import dataclass, field
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Value

from hf_attentiondrop.cli.flags import naming_flag
from hf_attentiondrop.evaluation.reading import check_all_labelled, check_column, load_splits

from .arguments import check_at_least_one, check_path


# Held-out samples and subsets do not depend on --seed, so that runs can be compared.
SPLIT_SEED = 0


@dataclass
class DatasetArguments:
    """The data to train and evaluate on; each recipe adds its local files and columns."""

    _argument_group_name = "data"

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
    max_train_samples: int | None = field(default=None, metadata={"help": "Maximum number of training samples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Maximum number of evaluation samples."})

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_train_samples", "max_eval_samples")


def load_from_hub(arguments: DatasetArguments) -> DatasetDict:
    """Loads the data set of `--dataset_name`.

    Returns:
        [`~datasets.DatasetDict`]: `train`, and `validation` if there is such a split.

    Raises:
        ValueError: if the data set or the split does not exist.
    """
    check_path("--dataset_name", arguments.dataset_name)
    name = arguments.dataset_name
    with naming_flag("--dataset_name"):
        splits = load_splits(name, name, arguments.dataset_config_name)
    names = {"train": arguments.train_split}
    if arguments.validation_split or "validation" in splits:
        names["validation"] = arguments.validation_split or "validation"
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
            Flag to path or pattern, first of the training files, then of the evaluation files.
        options: further arguments of [`~datasets.load_dataset`].

    Raises:
        ValueError: if a split cannot be read.
    """
    given = {flag: path for flag, path in files.items() if path is not None}
    splits = dict(zip(("train", "validation"), given.values(), strict=False))
    try:
        with naming_flag(" and ".join(given)):
            return load_splits(", ".join(splits.values()), builder, data_files=splits, **options)
    except ValueError:
        # Loading them one by one raises the error of the broken one.
        for flag, path in given.items():
            with naming_flag(flag):
                load_splits(path, builder, data_files=path, **options)
        raise


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
    """Holds out a validation split if there is none, and limits the number of samples."""
    if "validation" not in data:
        parts = data["train"].train_test_split(
            arguments.validation_fraction, seed=SPLIT_SEED, stratify_by_column=stratify_by_column
        )
        data = DatasetDict(train=parts["train"], validation=parts["test"])
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    return DatasetDict({split: _subset(data[split], limit) for split, limit in limits.items()})


def _subset(dataset: Dataset, limit: int | None) -> Dataset:
    if limit is None or limit >= len(dataset):
        return dataset
    # Files are sorted by class, so the first ones would all be of one class.
    return dataset.shuffle(seed=SPLIT_SEED).select(range(limit))
