"""The warning for `generate` in training mode, where AttentionDrop perturbs what is generated."""

import functools
import logging
from typing import Any

from transformers import PreTrainedModel

from ..attention.modules import attention_modules
from .functions import perturbations_of_module
from .wrapping import wrapped


logger = logging.getLogger(__name__)


def warn_of_training_mode(model_class: type[PreTrainedModel]) -> None:
    """Makes `generate` warn, once per process, where it runs on a model that is perturbed.

    Dropout does the same, but many decoders have none, so that their text does not depend on the mode without
    AttentionDrop. The method is wrapped once, for all classes, when the first model is built that may need it.
    """
    if not model_class.can_generate():
        return
    from transformers import GenerationMixin  # Slow to import, and there by now.

    GenerationMixin.generate = wrapped(GenerationMixin.generate, _generate)


def _generate(self: PreTrainedModel, original: Any, *args: Any, **kwargs: Any) -> Any:
    if any(module.training and perturbations_of_module(module) for _, module in attention_modules(self)):
        _warn_once()
    return original(self, *args, **kwargs)


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "generate() runs on a model in training mode, and AttentionDrop perturbs attention in training: the output is "
        "random, and worse than the model's. Call model.eval() first, and model.train() to go on training."
    )
