"""Conversion of images to 8 bits per channel, in grayscale or RGB."""

from typing import Any

import numpy as np
from PIL import Image


# 65535 / 255: maps 16-bit white to 8-bit white.
STEPS_PER_LEVEL = 257


def convert_image(image: Image.Image, channels: int = 3) -> Image.Image:
    """Converts an image to 8 bits per channel. 16-bit grayscale is scaled down, black to black and white to white.

    Pillow's own conversion would clip at 255 and turn nearly all of such an image white.

    Args:
        image (`PIL.Image.Image`): of any mode with a known range.
        channels (`int`, defaults to 3): 3 for RGB, 1 for grayscale.

    Raises:
        ValueError: for 32-bit pixels, whose range is unknown.

    Example:

    >>> gray = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    >>> np.asarray(convert_image(gray, channels=1)).tolist()
    [[0, 1, 255]]
    """
    if image.mode in ("I", "F"):
        raise ValueError(
            f"expected an image of 8 or 16 bits per channel, got mode {image.mode!r} with 32-bit pixels: the value of "
            "white is unknown, and values above 255 would be clipped. Scale it to 0 … 255 and save it with 8 bits"
        )
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((levels + STEPS_PER_LEVEL // 2) // STEPS_PER_LEVEL).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def encoded_images(dataset: Any, column: str) -> Any:
    """Turns off the decoding of images, so that an error can name the image that cannot be decoded.

    Args:
        dataset ([`~datasets.Dataset`]):
            With a column of images, of encoded bytes, or of `{"bytes": ..., "path": ...}`, which is how `datasets`
            and others write images to parquet.
        column (`str`): its name.

    Raises:
        ValueError: if the column holds anything else.
    """
    import datasets

    feature = dataset.features[column]
    if not (isinstance(feature, datasets.Image) or _is_bytes(feature) or _is_bytes(_get(feature, "bytes"))):
        raise ValueError(
            f"expected images in {column!r}, the column holds {feature}. Name another column, or convert it with "
            f"dataset.cast_column({column!r}, datasets.Image()) and save the result."
        )
    return dataset.cast_column(column, datasets.Image(decode=False))


def read_image(value: Any, channels: int = 3) -> Image.Image:
    """Decodes an image from [`encoded_images`], rotated by its EXIF orientation, see [`convert_image`].

    Raises:
        ValueError: if it is missing, or has 32-bit pixels.
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
