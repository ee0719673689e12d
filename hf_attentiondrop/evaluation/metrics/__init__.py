"""Classification metrics as modules of the `evaluate` library, loaded without network access.

All take logits as predictions and classes as references, so they can be combined:

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

    With a bare name such as `"accuracy"`, `evaluate` would load another metric from the Hub.

    Args:
        name (`str`):
            `"accuracy"`, `"brier_score"`, `"expected_calibration_error"`, `"f1"`, `"matthews_correlation"` or
            `"negative_log_likelihood"`.

    Raises:
        ValueError: for any other name.
    """
    if name not in METRICS:
        raise ValueError(f"`name` must be one of {METRICS}, got {name!r}.")
    return str(Path(__file__).with_name(f"{name}.py"))


def load_metric(name: str, **kwargs: object) -> "evaluate.Metric":
    """Loads a metric without network access.

    Args:
        name (`str`): see [`metric_path`].
        kwargs: passed to `evaluate.load`, such as `experiment_id` if several processes write to one folder.

    Returns:
        `evaluate.Metric`: takes `predictions`, the logits `(N, C)`, and `references`, the classes `(N,)`; items of
        class -100 are ignored.

    Raises:
        ValueError: for an unknown name.
        ImportError: if `evaluate` or scikit-learn is missing.
    """
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("Metric modules need evaluate: `pip install evaluate scikit-learn`.") from error
    return evaluate.load(metric_path(name), **kwargs)
