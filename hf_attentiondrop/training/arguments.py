"""Training arguments with a consistency term."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .losses import DIVERGENCES
from .schedule import ScheduleArguments


@dataclass
class ConsistencyArguments:
    """Arguments of the consistency term, a mixin for any [`~transformers.TrainingArguments`] class.

    Args:
        consistency_weight (`float`, defaults to 0.0):
            Weight λ ≥ 0 of the divergence between the two passes. 0 trains with one pass, like the plain Trainer; any
            positive value runs a second pass. 0.5 is a good starting point.
        consistency_divergence (`str`, defaults to `"symmetric_kl"`):
            `"symmetric_kl"`, `"kl"` or `"js"`, see [`consistency_loss`].
        consistency_warmup_steps (`int`, defaults to 0):
            Optimizer steps over which λ grows linearly from 0 to `consistency_weight`.
        consistency_fraction (`float`, defaults to 1.0):
            Share of the rows that run twice, 0 < f ≤ 1, sampled for each batch. A step costs about `1 + f` times a
            step without the term. The expected gradient does not depend on f.
        consistency_interval (`int`, defaults to 1):
            The term is part of every k-th optimizer step, k ≥ 1, counted from the first one. The other steps run one
            pass.
        consistency_shared_trunk (`bool`, defaults to `False`):
            Whether the layers below the first random one run once for both passes, see [`SharedTrunk`]. Same result,
            less time; needs perturbations of upper layers only, and no dropout below them.

    Raises:
        ValueError: if a value is out of range, or the shared trunk would have no effect. Without a weight the other
            settings wait for one.

    Example:

    >>> from dataclasses import dataclass
    >>> from transformers import TrainingArguments
    >>> @dataclass
    ... class MyArguments(ConsistencyArguments, TrainingArguments):
    ...     pass
    >>> MyArguments(output_dir="out", consistency_weight=0.5).consistency_weight
    0.5
    """

    consistency_weight: float = field(
        default=0.0, metadata={"help": "Weight of the divergence between two passes; 0 trains with one pass."}
    )
    consistency_divergence: Literal["symmetric_kl", "kl", "js"] = field(
        default="symmetric_kl", metadata={"help": "Divergence between the two passes."}
    )
    consistency_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps over which the weight grows linearly from 0."}
    )
    consistency_fraction: float = field(
        default=1.0, metadata={"help": "Share of the rows of each batch that run twice, sampled at random."}
    )
    consistency_interval: int = field(
        default=1, metadata={"help": "The term is part of every k-th optimizer step only."}
    )
    consistency_shared_trunk: bool = field(
        default=False, metadata={"help": "Run the layers below the first random one once for both passes."}
    )

    def __post_init__(self) -> None:
        weight, steps = self.consistency_weight, self.consistency_warmup_steps
        fraction, interval = self.consistency_fraction, self.consistency_interval
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(
                f"`consistency_weight` must be a finite number >= 0, got {weight!r}. It multiplies the divergence: "
                "a negative weight would drive the two passes apart. Use 0 (the default) to turn the term off."
            )
        if self.consistency_divergence not in DIVERGENCES:
            raise ValueError(
                f"`consistency_divergence` must be one of {tuple(DIVERGENCES)}, got {self.consistency_divergence!r}. "
                "It selects the divergence between the two passes."
            )
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(
                f"`consistency_warmup_steps` must be an integer >= 0, got {steps!r}. It counts the optimizer steps "
                "until the term reaches its full weight. Use 0 for the full weight from the first step."
            )
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ValueError(
                f"`consistency_fraction` must be a number > 0 and <= 1, got {fraction!r}. It is the share of the rows "
                "that run twice: without any there is no divergence. Use 1 for all rows, or `consistency_weight=0` to "
                "turn the term off."
            )
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(
                f"`consistency_interval` must be an integer >= 1, got {interval!r}. The term is part of every k-th "
                "optimizer step. Use 1 for every step, or `consistency_weight=0` to turn the term off."
            )
        if not isinstance(self.consistency_shared_trunk, bool):
            raise ValueError(
                f"`consistency_shared_trunk` must be True or False, got {self.consistency_shared_trunk!r}. It tells "
                "whether the layers below the first random one run once for both passes."
            )
        if self.consistency_shared_trunk and not weight > 0:
            raise ValueError(
                f"`consistency_shared_trunk=True` needs `consistency_weight` > 0, got {weight!r}: a single pass has "
                "nothing to share. Set a weight such as 0.5, or `consistency_shared_trunk=False`."
            )
        check_other_fields = getattr(super(), "__post_init__", None)
        if check_other_fields is not None:
            check_other_fields()


@dataclass
class AttentionDropTrainingArguments(ConsistencyArguments, ScheduleArguments, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the fields of [`ConsistencyArguments`] and [`ScheduleArguments`]."""


@dataclass
class AttentionDropSeq2SeqTrainingArguments(ConsistencyArguments, ScheduleArguments, Seq2SeqTrainingArguments):
    """[`~transformers.Seq2SeqTrainingArguments`] with the fields of [`ConsistencyArguments`] and
    [`ScheduleArguments`]."""


CONSISTENCY_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(ConsistencyArguments)}


def resolve_consistency(args: Any, overrides: Mapping[str, Any] | None = None) -> ConsistencyArguments:
    """Resolves each setting of the consistency term: override, then attribute of `args`, then default.

    Args:
        args: Training arguments, with or without the fields of [`ConsistencyArguments`].
        overrides (`Mapping[str, Any]`, *optional*): Values by field name; `None` counts as not given.

    Raises:
        ValueError: if a value is out of range.

    Example:

    >>> from transformers import TrainingArguments
    >>> resolve_consistency(TrainingArguments("out"), {"consistency_weight": 0.5}).consistency_divergence
    'symmetric_kl'
    """
    values = {name: getattr(args, name, default) for name, default in CONSISTENCY_DEFAULTS.items()}
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    return ConsistencyArguments(**values | given)
