"""Trainers whose loss has a consistency term."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from ..attention.modules import attention_modules
from ..hub import ModelCardMixin
from ..integration.implementations import FUNCTIONS
from .arguments import ConsistencyArguments
from .consistency import LabelAlignment, answer_losses, has_dropout, output_divergence, without_value
from .doubling import batch_size_of, double_batch, first_half, refuse_hidden_packing
from .losses import NO_DIVERGENCE
from .recording import RecordForward


logger = logging.getLogger(__name__)

# What tells the Trainer that a loss is the micro-batch's share of an optimizer step, and is not to be divided by the
# number of micro-batches. Before Transformers 5.19 it was that the model takes `num_items_in_batch`.
SCALING = "loss_is_scaled_for_ga" if hasattr(Trainer, "loss_is_scaled_for_ga") else "model_accepts_loss_kwargs"


class ConsistencyTrainerMixin:
    """Adds the consistency term to any [`~transformers.Trainer`] class, put before it among the base classes.

    In training each batch runs twice in one forward, with independent perturbations, and the loss is the task loss,
    the mean over both passes, plus `consistency_weight` times their divergence. The task loss is what the other base
    class makes of the doubled batch. Evaluation, prediction, and training at weight 0, the default, are left alone.

    Gradients do not depend on how a batch is cut into accumulation steps and processes: the mean over each micro-batch
    is weighted by its share of the items. `task_loss` and `consistency_loss` are logged beside `loss`.

    Overrides `training_step`, `compute_loss`, `get_batch_samples` and `log`.

    Args:
        args:
            What the other base class takes. An `args` with the fields of [`ConsistencyArguments`] configures the term.
        consistency_weight (`float`, *optional*):
            Goes before `args.consistency_weight`; 0.0 if neither is there.
        consistency_divergence (`str`, *optional*):
            Goes before `args.consistency_divergence`; `"symmetric_kl"` if neither is there.
        consistency_warmup_steps (`int`, *optional*):
            Goes before `args.consistency_warmup_steps`; 0 if neither is there.

    Raises:
        ValueError: for values out of range, and for what the term does not work with (`nn.DataParallel`, context and
            sequence parallelism, prompt tuning with label smoothing).

    Example:

    ```python
    class ConsistencySFTTrainer(ConsistencyTrainerMixin, SFTTrainer):
        pass

    trainer = ConsistencySFTTrainer(model, args=SFTConfig("out"), train_dataset=dataset, consistency_weight=0.5)
    ```
    """

    def __init__(
        self,
        *args: Any,
        consistency_weight: float | None = None,
        consistency_divergence: str | None = None,
        consistency_warmup_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        given = {
            "consistency_weight": consistency_weight,
            "consistency_divergence": consistency_divergence,
            "consistency_warmup_steps": consistency_warmup_steps,
        }
        for field in fields(ConsistencyArguments):
            if given[field.name] is None:
                given[field.name] = getattr(self.args, field.name, field.default)
        ConsistencyArguments(**given)
        # They live in the arguments, where callbacks and hyperparameter search look for them.
        for name, value in given.items():
            setattr(self.args, name, value)
        self._alignment_of: tuple[nn.Module | None, LabelAlignment] = None, LabelAlignment()
        self._component_sums: Tensor | None = None
        self._has_looked_for_randomness = self._has_looked_for_method = False
        if self.args.consistency_weight > 0:
            self._refuse_unsupported()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch; in training that of two passes over it. See [`~transformers.Trainer.compute_loss`]."""
        if not (model.training and self.args.consistency_weight > 0):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        core, alignment = self._core_model, self._alignment
        config = getattr(core, "config", None)
        refuse_hidden_packing(inputs, getattr(config, "_attn_implementation", None) or "")
        batch_size = batch_size_of(inputs, getattr(core, "main_input_name", "input_ids"))
        num_items = alignment.count_items(inputs, batch_size).to(self.args.device)
        # Without the number of items every head returns the mean over its micro-batch, whether or not it would have
        # used the number. That mean is weighted below.
        with RecordForward(model, alignment) as forward, self._compute_loss_func_for(2 * num_items):
            task_loss = super().compute_loss(model, double_batch(inputs, batch_size), num_items_in_batch=None)
        if len(forward.outputs) != 1:
            raise ValueError(
                f"{type(self).__name__} called the model {len(forward.outputs)} times with gradients for one loss: "
                "the consistency term compares the two halves of a single forward. Set `consistency_weight=0`."
            )
        outputs = forward.outputs[0]
        problem_type = getattr(config, "problem_type", None)
        divergence = output_divergence(outputs, inputs, alignment, problem_type, self.args.consistency_divergence)
        if not self._has_looked_for_randomness and num_items.any():
            self._look_for_randomness(divergence)

        share = self._share_of_step(num_items, num_items_in_batch)
        if num_items.dim() > 0 and not (num_items[0] == num_items[1] > 0 and share[0] == share[1]):
            task_loss = answer_losses(outputs, inputs, alignment)
        elif not num_items.any():
            task_loss = without_value(task_loss, outputs)
        # The loss of question answering is the mean of two means, over the starts and over the ends.
        components = [(part * share).mean() for part in (task_loss.to(divergence.dtype), divergence)]
        sums = torch.stack((*components, share.mean())).detach()
        self._component_sums = sums if self._component_sums is None else self._component_sums + sums
        loss = components[0] + self._current_consistency_weight * components[1]
        return (loss, first_half(outputs, batch_size)) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch, forward and backward. See [`~transformers.Trainer.training_step`]."""
        if self.args.consistency_weight <= 0:
            if not self._has_looked_for_method:
                self._look_for_method()
            return super().training_step(*args, **kwargs)
        stock = getattr(self, SCALING)
        setattr(self, SCALING, True)
        try:
            return super().training_step(*args, **kwargs)
        finally:
            setattr(self, SCALING, stock)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step and their number of items. See
        [`~transformers.Trainer.get_batch_samples`], which counts for some models only."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.consistency_weight > 0 and batches:
            alignment = self._alignment
            name = getattr(self._core_model, "main_input_name", "input_ids")
            counts = [alignment.count_items(batch, batch_size_of(batch, name)).to(device) for batch in batches]
            num_items = torch.stack(counts).sum(dim=0)
            if self.args.average_tokens_across_devices:
                num_items = self.accelerator.reduce(num_items, reduction="sum")
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with the components of the training loss. See [`~transformers.Trainer.log`]."""
        if "loss" in logs and self._component_sums is not None:
            # The third sum is the number of steps since the last log.
            task_loss, divergence, steps = self.accelerator.reduce(self._component_sums, reduction="mean").tolist()
            logs = {**logs, "task_loss": task_loss / steps, "consistency_loss": divergence / steps}
            self._component_sums = None
        super().log(logs, start_time)

    @property
    def _core_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _alignment(self) -> LabelAlignment:
        core = self._core_model
        if self._alignment_of[0] is not core:
            self._alignment_of = core, LabelAlignment.of_model(core, self.label_smoother is not None)
        return self._alignment_of[1]

    @property
    def _current_consistency_weight(self) -> float:
        warmup_steps = self.args.consistency_warmup_steps
        ramp = min(1.0, self.state.global_step / warmup_steps) if warmup_steps > 0 else 1.0
        return ramp * self.args.consistency_weight

    def _share_of_step(self, num_items: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Weight of a micro-batch, so that the gradients of an optimizer step add up to those of its mean."""
        if num_items_in_batch is None:
            return torch.ones_like(num_items, dtype=torch.float32)
        total = torch.as_tensor(num_items_in_batch, device=num_items.device)
        # Processes average their gradients. Tensor parallel copies of a batch count in the items as in the processes.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        # Without any item in the whole step its micro-batches weigh the same: the load balancing loss of experts is
        # there all the same.
        equal_share = 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        return torch.where(total > 0, num_items / total.clamp(min=1) * processes, equal_share)

    @contextmanager
    def _compute_loss_func_for(self, num_items: Tensor) -> Iterator[None]:
        """Gives a user's loss function the items of the doubled micro-batch, so that it returns their mean."""
        compute_loss_func = self.compute_loss_func
        if compute_loss_func is None:
            yield
            return

        def mean_loss(outputs: Any, labels: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
            return compute_loss_func(outputs, labels, num_items_in_batch=num_items.sum().clamp(min=1))

        self.compute_loss_func = mean_loss
        try:
            yield
        finally:
            self.compute_loss_func = compute_loss_func

    def _refuse_unsupported(self) -> None:
        remedy = "or set `consistency_weight=0`"
        if self.args.n_gpu > 1:
            raise ValueError(
                f"The consistency term does not run under nn.DataParallel ({self.args.n_gpu} GPUs in one process): it "
                "averages its replicas whatever their numbers of items. Start one process per GPU with "
                f"`accelerate launch`, show this one a single GPU with CUDA_VISIBLE_DEVICES, {remedy}."
            )
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError(
                "The consistency term does not run under context or sequence parallelism: these cut the sequences of "
                f"a batch that has to be doubled first. Use data, tensor or fully sharded parallelism, {remedy}."
            )
        if self._alignment.virtual_tokens and self.label_smoother is not None:
            raise ValueError(
                "Label smoothing does not work with prompt tuning: Transformers smooths without regard to the virtual "
                f"tokens before the logits. Set `label_smoothing_factor=0`, {remedy}."
            )

    def _look_for_method(self) -> None:
        """Warns where nothing of this package has a part in the training."""
        self._has_looked_for_method = True
        names = {module.config._attn_implementation for _, module in attention_modules(self._core_model)}
        if names.isdisjoint(FUNCTIONS) and self.is_world_process_zero():
            logger.warning(
                f"{type(self).__name__} trains as the plain Trainer would: no attention of "
                f"{type(self._core_model).__name__} is perturbed, and `consistency_weight` is 0. Load the model with "
                'attn_implementation="attentiondrop" and attention_drop=AttentionDropConfig(...), call '
                'model.set_attn_implementation("attentiondrop"), or set `consistency_weight`, which makes the '
                "model's own dropout R-Drop."
            )

    def _look_for_randomness(self, divergence: Tensor) -> None:
        """Warns where both passes are the same. Equal outputs alone do not tell: a fresh LoRA adapter adds nothing
        yet, whatever its dropout."""
        self._has_looked_for_randomness = True
        if divergence.max() > NO_DIVERGENCE or not self.is_world_process_zero() or has_dropout(self._core_model):
            return
        logger.warning(
            f"The consistency term has no effect: {type(self._core_model).__name__} has no dropout above 0 and no "
            "active AttentionDrop, so both passes over a batch are the same. Load the model with "
            'attn_implementation="attentiondrop" and attention_drop=AttentionDropConfig(...), raise a dropout '
            "probability in its config (attention_dropout, hidden_dropout_prob, ...), or set `consistency_weight=0` "
            "to save the second pass."
        )


class AttentionDropTrainer(ConsistencyTrainerMixin, ModelCardMixin, Trainer):
    """[`~transformers.Trainer`] with a model card of its own, see [`~hf_attentiondrop.hub.ModelCardMixin`], and, above
    `consistency_weight=0`, with the consistency term, see [`ConsistencyTrainerMixin`]."""


class AttentionDropSeq2SeqTrainer(ConsistencyTrainerMixin, ModelCardMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] with a model card of its own, see [`~hf_attentiondrop.hub.ModelCardMixin`],
    and, above `consistency_weight=0`, with the consistency term, see [`ConsistencyTrainerMixin`]."""
