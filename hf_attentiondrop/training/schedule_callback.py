"""A callback that runs a schedule of perturbations in any Trainer."""

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..attention.parts import configs_of, transformers_models
from ..configure import perturbed_states, scale_attention_drop
from ..methods.method import ADAPTIVE_KEY, SCHEDULE_KEY
from .adaptive import AdaptiveStrengthCallback, log_along
from .schedule import AttentionDropSchedule, schedule_of


if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object


class ScheduleMixin(TrainerBase):
    """Runs the schedule and the adaptive strength of the training arguments, see [`ScheduleArguments`].

    A training that is interrupted ends them too: the configured values hold afterwards.

    Raises:
        ValueError: if there is a schedule or a target, and no part of the model is perturbed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Before the callbacks that report to other tools, so that these see the factor in the logs.
        callbacks: list[TrainerCallback] = [AttentionDropScheduleCallback()]
        target = getattr(self.args, "attention_drop_target_entropy", None)
        if target is not None:
            if any(isinstance(other, AdaptiveStrengthCallback) for other in self.callback_handler.callbacks):
                raise ValueError(
                    f"The training arguments have the target entropy {target!r}, and a callback has another: one "
                    "would undo the other. Use one of them."
                )
            callbacks.append(AdaptiveStrengthCallback(target, self.args.attention_drop_adaptive_interval))
        if self.model is not None and (target is not None or schedule_of(self.args).shape != "constant"):
            perturbed_states(self.model, "a schedule")  # Raises before anything is written.
        self.callback_handler.callbacks[:0] = callbacks

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains the model. See [`~transformers.Trainer.train`]."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, (AttentionDropScheduleCallback, AdaptiveStrengthCallback)):
                    callback.stop(self.model)


class AttentionDropScheduleCallback(TrainerCallback):
    """Runs a schedule in any [`~transformers.Trainer`].

    The factor depends only on the global step, so that a resumed training continues exactly. It is logged as
    `attention_drop_factor` along with the loss. `config.json` keeps the configured values, and names the schedule in
    the entry `attention_drop_schedule`; a training without a schedule removes the entry.

    Args:
        schedule ([`AttentionDropSchedule`], `str` or `Callable`, *optional*):
            The schedule or its shape; by default that of the training arguments. [`AttentionDropTrainer`] has such a
            callback already.

    Raises:
        ValueError: at the start of a training, if no part of the model is perturbed.

    Example:

    ```python
    trainer = Trainer(model, args, callbacks=[AttentionDropScheduleCallback("linear_up")], ...)
    ```
    """

    def __init__(self, schedule: AttentionDropSchedule | str | Callable[[float], float] | None = None) -> None:
        if schedule is not None and not isinstance(schedule, AttentionDropSchedule):
            schedule = AttentionDropSchedule(schedule)
        self.given = schedule
        self.schedule = self.given or AttentionDropSchedule()
        self.factor: float | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        of_arguments = schedule_of(args)
        if self.given is not None and of_arguments.shape != "constant":
            raise ValueError(
                f"The training arguments have the schedule {of_arguments.name!r}, and a callback has "
                f"{self.given.name!r}: one would undo the other. Use one of them."
            )
        self.schedule = self.given or of_arguments
        is_constant = self.schedule.shape == "constant"
        if not is_constant:
            self._scale(model, self.schedule.factor(state.global_step, state.max_steps))
        for base in transformers_models(model).values():
            if is_constant and SCHEDULE_KEY in base.config.__dict__:
                # An interrupted training may have left its factor. There is none if nothing is perturbed.
                with suppress(ValueError):
                    scale_attention_drop(base, None)
            for config in configs_of(base.config):
                # The callback of a Trainer runs before others, which record what they do.
                for key in (SCHEDULE_KEY,) if self.given else (SCHEDULE_KEY, ADAPTIVE_KEY):
                    config.__dict__.pop(key, None)
        if not is_constant:
            self._record(model, state)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self.schedule.shape != "constant":
            self._scale(model, self.schedule.factor(state.global_step, state.max_steps))
            self._record(model, state)  # A new configuration removes it.

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.factor is not None:
            log_along(logs, state, attention_drop_factor=self.factor)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self.stop(model)

    def stop(self, model: nn.Module | None) -> None:
        """Ends the schedule, if it runs: the configured values hold again."""
        if self.factor is not None:
            self._scale(model, None)

    def _record(self, model: nn.Module | None, state: TrainerState) -> None:
        record = self.schedule.record(state.max_steps)
        for base in transformers_models(model).values():
            if base.config.__dict__.get(SCHEDULE_KEY) != record:
                setattr(base.config, SCHEDULE_KEY, record)

    def _scale(self, model: nn.Module | None, factor: float | None) -> None:
        scale_attention_drop(model, factor)
        self.factor = factor
