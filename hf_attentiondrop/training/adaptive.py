"""Adaptive strength: perturbs heads more, the more peaked their attention is."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..attention.entropy import EntropyMeter
from ..attention.parts import transformers_models
from ..configure import perturbed_states
from ..methods.method import ADAPTIVE_KEY
from ..methods.state import ModuleState
from ..validation import is_integer, is_number


# Change of a gain per unit of entropy in one measurement.
RATE = 0.5
# Rows of a batch that are measured.
ROWS = 4


class AdaptiveStrengthCallback(TrainerCallback, ExportableState):
    """Moves the strength of each head so that the entropy of its attention nears a target, in any
    [`~transformers.Trainer`].

    Each head has a gain in [0, 1] on the configured `p` or `sigma_max`, 1 at first. Every `interval` steps the gain
    grows by half of what the entropy lacks to the target: heads with peaked attention are perturbed more, up to the
    configured value, and flat ones less. The entropy, see [`~attention.entropy.EntropyMeter`], is measured on the
    first four rows of a batch, in the training step itself, and averaged over processes.

    Logs `attention_drop_gain` and `attention_entropy` along with the loss, means over heads. Checkpoints store the
    gains, so that a resumed training continues exactly. `config.json` keeps the configured values and names the target
    in the entry `attention_drop_adaptive`. Works together with a schedule.

    Args:
        target_entropy (`float`): in (0, 1), as a share of the entropy of uniform attention.
        interval (`int`, defaults to 50): optimizer steps between two measurements, at least 1.

    Raises:
        ValueError: for a value out of range; at the start of a training, if no part of the model is perturbed or the
            number of heads of a perturbed module is unknown.

    Example:

    ```python
    trainer = Trainer(model, args, callbacks=[AdaptiveStrengthCallback(target_entropy=0.5)], ...)
    ```
    """

    def __init__(self, target_entropy: float, interval: int = 50) -> None:
        check_adaptive(target_entropy, interval)
        self.target_entropy, self.interval = target_entropy, interval
        # By perturbed module, in the order of the model.
        self.gains: list[list[float]] = []
        self.entropy: float | None = None
        self.is_running = False
        self._measuring: list[ModuleState] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {
            "args": {"target_entropy": self.target_entropy, "interval": self.interval},
            "attributes": {"gains": self.gains, "entropy": self.entropy},
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        states = perturbed_states(model, "an adaptive strength")
        for module_state in states:
            if module_state.place.num_heads is None:
                raise ValueError(
                    f"An adaptive strength needs the number of heads, and the attention in "
                    f"{module_state.place.stack!r} has no attribute with it: its heads cannot be told apart. Train "
                    "without `target_entropy`, or perturb other parts of the model."
                )
        stored = state.stateful_callbacks.get(type(self).__name__) if state.global_step > 0 else None
        attributes = stored["attributes"] if isinstance(stored, dict) else {}
        start = [[1.0] * (module_state.place.num_heads or 1) for module_state in states]
        self.gains, self.entropy = attributes.get("gains", start), attributes.get("entropy")
        self.is_running = True
        self._apply(states)
        self._record(model)
        # Transformers saves the state of each callback in the place of that of the checkpoint.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step % self.interval == 0:
            self._measuring = perturbed_states(model, "an adaptive strength")
            self._check(self._measuring)
            self._record(model)  # A new configuration removes it.
            for module_state in self._measuring:
                module_state.meter = EntropyMeter(ROWS)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        # Most steps measure nothing, and then there is nothing to look up in the model.
        states, self._measuring = self._measuring, []
        if not states:
            return
        entropies = [
            _measured(module_state, len(gains)) for module_state, gains in zip(states, self.gains, strict=True)
        ]
        entropy = mean_over_processes(torch.cat(entropies))
        gains = torch.tensor([gain for gains in self.gains for gain in gains], dtype=torch.float64)
        change = RATE * (self.target_entropy - entropy)
        gains = (gains + change.nan_to_num(0.0)).clamp(0.0, 1.0)
        self.gains = [part.tolist() for part in gains.split([len(gains) for gains in self.gains])]
        self.entropy = entropy.nanmean().item()
        self._apply(states)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.entropy is not None:
            gains = [gain for of_module in self.gains for gain in of_module]
            log_along(logs, state, attention_drop_gain=sum(gains) / len(gains), attention_entropy=self.entropy)

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
        """Removes the gains, if there are any: the configured values hold again."""
        if self.is_running:
            self.is_running = False
            for module_state in perturbed_states(model, "an adaptive strength"):
                module_state.scale(module_state.factor)
                module_state.meter = None

    def _record(self, model: nn.Module | None) -> None:
        for base in transformers_models(model).values():
            setattr(base.config, ADAPTIVE_KEY, {"target_entropy": self.target_entropy, "interval": self.interval})

    def _check(self, states: list[ModuleState]) -> None:
        """Checks that the gains are those of the perturbed modules, which a new configuration may have changed."""
        heads, expected = [module_state.place.num_heads for module_state in states], list(map(len, self.gains))
        if heads != expected:
            raise ValueError(
                "The adaptive strength has gains for perturbed modules with these numbers of heads, "
                f"{expected}, and the model perturbs modules with {heads}. A checkpoint, or the training so far, "
                "perturbed other modules. Select the same ones, or start a new training."
            )

    def _apply(self, states: list[ModuleState]) -> None:
        self._check(states)
        for module_state, gains in zip(states, self.gains, strict=True):
            module_state.meter = None
            module_state.scale(module_state.factor, torch.tensor(gains, dtype=torch.float64))


def log_along(logs: dict[str, Any] | None, state: TrainerState, **values: float) -> None:
    """Adds values to the logs of a training loss, and to the history, into which the Trainer has already copied them.

    Args:
        logs (`dict[str, Any]`, *optional*): those that a callback gets.
        state ([`~transformers.TrainerState`]): with the history.
        values (`float`): to add, by name.
    """
    if logs is not None and "loss" in logs:
        for entry in (logs, state.log_history[-1]):
            entry.update(values)


def check_adaptive(target_entropy: Any, interval: Any) -> None:
    """Checks the settings of [`AdaptiveStrengthCallback`].

    Raises:
        ValueError: if one is out of range.
    """
    if not (is_number(target_entropy) and 0 < target_entropy < 1):
        raise ValueError(
            f"`target_entropy` must be a number in (0, 1), got {target_entropy!r}. It is a share of the entropy of "
            "uniform attention: heads below it are perturbed more, heads above it less."
        )
    if not (is_integer(interval) and interval >= 1):
        raise ValueError(
            f"`interval` must be an integer >= 1, got {interval!r}. It counts optimizer steps between measurements."
        )


def _measured(state: ModuleState, num_heads: int) -> Tensor:
    entropy = None if state.meter is None else state.meter.entropy
    # A layer that the step skipped (LayerDrop) measures nothing.
    return torch.full((num_heads,), torch.nan, dtype=torch.float64) if entropy is None else entropy.cpu()


def mean_over_processes(entropy: Tensor) -> Tensor:
    """Returns the mean over processes, of those that measured a number."""
    if not (dist.is_available() and dist.is_initialized()):
        return entropy
    measured: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(measured, entropy)
    return torch.stack(measured).nanmean(dim=0)
