"""Training arguments with a consistency term."""

import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .losses import DIVERGENCES


@dataclass
class ConsistencyArguments:
    """The arguments of the consistency term, to be mixed into any [`~transformers.TrainingArguments`].

    Args:
        consistency_weight (`float`, defaults to 0.0):
            Factor λ ≥ 0 of the divergence between the two passes. 0 trains with one pass, as the plain Trainer does;
            anything above costs a second one. 0.5 is a value to start with.
        consistency_divergence (`str`, defaults to `"symmetric_kl"`):
            `"symmetric_kl"`, `"kl"` or `"js"`, see [`consistency_loss`].
        consistency_warmup_steps (`int`, defaults to 0):
            Optimizer steps over which λ grows linearly from 0 to `consistency_weight`.

    Raises:
        ValueError: if a value is outside of its range.

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
        default=0.0, metadata={"help": "Factor of the divergence between two passes; 0 trains with one pass."}
    )
    consistency_divergence: Literal["symmetric_kl", "kl", "js"] = field(
        default="symmetric_kl", metadata={"help": "Divergence between the two passes."}
    )
    consistency_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps over which the factor grows linearly from 0."}
    )

    def __post_init__(self) -> None:
        weight, steps = self.consistency_weight, self.consistency_warmup_steps
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(
                f"`consistency_weight` must be a finite number >= 0, got {weight!r}. It multiplies the divergence: "
                "a negative one would drive the two passes apart. 0, the default, turns the term off."
            )
        if self.consistency_divergence not in DIVERGENCES:
            raise ValueError(
                f"`consistency_divergence` must be one of {tuple(DIVERGENCES)}, got {self.consistency_divergence!r}. "
                "It names the divergence between the two passes."
            )
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(
                f"`consistency_warmup_steps` must be an integer >= 0, got {steps!r}. It counts the optimizer steps "
                "until the term has its full weight; 0 gives it from the first step."
            )
        if isinstance(self, TrainingArguments):
            super().__post_init__()


@dataclass
class AttentionDropTrainingArguments(ConsistencyArguments, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the fields of [`ConsistencyArguments`]."""


@dataclass
class AttentionDropSeq2SeqTrainingArguments(ConsistencyArguments, Seq2SeqTrainingArguments):
    """[`~transformers.Seq2SeqTrainingArguments`] with the fields of [`ConsistencyArguments`]."""
