"""A warning when `generate` runs in training mode, where AttentionDrop perturbs the attention."""

import functools
import logging
from typing import Any

from transformers import PreTrainedModel

from ..attention.modules import attention_modules
from .functions import perturbations_of_module
from .wrapping import wrapped


logger = logging.getLogger(__name__)


def warn_of_training_mode(model_class: type[PreTrainedModel]) -> None:
    """Makes `generate` warn, once per process, if it runs on a model that is perturbed.

    Many decoders have no dropout, so without AttentionDrop they generate the same text in both modes. `generate` is
    wrapped once for all classes, when the first model that can generate is built.
    """
    if not model_class.can_generate():
        return
    from transformers import GenerationMixin  # Slow to import; the model's own import has loaded it already.

    GenerationMixin.generate = wrapped(GenerationMixin.generate, _generate)


def _generate(self: PreTrainedModel, original: Any, *args: Any, **kwargs: Any) -> Any:
    if any(module.training and perturbations_of_module(module) for _, module in attention_modules(self)):
        _warn_once()
    return original(self, *args, **kwargs)


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "generate() runs on a model in training mode, where AttentionDrop perturbs attention: the output is random "
        "and of lower quality. Call model.eval() first, and model.train() to continue training."
    )
