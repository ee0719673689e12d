"""Classification metrics as modules of the `evaluate` library, which loads them from here without a network.

All of them take logits as predictions and classes as references, so that they combine:

    metrics = evaluate.combine([load_metric("accuracy"), load_metric("expected_calibration_error")])
    metrics.compute(predictions=logits, references=labels)
"""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import evaluate

METRICS = (
    "accuracy",
    "brier_score",
    "expected_calibration_error",
    "f1",
    "matthews_correlation",
    "negative_log_likelihood",
)


def metric_path(name: str) -> str:
    """The file of a metric, for `evaluate.load` and `evaluate.combine`.

    A bare name such as `"accuracy"` would make `evaluate` look for its own metric on the Hub.

    Args:
        name (`str`):
            `"accuracy"`, `"brier_score"`, `"expected_calibration_error"`, `"f1"`, `"matthews_correlation"` or
            `"negative_log_likelihood"`.

    Raises:
        ValueError: for another name.
    """
    if name not in METRICS:
        raise ValueError(f"The metric must be one of {METRICS}, got {name!r}.")
    return str(Path(__file__).with_name(f"{name}.py"))


def load_metric(name: str, **kwargs: object) -> "evaluate.Metric":
    """Loads a metric, with no network.

    Args:
        name (`str`): see [`metric_path`].
        kwargs: for `evaluate.load`, such as `experiment_id` where several processes write to one folder.

    Returns:
        `evaluate.Metric`: takes `predictions`, the logits `(N, C)`, and `references`, the classes `(N,)`, where items
        of class -100 count for nothing.

    Raises:
        ValueError: for an unknown name.
        ImportError: where `evaluate` or scikit-learn is not installed.
    """
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("Metric modules need evaluate: `pip install evaluate scikit-learn`.") from error
    return evaluate.load(metric_path(name), **kwargs)
