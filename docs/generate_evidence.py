"""Writes the measured numbers into README.md and the pages of docs/, from the committed results of the studies.

Run it in the root of the repository:

    python -m docs.generate_evidence

A document names each number in a comment, and the number follows. The second comment ends it:

    <!-- =sst2_200_noise hard test_accuracy -->-0.004 ± 0.012<!-- / -->       difference of `hard` from the reference
    <!-- =sst2_200_noise hard test_accuracy vs r_drop -->+0.010 ± 0.015<!-- / -->   from another method
    <!-- =sst2_200_noise hard test_accuracy mean -->0.701 ± 0.020<!-- / -->   mean over the seeds
    <!-- =sst2_200_noise -->                                                  table of all methods
    <!-- / -->

A difference is bold if the method is better or worse after Holm's correction over the methods of the study.
"""

import re
from functools import cache
from pathlib import Path

from hf_attentiondrop.compare.comparison import Comparison, compare_methods, metric_values
from hf_attentiondrop.compare.results import RESULTS_FILE, Question, read_runs
from hf_attentiondrop.compare.sentences import format_estimate
from hf_attentiondrop.compare.study import read_study


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
NUMBER = re.compile(r"<!-- =(?P<names>[^>]+?) -->(?P<text>.*?)<!-- / -->", re.DOTALL)
HEADINGS = {
    "test_accuracy": "accuracy",
    "test_expected_calibration_error": "ECE",
    "test_negative_log_likelihood": "NLL",
    "test_negative_log_likelihood_after_temperature": "NLL, scaled",
    "test_perplexity": "perplexity",
    "test_bleu": "BLEU",
    "test_chrf": "chrF",
    "eval_accuracy": "accuracy",
    "eval_expected_calibration_error": "ECE",
    "eval_loss": "loss",
    "gradient_norms/variance": "variance of gradient norms",
    "attention/attentions/first_token_mass": "first-token mass",
    "attention/attentions/entropy": "entropy",
    "variance_ratio": "variance, relative",
    "robustness/accuracies/PGD-20/0.5": "accuracy under PGD",
}


def updated(document: str) -> str:
    """The text of a document with all its measured numbers as the results have them.

    Raises:
        ValueError: if a comment names something that was not measured.
    """
    return NUMBER.sub(lambda found: f"<!-- ={found['names']} -->{_measured(found['names'])}<!-- / -->", document)


def _measured(names: str) -> str:
    study, *rest = names.split()
    if not (RESULTS / study).is_dir():
        raise ValueError(f"<!-- ={names} -->: there is no study {study!r} in {RESULTS}.")
    if not rest:
        return f"\n{_table(study)}\n"
    method, metric, kind, reference = [*rest, None, None, None][:4]
    methods = read_study(RESULTS / study / "study.yaml").methods
    is_known = method in methods and (kind in (None, "mean") or (kind == "vs" and reference in methods))
    comparison = compared(study, metric, reference)[method] if is_known and metric else None
    if comparison is None or comparison.estimate is None:
        raise ValueError(
            f"<!-- ={names} -->: expected STUDY METHOD METRIC of the results, and perhaps mean or vs METHOD, got "
            "another name: the number would have no source. Correct the comment."
        )
    return _text(comparison, is_mean=kind == "mean")


@cache
def compared(study: str, metric: str, reference: str | None = None) -> dict[str, Comparison]:
    """The methods of a study compared on one metric, which need not be one of those that the study names, with the
    reference of the study or another method."""
    planned = read_study(RESULTS / study / "study.yaml")
    direction = planned.metrics.get(metric, "higher")
    reference = reference or planned.reference
    question = Question(planned.title, {metric: direction}, reference, list(planned.methods), command="")
    values = metric_values(read_runs(RESULTS / study / RESULTS_FILE), question, metric)
    return compare_methods(values, reference, direction)


def _table(study: str) -> str:
    """The mean of the first metric, and the differences from the reference on all metrics."""
    planned = read_study(RESULTS / study / "study.yaml")
    first, *_ = metrics = list(planned.metrics)
    names = [HEADINGS.get(metric, metric) for metric in metrics]
    rows = [["method", names[0], *(f"Δ {name}" for name in names)], ["---", *(["---:"] * (len(names) + 1))]]
    for method in planned.methods:
        cells = [_text(compared(study, first)[method], is_mean=True)]
        cells += [_text(compared(study, metric)[method]) for metric in metrics if method != planned.reference]
        cells += ["reference"] * (method == planned.reference)
        rows.append([f"`{method}`", *cells, *[""] * (len(names) + 1 - len(cells))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _text(comparison: Comparison, is_mean: bool = False) -> str:
    if is_mean:
        return format_estimate(comparison.estimate)
    text = format_estimate(comparison.difference, signed=True)
    return f"**{text}**" if comparison.verdict in ("better", "worse") else text


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
