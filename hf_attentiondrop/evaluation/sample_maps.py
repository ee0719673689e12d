"""The attention maps of one held-out sample, for a report."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..attention.parts import transformers_model
from .maps import AttentionMaps, attention_maps, candidates_of


logger = logging.getLogger(__name__)

# Of the first batch, the sample closest to this number of tokens is shown: they all fit beside a map.
TOKENS_SHOWN = 20


class SampleMaps(NamedTuple):
    """The maps of a sample, and its tokens or its image, `(channels, height, width)`: what a plot of them needs."""

    maps: AttentionMaps
    tokens: Sequence[str] | None
    image: Tensor | None


def map_first_sample(model: nn.Module, batches: Iterable[Mapping[str, Any]], processor: Any) -> SampleMaps | None:
    """Returns the maps of one sample of the first batch for a report, see [`attention_maps`].

    Args:
        model (`torch.nn.Module`): as in [`attention_maps`].
        batches (`Iterable[Mapping[str, Any]]`): inputs, with or without labels.
        processor: the tokenizer of a model of texts.

    Returns:
        [`SampleMaps`], *optional*: `None` if there is nothing to show, which is logged unless the model does not run
        an implementation of this package.
    """
    if not candidates_of(model):
        return None
    batch = next(iter(batches))
    mask, sample = batch.get("attention_mask"), 0
    if mask is not None and mask.dim() == 2:
        sample = int((mask.sum(dim=-1) - TOKENS_SHOWN).abs().argmin())
    rows = slice(sample, sample + 1)
    batch = {key: value[rows] if isinstance(value, Tensor) else value for key, value in batch.items()}
    try:
        maps = attention_maps(model, batch)
    except ValueError as error:
        logger.warning(f"Attention maps are left out: {error}")
        return None
    is_of_decoder = maps.kind == "decoder_self" and transformers_model(model).config.is_encoder_decoder
    ids = batch.get("decoder_input_ids" if is_of_decoder else "input_ids")
    tokens = None if ids is None else [_as_text(token, processor) for token in ids[0].tolist()]
    image = None if maps.grid is None else batch["pixel_values"][0].float().cpu()
    return SampleMaps(maps, None if image is not None else tokens, image)


def _as_text(token: int, tokenizer: Any) -> str:
    """A token as a reader knows it: byte-level vocabularies spell a space as Ġ, and others as ▁."""
    text = tokenizer.decode([token]).strip()
    # Nothing is left of a space, and a token can be a part of a character.
    return text if text and "\ufffd" not in text else tokenizer.convert_ids_to_tokens(token)
