"""`evaluate`: measures a saved classifier on labelled data and writes a report."""

import argparse
import math
from importlib.util import find_spec

from .flags import CommandError, positive


ATTACKED_SAMPLES = 200
# Modules that `evaluate` imports beyond the requirements of the package, and the packages that provide them.
EVALUATION_NEEDS = {"datasets": "datasets", "matplotlib": "matplotlib", "PIL": "pillow"}
# The largest seed of torch's generators, on every device.
MAX_SEED = 2**63 - 1
# Flags that are arguments of `evaluate_checkpoint` with the same name.
OPTIONS = (
    *("split", "config", "image_column", "text_column", "text_pair_column", "label_column"),
    *("max_samples", "batch_size", "seed", "device"),
)


def declare_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `evaluate` to the parser."""
    parser = commands.add_parser(
        "evaluate",
        help="measure accuracy, calibration, robustness and attention of a classifier",
        description="Measures an image or text classifier on labelled data and writes a report: metrics.json, plots "
        "and README.md.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder with a saved classifier, or one on the Hub")
    parser.add_argument(
        "--data",
        required=True,
        help="a folder with one folder of images per class; a csv, tsv, json, jsonl or parquet file; or a data set on "
        "the Hub",
    )
    parser.add_argument("--split", help="defaults to the first of test, validation and train that exists")
    parser.add_argument("--config", help="configuration of a data set on the Hub")
    parser.add_argument("--image_column", help="column of images (default: image)")
    parser.add_argument("--text_column", help="column of texts (default: text)")
    parser.add_argument("--text_pair_column", help="column of the second texts, if pairs are classified")
    parser.add_argument("--label_column", default="label", help="column of classes (default: label)")
    parser.add_argument("--max_samples", type=positive, help="evaluate on a random subset of this size")
    parser.add_argument("--batch_size", type=positive, default=32, help="samples per batch (default: 32)")
    parser.add_argument("--evaluate_robustness", action="store_true", help="attack the model with FGSM and PGD")
    parser.add_argument(
        "--robustness_samples", type=positive, help=f"number of samples to attack (default: {ATTACKED_SAMPLES})"
    )
    parser.add_argument(
        "--robustness_epsilon",
        type=_epsilon,
        help="bound of the strongest attack: for images a share of the pixel range (default: 8/255); for texts in "
        "standard deviations of the embeddings (default: 0.1)",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="for the order of samples and the attacks (default: 0)")
    parser.add_argument("--device", help="such as cuda:0; defaults to the accelerator, or the CPU if there is none")
    parser.add_argument(
        "--output_dir", required=True, help="folder for the report; it must be empty or must not exist"
    )
    parser.set_defaults(run=evaluate)


def evaluate(arguments: argparse.Namespace) -> str:
    """Measures a classifier, writes its report and returns a summary.

    Raises:
        CommandError: for invalid input and missing packages.
    """
    # Checked first: the plots are drawn last, after minutes of measuring.
    if missing := [package for module, package in EVALUATION_NEEDS.items() if find_spec(module) is None]:
        raise CommandError(f"evaluate needs {', '.join(missing)}: `pip install {' '.join(missing)}`.")
    import datasets
    from transformers import logging

    from .reporting import evaluate_checkpoint, summarize

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # It raises every error that it logs.
    for flag in ("robustness_samples", "robustness_epsilon"):
        value = getattr(arguments, flag)
        if value is not None and not arguments.evaluate_robustness:
            raise CommandError(
                f"--{flag}: nothing is attacked without --evaluate_robustness, so {value} would be ignored. Add that "
                "flag, or leave this one out."
            )
    attacked = (arguments.robustness_samples or ATTACKED_SAMPLES) if arguments.evaluate_robustness else 0
    options = {name: getattr(arguments, name) for name in OPTIONS}
    try:
        evaluation = evaluate_checkpoint(
            arguments.model,
            arguments.data,
            arguments.output_dir,
            attacked_samples=attacked,
            epsilon=arguments.robustness_epsilon,
            **options,
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    return summarize(evaluation, arguments.output_dir)


def _epsilon(text: str) -> float:
    try:
        epsilon = float(text)
    except ValueError:
        epsilon = math.nan
    if not 0 < epsilon < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}.")
    return epsilon


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {MAX_SEED}, got {text!r}.")
    return int(text)
