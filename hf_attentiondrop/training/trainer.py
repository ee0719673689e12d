"""Trainers with a consistency term in the loss."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from ..hub import ModelCardMixin
from ..methods.card import MethodCard
from .alignment import LabelAlignment
from .arguments import CONSISTENCY_DEFAULTS, resolve_consistency
from .batch import ConsistencyBatch
from .card import consistency_card
from .checks import check_labels, check_override, check_trainer, warn_without_method, warn_without_randomness
from .dropconnect import dropconnect_card, dropconnect_of
from .losses import NO_DIVERGENCE
from .outputs import ForwardRecorder, averaging_over
from .schedule_callback import ScheduleMixin
from .trunk import SharedTrunk


if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object

# Attribute that tells the Trainer not to divide the loss by the number of micro-batches, because it is already the
# share of the micro-batch in an optimizer step. Before Transformers 5.19 the other attribute had this role.
SCALING = "loss_is_scaled_for_ga" if hasattr(Trainer, "loss_is_scaled_for_ga") else "model_accepts_loss_kwargs"


class ConsistencyTrainerMixin(TrainerBase):
    """Adds the consistency term to any [`~transformers.Trainer`] class. Put it first among the base classes.

    In training, each batch runs twice in one forward with independent perturbations. The loss is the task loss, a mean
    over both passes, plus `consistency_weight` times the divergence between them. The task loss is the loss that the
    other base class computes for both passes. Evaluation, prediction, and training with weight 0 (the default) do not
    change.

    Gradients do not depend on the split of a batch into accumulation steps and processes: the mean over each
    micro-batch is weighted by its share of the items. `task_loss`, and `consistency_loss` as a mean over the steps
    with the term, are logged along with `loss`.

    Overrides `train`, `training_step`, `compute_loss`, `get_batch_samples` and `log`.

    Args:
        args, kwargs:
            Arguments of the other base class, and optionally the settings below. A setting that is not given, or
            `None`, comes from the training arguments if they have the fields of [`ConsistencyArguments`].
        consistency_weight (`float`, *optional*, defaults to 0.0): See [`ConsistencyArguments`].
        consistency_divergence (`str`, *optional*, defaults to `"symmetric_kl"`): See [`ConsistencyArguments`].
        consistency_warmup_steps (`int`, *optional*, defaults to 0): See [`ConsistencyArguments`].
        consistency_fraction (`float`, *optional*, defaults to 1.0): See [`ConsistencyArguments`].
        consistency_interval (`int`, *optional*, defaults to 1): See [`ConsistencyArguments`].
        consistency_shared_trunk (`bool`, *optional*, defaults to `False`): See [`ConsistencyArguments`].

    Raises:
        ValueError: for values out of range, and for unsupported settings (`nn.DataParallel`, context and sequence
            parallelism, prompt tuning with label smoothing); in the first step, for a subclass that overrides
            `compute_loss` without calling this one.

    Example:

    ```python
    class ConsistencySFTTrainer(ConsistencyTrainerMixin, SFTTrainer):
        pass

    trainer = ConsistencySFTTrainer(model, args=SFTConfig("out"), train_dataset=dataset, consistency_weight=0.5)
    ```
    """

    compute_loss_func: Callable[..., Tensor] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        overrides = {name: kwargs.pop(name, None) for name in CONSISTENCY_DEFAULTS}
        super().__init__(*args, **kwargs)
        # Callbacks and hyperparameter search look for settings in the training arguments.
        for name, value in asdict(resolve_consistency(self.args, overrides)).items():
            setattr(self.args, name, value)
        self._alignments: WeakKeyDictionary[nn.Module, LabelAlignment] = WeakKeyDictionary()
        # Since the last log: task loss, divergence, number of optimizer steps, and of those with the term.
        self._component_sums: Tensor | None = None
        self._trunk: SharedTrunk | None = None
        self._has_checked_randomness = self._has_checked_method = False
        self._has_run_twice = False
        if self.args.consistency_weight > 0:
            check_trainer(self, self._alignment)
        if self.args.consistency_shared_trunk:
            self._trunk = SharedTrunk(self._core_model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains the model. See [`~transformers.Trainer.train`]."""
        self._component_sums = None  # An earlier training may have ended between two logs.
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch; in training, of two passes over it. See [`~transformers.Trainer.compute_loss`]."""
        if not (model.training and self.args.consistency_weight > 0):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        self._has_run_twice = True
        if self.compute_loss_func is not None:
            check_labels(inputs.get("labels"), self._core_model)
        batch = self._make_batch(inputs).sample_rows(self.args.consistency_fraction if self._has_term else 0.0)
        # Without the number of items every head returns the mean over its micro-batch, whether or not it supports that
        # argument. The shares below weight that mean.
        num_items = batch.num_task_items.sum().to(self.args.device)
        repeated = batch.repeated
        if self._trunk is not None:
            self._trunk.start(model, repeated, batch.batch_size, batch.rows)
        with ForwardRecorder(model, batch.alignment) as forward, averaging_over(num_items, self):
            mean = super().compute_loss(model, repeated, num_items_in_batch=None)
        share, task_share, divergence_share = (
            self._share_of_step(weight, batch.num_items, num_items_in_batch)
            for weight in (batch.num_items, *batch.item_weights)
        )
        divergence = batch.divergence(forward.output, self.args.consistency_divergence)
        task_loss = batch.task_loss(mean, forward.output, task_share).to(divergence.dtype)
        self._check_randomness(batch.num_repeated_items, divergence)

        # The loss of question answering is the mean of two means, over the start and over the end positions.
        components = (task_loss * task_share).mean(), (divergence * divergence_share).mean()
        steps = share.mean()
        sums = torch.stack((*components, steps, steps * self._has_term)).detach()
        self._component_sums = sums if self._component_sums is None else self._component_sums + sums
        loss = components[0] + self._current_consistency_weight * components[1]
        return (loss, batch.first_pass(forward.output)) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch. See [`~transformers.Trainer.training_step`]."""
        if self.args.consistency_weight <= 0:
            self._check_method()
            return super().training_step(*args, **kwargs)
        stock = getattr(self, SCALING)
        setattr(self, SCALING, True)
        try:
            with self._sharing_trunk():
                loss = super().training_step(*args, **kwargs)
        finally:
            setattr(self, SCALING, stock)
        if self.accelerator.sync_gradients:  # Not every micro-batch may need the term.
            check_override(self, self._has_run_twice)
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step and their number of items. See
        [`~transformers.Trainer.get_batch_samples`], which counts items only for some models."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.consistency_weight > 0 and batches:
            num_items = torch.stack([self._make_batch(batch).num_items.to(device) for batch in batches]).sum(dim=0)
            if self.args.average_tokens_across_devices:
                num_items = self.accelerator.reduce(num_items, reduction="sum")
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with the components of the training loss. See [`~transformers.Trainer.log`]."""
        if "loss" in logs and self._component_sums is not None:
            sums = self.accelerator.reduce(self._component_sums, reduction="mean").tolist()
            task_loss, divergence, steps, steps_with_term = sums
            logs = {**logs, "task_loss": task_loss / steps}
            if steps_with_term > 0:
                logs["consistency_loss"] = divergence / steps_with_term
            self._component_sums = None
        super().log(logs, start_time)

    @property
    def method_cards(self) -> tuple[MethodCard, ...]:
        """The cards of the methods of this training that do not act on attention.

        That of the consistency term needs a weight above 0, and two passes that differed in some logged step, if any
        was logged.
        """
        cards = []
        logged = [entry["consistency_loss"] for entry in self.state.log_history if "consistency_loss" in entry]
        if self.args.consistency_weight > 0 and (not logged or max(logged) > NO_DIVERGENCE):
            cards.append(consistency_card(resolve_consistency(self.args)))
        if (p := dropconnect_of(self._core_model)) is not None:
            cards.append(dropconnect_card(p))
        return tuple(cards)

    @property
    def _core_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _alignment(self) -> LabelAlignment:
        # Kept per model, because reading the source of a model takes time and `model_init` builds new models.
        model = self._core_model
        if model not in self._alignments:
            self._alignments[model] = LabelAlignment.of_model(model, self.label_smoother is not None)
        return self._alignments[model]

    @property
    def _has_term(self) -> bool:
        """Whether the term is part of this optimizer step."""
        return self.args.consistency_weight > 0 and self.state.global_step % self.args.consistency_interval == 0

    @property
    def _current_consistency_weight(self) -> float:
        warmup_steps = self.args.consistency_warmup_steps
        ramp = min(1.0, self.state.global_step / warmup_steps) if warmup_steps > 0 else 1.0
        return ramp * self.args.consistency_weight

    def _make_batch(self, inputs: Mapping[str, Any]) -> ConsistencyBatch:
        return ConsistencyBatch.for_model(self._core_model, inputs, self._alignment)

    def _sharing_trunk(self) -> AbstractContextManager[None]:
        if not self.args.consistency_shared_trunk:
            return nullcontext()
        if self._trunk is None or not self._trunk.fits(self._core_model):
            self._trunk = SharedTrunk(self._core_model)
        return self._trunk.installed()

    def _share_of_step(self, weight: Tensor, num_items: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The weight of the mean over a micro-batch, with which the gradients of a step sum to those of the mean over
        its items. A mean over both passes or over some rows has a `weight` other than the number of items."""
        if num_items_in_batch is None:
            num_items_in_batch, processes, equal_share = num_items, 1, 1.0
        else:
            # Processes average their gradients. Tensor parallel copies of a batch count as items and as processes.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            # In a step without items all micro-batches weigh the same, for losses like the load balancing of experts.
            equal_share = 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        total = torch.as_tensor(num_items_in_batch, device=self.args.device)
        return torch.where(total > 0, weight.to(self.args.device) / total.clamp(min=1) * processes, equal_share)

    def _check_method(self) -> None:
        """Checks once whether a method of this package takes part in the training."""
        if not self._has_checked_method:
            self._has_checked_method = True
            if self.is_world_process_zero():
                warn_without_method(self._core_model, type(self).__name__)

    def _check_randomness(self, num_items: Tensor, divergence: Tensor) -> None:
        """Checks once, on a batch whose items ran twice, whether the two passes differ."""
        if not self._has_checked_randomness and num_items.any():
            self._has_checked_randomness = True
            if divergence.max() <= NO_DIVERGENCE and self.is_world_process_zero():
                warn_without_randomness(self._core_model)


class AttentionDropTrainer(ConsistencyTrainerMixin, ScheduleMixin, ModelCardMixin, Trainer):
    """[`~transformers.Trainer`] that writes the model card of this package, see
    [`~hf_attentiondrop.hub.ModelCardMixin`], runs the schedule of its arguments, see
    [`~training.schedule.ScheduleArguments`], and adds the consistency term if `consistency_weight` > 0, see
    [`ConsistencyTrainerMixin`]."""


class AttentionDropSeq2SeqTrainer(ConsistencyTrainerMixin, ScheduleMixin, ModelCardMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] that writes the model card of this package, see
    [`~hf_attentiondrop.hub.ModelCardMixin`], runs the schedule of its arguments, see
    [`~training.schedule.ScheduleArguments`], and adds the consistency term if `consistency_weight` > 0, see
    [`ConsistencyTrainerMixin`]."""
