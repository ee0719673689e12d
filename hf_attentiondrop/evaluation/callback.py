"""The diagnostics of a training, while it runs."""

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
    """Logs how a model attends and how noisy its gradients are, every so many steps of a training.

    Logged beside the Trainer's own figures: `{stack}_entropy`, `{stack}_first_token_mass`, `{stack}_top_k_mass` and
    `{stack}_total_mass`, means over layers and heads, where a stack is `attentions` or `encoder_attentions` and so on;
    `gradient_variance` with two batches or more; and at the end of the training `gradient_norm_mean`,
    `gradient_norm_variance` and `gradient_norm_spikes`, over the norms that the Trainer logged: with
    `logging_steps=1` those of all steps.

    The cost of every measurement is a forward pass of each batch with materialised attention, and for the variance
    a forward and backward pass of each and memory for two gradients. The gradient norms cost nothing. The training
    itself does not change: weights, buffers and random states are left as they were.

    Args:
        trainer: the Trainer to log through.
        batches: batches with labels, on which every measurement is made.
        every: optimizer steps from one measurement to the next, at least 1.
        with_gradients: whether to measure the variance of gradients, too.

    Raises:
        ValueError: for no batches, or an `every` below 1.

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
                f"DiagnosticsCallback needs a batch to measure on, and two for the variance of gradients; got "
                f"{len(batches)}."
            )
        self.trainer, self.batches = trainer, batches
        self.every, self.with_gradients = every, with_gradients
        self.norms: list[float] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        norm = float((logs or {}).get("grad_norm", math.nan))
        if math.isfinite(norm):  # Loss scaling skips steps whose gradients overflow.
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
            control.should_log = is_due  # The Trainer took this log for its own.

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
