"""The spaces in which inputs are perturbed: pixels of images, embeddings of texts."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.parts import transformers_model


# Half a gray level of an 8-bit image: the rounding error of a pixel in half precision.
PIXEL_TOLERANCE = 0.5 / 255


@dataclass(frozen=True)
class Normalization:
    """The normalization from pixels in [0, 1] to `pixel_values`: `(pixel - mean) / std` in each channel.

    Args:
        mean (`tuple[float, ...]`, defaults to `(0.0,)`): one value per channel, or one for all channels.
        std (`tuple[float, ...]`, defaults to `(1.0,)`): likewise, positive.

    Raises:
        ValueError: for values that are not finite, a `std` that is not positive, and different lengths.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        is_finite = all(map(math.isfinite, self.mean + self.std))
        if not is_finite or min(self.std, default=0) <= 0 or len(self.mean) != len(self.std):
            raise ValueError(
                f"Normalization: `mean` and `std` must have one finite number per channel, `std` positive, got "
                f"mean={self.mean}, std={self.std}."
            )

    @classmethod
    def from_processor(cls, processor: Any) -> "Normalization":
        """The normalization of a Transformers image processor, or of a processor that contains one.

        Its inputs are assumed to be in 0 … 255 if it rescales them, and in [0, 1] if it does not.

        Raises:
            TypeError: if `processor` contains no image processor.
            ValueError: if it does more than rescale and normalize pixels.

        Example:

        >>> from transformers import ViTImageProcessorPil
        >>> Normalization.from_processor(ViTImageProcessorPil())
        Normalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        """
        processor = getattr(processor, "image_processor", processor)
        if not hasattr(processor, "image_mean"):
            raise TypeError(
                f"Expected a Transformers image processor, got {type(processor).__name__}, which has no `image_mean`. "
                "Pass Normalization(mean=..., std=...)."
            )
        for name in ("offset", "rescale_offset", "include_top"):
            if getattr(processor, name, False):
                raise ValueError(
                    f"{type(processor).__name__} has {name}=True: it shifts or normalizes pixels beyond its mean and "
                    "std. Pass Normalization(mean=..., std=...) for both steps together."
                )
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        white = 255 * processor.rescale_factor if processor.do_rescale else 1.0
        return cls(*(tuple(value / white for value in _per_channel(values)) for values in (mean, std)))


def _per_channel(values: float | Sequence[float]) -> Sequence[float]:
    return values if isinstance(values, Sequence) else (values,)


class Space(NamedTuple):
    """The space of perturbations of a batch of `B` samples.

    Attributes:
        zero: the zero perturbation, `(B, ...)`, in at least float32.
        is_free: 1 for values that may change, else 0, of the same shape.
        clip: from a perturbation to a valid one.
        clean: the unperturbed inputs of the model.
        inputs: from a perturbation to the inputs of the model.
    """

    zero: Tensor
    is_free: Tensor
    clip: Callable[[Tensor], Tensor]
    clean: dict[str, Any]
    inputs: Callable[[Tensor], dict[str, Any]]


def check_attackable(model: nn.Module) -> None:
    """Checks that a model takes pixels, or embeddings instead of token ids, before anything is measured.

    An encoder-decoder classifier needs the token ids: it shifts them for its decoder and finds the last token in them.

    Raises:
        ValueError: if it does not.
        TypeError: if `model` contains no Transformers model.
    """
    base = transformers_model(model)
    parameters = inspect.signature(base.forward).parameters
    takes_embeddings = "inputs_embeds" in parameters and not base.config.is_encoder_decoder
    if "pixel_values" not in parameters and not takes_embeddings:
        raise ValueError(
            f"expected a classifier that takes embeddings instead of token ids, got {type(base).__name__}, which "
            "needs the token ids: texts are attacked in their embeddings, so it cannot be attacked. Measure it "
            "without attacks."
        )


def pixel_space(model: nn.Module, inputs: dict[str, Any], normalization: Normalization | None) -> Space:
    """Images: perturbations in units of pixels in [0, 1]; perturbed pixels stay in [0, 1].

    Raises:
        ValueError: for a missing or unsuitable normalization, and for values that are not images.
    """
    values = inputs["pixel_values"]
    if normalization is None:
        raise ValueError(
            "Images are perturbed as pixels in [0, 1], and the normalization of `pixel_values` is unknown. Pass "
            "`normalization`: Normalization.from_processor(processor), or Normalization() for pixels in [0, 1]."
        )
    if values.dim() < 4 or len(normalization.mean) not in (1, values.shape[-3]):
        raise ValueError(
            f"`pixel_values` must be images (B, ..., channels, height, width) with {len(normalization.mean)} channels "
            f"as in {normalization}, got shape {tuple(values.shape)}: the normalization cannot be undone. Pass the "
            "one that the images were normalized with."
        )
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    values = values.to(torch.promote_types(dtype, torch.float32))
    mean, std = (values.new_tensor(value).view(-1, 1, 1) for value in (normalization.mean, normalization.std))
    pixels = values * std + mean
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= -PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE):
        raise ValueError(
            f"Undoing {normalization} gives pixels from {low:.4g} to {high:.4g}, expected [0, 1]: epsilon would be in "
            "other units. Pass the mean and std that `pixel_values` were normalized with, in units of pixels in "
            "[0, 1]."
        )
    pixels.clamp_(0, 1)

    def clip(perturbation: Tensor) -> Tensor:
        return (pixels + perturbation).clamp(0, 1) - pixels

    def perturbed(perturbation: Tensor) -> dict[str, Any]:
        # Added to the given values rather than normalized again: a zero perturbation changes no bit.
        return {**inputs, "pixel_values": (values + perturbation / std).to(dtype)}

    zero = torch.zeros_like(pixels)
    return Space(zero, torch.ones_like(zero), clip, perturbed(zero), perturbed)


def embedding_space(model: nn.Module, inputs: dict[str, Any]) -> Space:
    """Texts: perturbations of the embeddings of all tokens except padding.

    The model adds position embeddings and the like after the perturbation.

    Raises:
        TypeError: if `model` contains no Transformers model.
        ValueError: if `attention_mask` is not `(B, length)`.
    """
    input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got "
            f"{tuple(mask.shape)}: it marks the padding, which is not perturbed."
        )
    embeddings = transformers_model(model).get_input_embeddings()(input_ids).detach()
    zero = torch.zeros_like(embeddings, dtype=torch.promote_types(embeddings.dtype, torch.float32))
    is_free = mask.bool().unsqueeze(-1).expand_as(zero).to(zero.dtype)
    others = {name: value for name, value in inputs.items() if name != "input_ids"}

    def perturbed(perturbation: Tensor) -> dict[str, Any]:
        return {**others, "inputs_embeds": (embeddings + perturbation).to(embeddings.dtype)}

    # All embeddings are valid.
    return Space(zero, is_free, lambda perturbation: perturbation, inputs, perturbed)
