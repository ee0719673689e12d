"""Folders of images, and a check that all images can be read."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from glob import escape

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict
from datasets.utils import tqdm

from hf_attentiondrop.cli.flags import naming_flag
from hf_attentiondrop.evaluation.images import read_image
from hf_attentiondrop.evaluation.reading import read_value

from .arguments import check_path
from .data import check_separate, load_local


CHUNK = 64


def load_image_folders(train_dir: str, validation_dir: str | None, test_dir: str | None) -> DatasetDict:
    """Loads one folder of images per class."""
    folders = {"--train_dir": train_dir, "--validation_dir": validation_dir, "--test_dir": test_dir}
    for flag, folder in folders.items():
        check_path(flag, folder, is_local=True)
    check_separate("--validation_dir", validation_dir, train_dir)
    check_separate("--test_dir", test_dir, train_dir, validation_dir)
    files = {flag: f"{escape(folder)}/**" if folder else None for flag, folder in folders.items()}
    # By default, imagefolder drops the labels if the two folders are at different depths.
    return load_local("imagefolder", files, drop_labels=False)


def check_images(data: DatasetDict, column: str, channels: int) -> None:
    """Reads every image once, so that a broken one is found before training.

    Each process reads its share, and all raise the first error.

    Args:
        data ([`~datasets.DatasetDict`]): the splits, with encoded images.
        column (`str`): column of the images.
        channels (`int`): number of channels of the model.

    Raises:
        ValueError: if an image cannot be read.
    """
    errors = gather_object([error for split in data if (error := _find_broken(data[split], split, column, channels))])
    if errors:
        raise ValueError(errors[0])


def _find_broken(dataset: Dataset, split: str, column: str, channels: int) -> str | None:
    state = PartialState()
    dataset = dataset.select_columns(column)
    numbers = range(state.process_index, len(dataset), state.num_processes)
    read = partial(read_image, channels=channels)

    def check(number: int) -> None:
        with naming_flag("--image_column"):
            read_value(read, dataset[number][column], column, number, f"the {split} data, row")

    # Decoding releases the GIL.
    with ThreadPoolExecutor() as threads, tqdm(total=len(numbers), desc=f"Checking {split} images") as progress:
        for start in range(0, len(numbers), CHUNK):
            try:
                progress.update(len(list(threads.map(check, numbers[start : start + CHUNK]))))
            except ValueError as error:
                return str(error)
    return None
