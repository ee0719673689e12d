"""A callback that logs diagnostics during training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .diagnostics import attention_statistics
from .gradients import gradient_noise, gradient_norms
from .running import random_state_kept


class DiagnosticsCallback(TrainerCallback):
    """Logs attention statistics and gradient noise every few steps of a training run.

    Adds to the Trainer's logs: `{stack}_entropy`, `{stack}_first_token_mass`, `{stack}_top_k_mass` and
    `{stack}_total_mass`, means over layers and heads, where `stack` is `attentions`, `encoder_attentions` and so on;
    `gradient_variance` if asked for; and at the end `gradient_norm_mean`, `gradient_norm_variance` and
    `gradient_norm_spikes` over the norms that the Trainer logged: those of all steps with `logging_steps=1`.

    A measurement costs a forward pass of each batch with materialized attention weights; the variance costs another
    forward and backward pass of each batch, and memory for two gradients. Gradient norms are free. Training does not
    change: weights, buffers and random states are restored.

    Args:
        trainer ([`~transformers.Trainer`]): to log through.
        batches (`Sequence[Mapping[str, Any]]`): batches with labels to measure on.
        every (`int`, defaults to 100): optimizer steps between measurements, at least 1.
        with_gradients (`bool`, defaults to `False`): whether to measure the variance of gradients.

    Raises:
        ValueError: for too few batches, or an `every` below 1.

    Example:

    ```python
    batches = list(itertools.islice(trainer.get_eval_dataloader(), 4))
    trainer.add_callback(DiagnosticsCallback(trainer, batches, every=200))
    ```
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: Sequence[Mapping[str, Any]],
        every: int = 100,
        with_gradients: bool = False,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` must be an integer >= 1, got {every!r}. It counts steps between measurements.")
        if len(batches) < (2 if with_gradients else 1):
            raise ValueError(
                f"`batches` must contain a batch to measure on, two for the variance of gradients, got {len(batches)}."
            )
        self.trainer, self.batches = trainer, batches
        self.every, self.with_gradients = every, with_gradients
        self.norms: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.norms.clear()  # Of an earlier training.

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        norm = float((logs or {}).get("grad_norm", math.nan))
        if math.isfinite(norm):  # Loss scaling skips steps with overflowing gradients.
            self.norms.append(norm)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step % self.every == 0:
            is_due = control.should_log
            self.trainer.log(self._measure(self.trainer.accelerator.unwrap_model(model, keep_torch_compile=False)))
            control.should_log = is_due  # trainer.log reset it.

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if len(self.norms) > 1:
            norms = asdict(gradient_norms(self.norms))
            self.trainer.log({f"gradient_norm_{name}": norms[name] for name in ("mean", "variance", "spikes")})

    def _measure(self, model: nn.Module) -> dict[str, float]:
        with random_state_kept(model):
            statistics = attention_statistics(model, self.batches)
            logs = {
                f"{stack}_{name}": value
                for stack, measured in statistics.items()
                for name, value in measured.means().items()
            }
            if self.with_gradients:
                logs["gradient_variance"] = gradient_noise(model, self.batches).variance
        return logs
