"""Images of any kind as those that a classifier takes: 8 bits, in grey or in colours."""

from typing import Any

import numpy as np
from PIL import Image


# What 8-bit white, 255, is to become 16-bit white, 65535.
STEPS_PER_LEVEL = 257


def convert_image(image: Image.Image, channels: int = 3) -> Image.Image:
    """An image with 8 bits per channel. Greyscale of 16 bits is scaled down, black to black and white to white.

    Pillow's own conversion would cut everything above 255 off, and make nearly all of such an image white.

    Args:
        image (`PIL.Image.Image`): of any mode with a known range.
        channels (`int`, defaults to 3): 3 for colours, 1 for grey.

    Raises:
        ValueError: for pixels of 32 bits, whose white nobody knows.

    Example:

    >>> grey = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    >>> np.asarray(convert_image(grey, channels=1)).tolist()
    [[0, 1, 255]]
    """
    if image.mode in ("I", "F"):
        raise ValueError(
            f"expected an image of 8 or 16 bits per channel, got mode {image.mode!r}, numbers of 32 bits: which of "
            "them is white is unknown, and all above 255 would be cut off. Scale it to 0 … 255 and save it in 8 bits"
        )
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((levels + STEPS_PER_LEVEL // 2) // STEPS_PER_LEVEL).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def encoded_images(dataset: Any, flag: str, column: str) -> Any:
    """The data with each image as it is stored, so that one that cannot be read can be named.

    Args:
        dataset ([`~datasets.Dataset`]):
            With a column of images; of their files' bytes; or of `{"bytes": ..., "path": ...}`, as `datasets` and
            others write images to parquet.
        flag (`str`): names the column.
        column (`str`): its name.

    Raises:
        ValueError: if the column holds something else.
    """
    import datasets

    feature = dataset.features[column]
    if not (isinstance(feature, datasets.Image) or _is_bytes(feature) or _is_bytes(_get(feature, "bytes"))):
        raise ValueError(
            f"{flag}: expected images in {column!r}, the column holds {feature}. Name another one, or make it one of "
            f"images and save that: dataset.cast_column({column!r}, datasets.Image())."
        )
    return dataset.cast_column(column, datasets.Image(decode=False))


def read_image(value: Any, channels: int = 3) -> Image.Image:
    """Reads an image as [`encoded_images`] gives it, upright, see [`convert_image`].

    Raises:
        ValueError: if there is none, and for pixels of 32 bits.
        OSError: if it cannot be decoded.
    """
    import datasets

    if value is None:
        raise ValueError("expected an image, got None")
    return convert_image(datasets.Image().decode_example(value), channels)


def _get(feature: Any, name: str) -> Any:
    return feature.get(name) if isinstance(feature, dict) else None


def _is_bytes(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")
