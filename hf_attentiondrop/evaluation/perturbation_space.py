"""Where a perturbation lives, and how the model is given it: the pixels of images, the embeddings of texts."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.parts import transformers_model


# Half a grey level of an 8-bit image: what rounding to half precision may shift a pixel by.
PIXEL_TOLERANCE = 0.5 / 255


@dataclass(frozen=True)
class Normalization:
    """How pixels in [0, 1] became the model's `pixel_values`: `(pixel - mean) / std`, channel by channel.

    Args:
        mean (`tuple[float, ...]`, defaults to `(0.0,)`): one value per channel, or one for all.
        std (`tuple[float, ...]`, defaults to `(1.0,)`): likewise, above 0.

    Raises:
        ValueError: for values that are not finite, a `std` that is not positive, and lengths that differ.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        is_finite = all(map(math.isfinite, self.mean + self.std))
        if not is_finite or min(self.std, default=0) <= 0 or len(self.mean) != len(self.std):
            raise ValueError(
                f"Normalization: `mean` and `std` must hold one finite number per channel each, `std` above 0, got "
                f"mean={self.mean}, std={self.std}."
            )

    @classmethod
    def from_processor(cls, processor: Any) -> "Normalization":
        """Reads it off a Transformers image processor, or a processor that holds one.

        One that does not rescale is taken to get pixels in [0, 1], one that does to get 0 … 255.

        Raises:
            TypeError: if there is no image processor in `processor`.
            ValueError: for one that does more to a pixel than scale and normalise it.

        Example:

        >>> from transformers import ViTImageProcessorPil
        >>> Normalization.from_processor(ViTImageProcessorPil())
        Normalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        """
        processor = getattr(processor, "image_processor", processor)
        if not hasattr(processor, "image_mean"):
            raise TypeError(
                f"Expected an image processor of Transformers, got {type(processor).__name__}: it does not say how it "
                "normalises pixels. Give Normalization(mean=..., std=...)."
            )
        for name in ("offset", "rescale_offset", "include_top"):
            if getattr(processor, name, False):
                raise ValueError(
                    f"{type(processor).__name__} has {name}=True: it shifts or normalises pixels once more than its "
                    "mean and std say. Give Normalization(mean=..., std=...) for what it does in all."
                )
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        white = 255 * processor.rescale_factor if processor.do_rescale else 1.0
        return cls(*(tuple(value / white for value in _per_channel(values)) for values in (mean, std)))


def _per_channel(values: float | Sequence[float]) -> Sequence[float]:
    return values if isinstance(values, Sequence) else (values,)


class Space(NamedTuple):
    """Where the perturbations of a batch of `B` samples live.

    Attributes:
        zero: no perturbation, `(B, ...)`, float32 at least.
        is_free: 1 for a value that may change, else 0, of the same shape.
        clip: cuts a perturbation to what is valid.
        clean: the model's inputs as they came.
        inputs: the model's inputs under a perturbation.
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
    """Images: perturbations in units of pixels in [0, 1], where the perturbed pixels stay.

    Raises:
        ValueError: without a normalization, with one that does not fit, and for values that are no images.
    """
    values = inputs["pixel_values"]
    if normalization is None:
        raise ValueError(
            "Images are perturbed as pixels in [0, 1], and `pixel_values` do not say how they were normalised. Give "
            "`normalization`: Normalization.from_processor(processor), or Normalization() if they are such pixels."
        )
    if values.dim() < 4 or len(normalization.mean) not in (1, values.shape[-3]):
        raise ValueError(
            f"`pixel_values` must be images (B, ..., channels, height, width) with {len(normalization.mean)} channels "
            f"as in {normalization}, got shape {tuple(values.shape)}: their pixels cannot be told."
        )
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    values = values.to(torch.promote_types(dtype, torch.float32))
    mean, std = (values.new_tensor(value).view(-1, 1, 1) for value in (normalization.mean, normalization.std))
    pixels = values * std + mean
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= -PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE):
        raise ValueError(
            f"Undoing {normalization} gives pixels from {low:.4g} to {high:.4g}, expected [0, 1]: epsilon would mean "
            "another size than it says. Give the mean and std that `pixel_values` were normalised with, in units of "
            "pixels in [0, 1]."
        )
    pixels.clamp_(0, 1)

    def clip(perturbation: Tensor) -> Tensor:
        return (pixels + perturbation).clamp(0, 1) - pixels

    def perturbed(perturbation: Tensor) -> dict[str, Any]:
        # Added to what came instead of normalised anew, so that no perturbation is no change, to the last bit.
        return {**inputs, "pixel_values": (values + perturbation / std).to(dtype)}

    zero = torch.zeros_like(pixels)
    return Space(zero, torch.ones_like(zero), clip, perturbed(zero), perturbed)


def embedding_space(model: nn.Module, inputs: dict[str, Any]) -> Space:
    """Texts: perturbations of the embeddings of the tokens that `attention_mask` shows; padding stays as it is.

    What a model adds to its input embeddings itself, such as position embeddings, is added after the perturbation.

    Raises:
        TypeError: if there is no Transformers model in `model`.
        ValueError: if `attention_mask` is not `(B, length)`.
    """
    input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got "
            f"{tuple(mask.shape)}: it says which tokens are padding, to be left alone."
        )
    embeddings = transformers_model(model).get_input_embeddings()(input_ids).detach()
    zero = torch.zeros_like(embeddings, dtype=torch.promote_types(embeddings.dtype, torch.float32))
    is_free = mask.bool().unsqueeze(-1).expand_as(zero).to(zero.dtype)
    others = {name: value for name, value in inputs.items() if name != "input_ids"}

    def perturbed(perturbation: Tensor) -> dict[str, Any]:
        return {**others, "inputs_embeds": (embeddings + perturbation).to(embeddings.dtype)}

    # Any number is an embedding.
    return Space(zero, is_free, lambda perturbation: perturbation, inputs, perturbed)
