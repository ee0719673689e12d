"""The schedule of perturbations over the optimizer steps of a training, and its training arguments."""

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..methods.method import SCHEDULE_KEY
from ..validation import Config, is_number
from .adaptive import check_adaptive


# The factor at a point of the schedule, from 0 at its start to 1 at its end, and the turning point of a V shape.
SHAPES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, turn: 1.0,
    "linear_up": lambda progress, turn: progress,
    "linear_down": lambda progress, turn: 1.0 - progress,
    "cosine": lambda progress, turn: (1.0 + math.cos(math.pi * progress)) / 2.0,
    "v_shaped": lambda progress, turn: 1.0 - progress / turn if progress < turn else (progress - turn) / (1.0 - turn),
}


@dataclass(frozen=True, repr=False)
class AttentionDropSchedule(Config):
    """A factor in [0, 1] on the configured `p` or `sigma_max`, over the optimizer steps of a training.

    Args:
        shape (`str` or `Callable`, defaults to `"constant"`):
            `"linear_up"` from 0 to 1, `"linear_down"` from 1 to 0, `"cosine"` from 1 to 0 along half a cosine,
            `"v_shaped"` from 1 to 0 and back to 1, or `"constant"`. Or a function that takes the progress from
            `start` to `end`, in [0, 1], and returns the factor.
        start (`float`, defaults to 0.0):
            Where the schedule starts: a number of optimizer steps, or at most 1, a fraction of all steps. Before it,
            the factor is that of the start.
        end (`float`, defaults to 1.0): Where it ends, likewise. From there on, the factor is that of the end.
        turn (`float`, defaults to 0.5):
            Where between `start` and `end` a V-shaped schedule reaches 0, in (0, 1). In Scheduled DropHead (arXiv
            2004.13342) it is the end of the warm-up.

    Raises:
        ValueError: if a value is out of range or would have no effect.

    Example:

    >>> schedule = AttentionDropSchedule("linear_up", end=100)
    >>> [schedule.factor(step, num_steps=1000) for step in (0, 25, 100, 999)]
    [0.0, 0.25, 1.0, 1.0]
    """

    key = SCHEDULE_KEY

    shape: str | Callable[[float], float] = "constant"
    start: float = 0.0
    end: float = 1.0
    turn: float = 0.5

    def __post_init__(self) -> None:
        self._check(
            "shape",
            lambda shape: callable(shape) or (isinstance(shape, str) and shape in SHAPES),
            f"one of {tuple(SHAPES)} or a function of the progress",
            "It is the course of the factor on the configured values.",
        )
        for name in ("start", "end"):
            self._check(
                name,
                lambda value: is_number(value) and (0 <= value <= 1 or (1 < value < math.inf and value == int(value))),
                "a number of optimizer steps, or a fraction of all steps in [0, 1]",
                "It bounds the schedule.",
            )
        self._check(
            "turn", lambda turn: is_number(turn) and 0 < turn < 1, "in (0, 1)", "It is where a V shape reaches 0."
        )
        if self.turn != 0.5 and self.shape != "v_shaped":
            raise ValueError(
                f"{type(self).__name__}: `turn` is {self.turn!r}, and shape={self.name!r} has no turning point: it "
                'would have no effect. Use shape="v_shaped", or leave `turn` out.'
            )
        if self.shape == "constant" and (self.start, self.end) != (0.0, 1.0):
            raise ValueError(
                f"{type(self).__name__}: `start` and `end` are {self.start!r} and {self.end!r}, and a constant factor "
                'depends on neither: they would have no effect. Use a shape such as "linear_up", or leave them out.'
            )
        if (self.start <= 1) == (self.end <= 1):  # Otherwise it takes the number of steps to compare them.
            self._check_order(self.start, self.end)

    @property
    def name(self) -> str:
        """The shape, or the qualified name of its function."""
        if isinstance(self.shape, str):
            return self.shape
        return f"{self.shape.__module__}.{getattr(self.shape, '__qualname__', type(self.shape).__qualname__)}"

    def bounds(self, num_steps: int) -> tuple[float, float]:
        """Returns start and end in optimizer steps.

        Raises:
            ValueError: if the schedule does not start before it ends, and before the training ends.
        """
        start, end = (value * num_steps if value <= 1 else value for value in (self.start, self.end))
        self._check_order(start, end)
        if start >= num_steps:
            raise ValueError(
                f"{type(self).__name__}: `start` must be before the last of {num_steps} optimizer steps, got "
                f"{self.start!r}: the factor would never change. Start earlier, or train longer."
            )
        return start, end

    def factor(self, step: int, num_steps: int) -> float:
        """Returns the factor in an optimizer step.

        Args:
            step: number of completed optimizer steps, 0 in the first one.
            num_steps: number of optimizer steps of the training.

        Raises:
            ValueError: if the schedule does not start before it ends, or its function returns no number in [0, 1].
        """
        start, end = self.bounds(num_steps)
        progress = min(max((step - start) / (end - start), 0.0), 1.0)
        if isinstance(self.shape, str):
            return SHAPES[self.shape](progress, self.turn)
        factor = self.shape(progress)
        if not (is_number(factor) and 0 <= factor <= 1):
            raise ValueError(
                f"{type(self).__name__}: expected {self.name} to return a factor in [0, 1], got {factor!r} at "
                f"progress {progress:g}. It multiplies the configured values, which are the highest ones."
            )
        return factor

    def record(self, num_steps: int) -> dict[str, Any]:
        """Returns what config.json says about the schedule of a training."""
        start, end = (round(bound) for bound in self.bounds(num_steps))
        turn = {"turn": self.turn} if self.shape == "v_shaped" else {}
        return {"shape": self.name, "start": start, "end": end, **turn, "num_steps": num_steps}

    def _resolved(self, start: float, end: float) -> str:
        return "" if (start, end) == (self.start, self.end) else f", which are the steps {start:g} and {end:g}"

    def _check_order(self, start: float, end: float) -> None:
        if not start < end:
            raise ValueError(
                f"{type(self).__name__}: `start` must be before `end`, got {self.start!r} and {self.end!r}"
                f"{self._resolved(start, end)}: the factor would be undefined between them. Numbers above 1 are "
                "optimizer steps, others fractions of all steps."
            )


@dataclass
class ScheduleArguments:
    """Arguments of the schedule of perturbations, a mixin for any [`~transformers.TrainingArguments`] class.

    Args:
        attention_drop_schedule (`str` or `Callable`, defaults to `"constant"`):
            The factor on the configured `p` or `sigma_max` over the training, see [`AttentionDropSchedule`]. A
            function must be importable, because checkpoints store the training arguments.
        attention_drop_schedule_start (`float`, defaults to 0.0): See [`AttentionDropSchedule`].
        attention_drop_schedule_end (`float`, defaults to 1.0): See [`AttentionDropSchedule`].
        attention_drop_schedule_turn (`float`, defaults to 0.5): See [`AttentionDropSchedule`].
        attention_drop_target_entropy (`float`, *optional*):
            Turns on an adaptive strength, see [`AdaptiveStrengthCallback`].
        attention_drop_adaptive_interval (`int`, defaults to 50): Optimizer steps between its measurements.

    Raises:
        ValueError: if a value is out of range or would have no effect.
    """

    attention_drop_schedule: Literal["constant", "linear_up", "linear_down", "cosine", "v_shaped"] = field(
        default="constant", metadata={"help": "Schedule of a factor on p or sigma_max over the training."}
    )
    attention_drop_schedule_start: float = field(
        default=0.0,
        metadata={"help": "Where the schedule starts: optimizer steps, or at most 1, a fraction of all steps."},
    )
    attention_drop_schedule_end: float = field(
        default=1.0,
        metadata={"help": "Where the schedule ends: optimizer steps, or at most 1, a fraction of all steps."},
    )
    attention_drop_schedule_turn: float = field(
        default=0.5, metadata={"help": "Where between start and end a v_shaped schedule reaches 0, in (0, 1)."}
    )
    attention_drop_target_entropy: float | None = field(
        default=None,
        metadata={
            "help": "Adapts p or sigma_max of each head so that the entropy of its attention, as a share of that of "
            "uniform attention, nears this value in (0, 1)."
        },
    )
    attention_drop_adaptive_interval: int = field(
        default=50, metadata={"help": "Optimizer steps between the measurements of an adaptive strength."}
    )

    def __post_init__(self) -> None:
        if self.attention_drop_target_entropy is not None:
            check_adaptive(self.attention_drop_target_entropy, self.attention_drop_adaptive_interval)
        elif self.attention_drop_adaptive_interval != 50:
            raise ValueError(
                f"`attention_drop_adaptive_interval` is {self.attention_drop_adaptive_interval!r}, and there is no "
                "`attention_drop_target_entropy`: it would have no effect. Set a target such as 0.5, or leave it out."
            )
        schedule = schedule_of(self)
        if not isinstance(schedule.shape, str):
            try:
                pickle.dumps(schedule.shape)
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                raise ValueError(
                    f"`attention_drop_schedule` must be importable, got {schedule.name}: checkpoints store the "
                    "training arguments, and saving one would fail. Define the function at the top level of a module, "
                    "or pass AttentionDropScheduleCallback(AttentionDropSchedule(...)) to the Trainer."
                ) from error
        check_other_fields = getattr(super(), "__post_init__", None)
        if check_other_fields is not None:
            check_other_fields()

    def to_dict(self) -> dict[str, Any]:
        """Returns the training arguments as they are logged and saved: a schedule that is a function by its name."""
        values = super().to_dict()  # type: ignore[misc]  # Of the training arguments.
        return values | {SCHEDULE_KEY: schedule_of(self).name}


def schedule_of(args: Any) -> AttentionDropSchedule:
    """Returns the schedule of training arguments, constant if they have no fields of [`ScheduleArguments`]."""
    names = {"shape": SCHEDULE_KEY} | {name: f"{SCHEDULE_KEY}_{name}" for name in ("start", "end", "turn")}
    return AttentionDropSchedule(**{name: getattr(args, of) for name, of in names.items() if hasattr(args, of)})
