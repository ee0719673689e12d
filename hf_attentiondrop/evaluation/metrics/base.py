"""The base class of the metric modules: input format, validation and options."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor

from hf_attentiondrop.evaluation.items import check_not_empty, select_items


AVERAGES = ("macro", "micro", "weighted", "binary")
INPUTS = """
Args:
    predictions: logits, `(N, C)`; neither probabilities nor predicted classes.
    references: class numbers, `(N,)`; items of class -100 are ignored.
    average (`str`, defaults to `"macro"`): how F1 is averaged over the classes, as in scikit-learn.
    num_bins (`int`, defaults to 15): number of bins of the calibration error.
"""


@dataclass(frozen=True)
class Options:
    """The options of `compute`. Combined metrics pass all options to each metric, which ignores those of the others.

    Args:
        average (`str`, defaults to `"macro"`): `"macro"`, `"micro"`, `"weighted"` or `"binary"`, for F1.
        num_bins (`int`, defaults to 15): for the calibration error.
    """

    average: str = "macro"
    num_bins: int = 15

    def __post_init__(self) -> None:
        if self.average not in AVERAGES:
            raise ValueError(f"`average` must be one of {AVERAGES}, got {self.average!r}.")


class LogitsMetric(evaluate.Metric, ABC):
    """A metric of logits and labels.

    It must stay abstract: `evaluate` loads the first concrete metric class in the namespace of a module.
    """

    @abstractmethod
    def score(self, logits: Tensor, labels: Tensor, options: Options) -> float:
        """The metric of validated logits `(N, C)` and labels `(N,)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int], **options: Any) -> dict[str, float]:
        logits, labels = select_items(torch.tensor(predictions, dtype=torch.float32), torch.tensor(references))
        check_not_empty(len(labels))
        return {self.name: float(self.score(logits, labels, Options(**options)))}
