"""Checks of a Trainer and its model: unsupported settings, and a consistency term or a method without effect."""

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import Trainer

from ..attention.modules import attention_modules
from ..integration.functions import perturbations_of_module
from ..integration.implementations import FUNCTIONS
from .alignment import LabelAlignment


logger = logging.getLogger(__name__)


def check_trainer(trainer: Trainer, alignment: LabelAlignment) -> None:
    """Checks that the consistency term works with the settings of a Trainer.

    Args:
        trainer ([`~transformers.Trainer`]): The Trainer.
        alignment ([`LabelAlignment`]): The alignment of its model.

    Raises:
        ValueError: for `nn.DataParallel`, context or sequence parallelism, and prompt tuning with label smoothing.
    """
    remedy = "or set `consistency_weight=0`"
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"The consistency term does not support nn.DataParallel ({trainer.args.n_gpu} GPUs in one process), which "
            "averages over replicas without regard to their numbers of items. Start one process per GPU with "
            f"`accelerate launch`, limit this process to one GPU with CUDA_VISIBLE_DEVICES, {remedy}."
        )
    if trainer.get_cp_size() * trainer.get_sp_size() > 1:
        raise ValueError(
            "The consistency term does not support context or sequence parallelism: these split the sequences of a "
            f"batch before it can be doubled. Use data, tensor or fully sharded parallelism, {remedy}."
        )
    if alignment.virtual_tokens and trainer.label_smoother is not None:
        raise ValueError(
            "Label smoothing does not work with prompt tuning: Transformers ignores the logits of the virtual tokens "
            f"when it smooths, so logits and labels do not line up. Set `label_smoothing_factor=0`, {remedy}."
        )


def check_override(trainer: Trainer, has_run_twice: bool) -> None:
    """Checks at the end of an optimizer step that a subclass did not replace the loss with the consistency term.

    Raises:
        ValueError: if no batch has run twice so far.
    """
    if not has_run_twice:
        raise ValueError(
            f"{type(trainer).__name__} overrides `compute_loss` or `training_step` without calling that of its base "
            f"class: each batch ran once, and `consistency_weight={trainer.args.consistency_weight}` has no effect. "
            "Write the override in a Trainer of its own and put the mixin in front, `class WithConsistency("
            "ConsistencyTrainerMixin, MyTrainer)`, or pass `compute_loss_func`."
        )


def check_labels(labels: Any, model: Any) -> None:
    """Checks that a loss function of the user leaves no doubt about what the probabilities are.

    Raises:
        ValueError: for floating-point labels of several classes, and a config without `problem_type`.
    """
    is_soft = isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() == 2 and labels.shape[-1] > 1
    config = getattr(model, "config", None)
    if is_soft and config is not None and getattr(config, "problem_type", None) is None:
        raise ValueError(
            "Expected the model's config to name its `problem_type`, since labels that are floating-point numbers "
            "may be probabilities of the classes or of independent labels, and `compute_loss_func` does not say "
            'which. Set `config.problem_type` to "single_label_classification" or "multi_label_classification".'
        )


def warn_without_method(model: nn.Module, trainer: str) -> None:
    """Warns if no method of this package takes part in a training without the consistency term.

    Args:
        model (`torch.nn.Module`): The model, without the wrappers of a launcher.
        trainer (`str`): Name of the Trainer class, for the message.
    """
    implementations = {module.config._attn_implementation for _, module in attention_modules(model)}
    if implementations.isdisjoint(FUNCTIONS):
        logger.warning(
            f"{trainer} trains like the plain Trainer: no attention module of {type(model).__name__} is perturbed, "
            "and `consistency_weight` is 0. Load the model with "
            'attn_implementation="attentiondrop" and attention_drop=HardMasking(...), call '
            'model.set_attn_implementation("attentiondrop"), or set `consistency_weight` > 0, which turns the dropout '
            "of the model into R-Drop."
        )


def warn_without_randomness(model: nn.Module) -> None:
    """Warns if a model without divergence between two passes has no source of randomness.

    Equal outputs alone do not show this: a new LoRA adapter adds 0 at first, with or without dropout.

    Args:
        model (`torch.nn.Module`): The model, without the wrappers of a launcher.
    """
    modules = (module for _, module in attention_modules(model))
    # A schedule may start at 0, and a small perturbation of a new model may not reach its outputs.
    if not has_dropout(model) and not any(perturbations_of_module(module) for module in modules):
        logger.warning(
            f"The consistency term has no effect: {type(model).__name__} has no dropout above 0 and no active "
            "AttentionDrop, so both passes over a batch are equal. Load the model with "
            'attn_implementation="attentiondrop" and attention_drop=HardMasking(...), raise a dropout '
            "probability in its config (attention_dropout, hidden_dropout_prob, ...), or set `consistency_weight=0` "
            "to save the second pass."
        )


def has_dropout(model: nn.Module) -> bool:
    """True if some module drops activations of each sample independently, or adds noise to them. Layer drop does not
    count: it skips a layer in both passes.

    Args:
        model (`torch.nn.Module`): Any model.

    Example:

    >>> has_dropout(nn.Dropout(0.1)), has_dropout(nn.Dropout(0.0))
    (True, False)
    """
    return any(any(random_settings(module)) for module in model.modules())


def random_settings(module: nn.Module) -> Iterator[tuple[str, float]]:
    """The attributes of a module, without its children, that make it drop activations or add noise to them.

    Args:
        module (`torch.nn.Module`): Any module.

    Returns:
        `Iterator[tuple[str, float]]`: name and value of each attribute above 0.

    Example:

    >>> list(random_settings(nn.Dropout(0.1)))
    [('p', 0.1)]
    """
    for name, value in vars(module).items():
        is_random = ("drop" in name and "layerdrop" not in name) or "noise" in name
        if (is_random or (name == "p" and isinstance(module, _DropoutNd))) and isinstance(value, float) and value > 0:
            yield name, value
