"""Images of all modes are converted to 8 bits, and none is silently clipped to white."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_attentiondrop.evaluation.images import convert_image


LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(("suffix", "dtype"), [("png", "<u2"), ("tiff", "<u2"), ("tiff", ">u2")])
def test_16_bits_are_scaled_to_8(suffix: str, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray((LEVELS.astype(np.uint16) * 257).astype(dtype)).save(path)
    with Image.open(path) as image:
        assert image.mode.startswith("I;16")
        colours, grey = convert_image(image), convert_image(image, channels=1)
    assert (colours.mode, grey.mode) == ("RGB", "L")
    assert all(np.array_equal(channel, LEVELS) for channel in colours.split())
    assert np.array_equal(grey, LEVELS)


def test_values_are_rounded_to_the_nearest_level() -> None:
    image = Image.fromarray(np.array([[128, 129, 65535 - 129, 65535 - 128]], dtype=np.uint16))
    assert np.asarray(convert_image(image, channels=1)).tolist() == [[0, 1, 254, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_8_bits_are_converted_like_pillow(mode: str) -> None:
    image = Image.fromarray(LEVELS).convert("RGB").convert(mode)
    assert np.array_equal(convert_image(image), image.convert("RGB"))
    assert np.array_equal(convert_image(image, channels=1), image.convert("L"))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_an_unknown_range_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"got mode '{mode}'.*the value of white is unknown"):
        convert_image(Image.new(mode, (2, 2)))
