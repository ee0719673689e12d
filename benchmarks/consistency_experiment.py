"""Effect of the weight of the consistency term on accuracy and calibration, with the text recipe.

    python benchmarks/consistency_experiment.py

All weights train with the same seeds, on the same passages of Python's documentation, for the same number of steps; a
positive weight takes two passes per step. For longer runs, as in the recipe, use `--epochs 15 --max_length 64`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from experiments import CONFIDENCE, cell, run_recipe, summarize, write_results
from measuring import hardware


MEASURES = {
    "eval_accuracy": "accuracy",
    "eval_expected_calibration_error": "calibration error",
    "eval_loss": "negative log-likelihood",
}


def table(summary: list[dict], setup: dict) -> str:
    def cells(value: dict) -> list[str]:
        return [cell(value), cell(value["difference"], "+") if "difference" in value else "–"]

    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    lines = [
        "# Weight of the consistency term: accuracy and calibration",
        "",
        f"`{setup['command']}` on {setup['hardware']}, {setup['threads']} thread(s); {versions}.",
        "",
        "A small BERT, trained from scratch, classifies passages of Python's documentation by topic: "
        f"{setup['train_samples']} for training, {setup['eval_samples']} held out, the same in all runs. Always "
        f"predicting the most frequent class has an accuracy of {setup['majority_accuracy']:.4f}. All runs use "
        "AttentionDrop (hard, p = 0.1, k = 5) and the model's own dropout.",
        "",
        f"Means over {len(setup['seeds'])} seeds ± half-width of the {CONFIDENCE:.0%} confidence interval "
        "(t-distribution), which covers the randomness of training but not of the choice of passages; differences are "
        f"paired by seed, relative to weight {summary[0]['weight']:g}. Calibration error is the expected calibration "
        "error with 15 bins. Lower is better for calibration error and negative log-likelihood.",
        "",
        "| weight | " + " | ".join(f"{name} | difference" for name in MEASURES.values()) + " |",
        "|---:|" + "---:|" * (2 * len(MEASURES)),
    ]
    for row in summary:
        texts = [text for measure in MEASURES for text in cells(row[measure])]
        lines.append(f"| {row['weight']:g} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.5, 1.0, 4.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--max_length", type=int, default=32, help="tokens after which a passage is cut off")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    runs = []
    for seed in arguments.seeds:
        for weight in arguments.weights:
            options = {"num_train_epochs": arguments.epochs, "max_length": arguments.max_length, "seed": seed}
            with tempfile.TemporaryDirectory() as folder:
                metrics = run_recipe("text_classification", folder, consistency_weight=weight, **options)
            runs.append({"weight": weight, "seed": seed, **metrics})
    shared = ("train_samples", "eval_samples", "majority_accuracy", "versions")
    options = " ".join(
        f"--{name} {' '.join(map(str, value if isinstance(value, list) else [value]))}"
        for name, value in vars(arguments).items()
        if name != "output"
    )
    setup = {
        "command": f"python benchmarks/consistency_experiment.py {options}",
        "hardware": hardware("cpu"),
        "threads": arguments.threads,
        "seeds": arguments.seeds,
        **{name: runs[0][name] for name in shared},
    }
    runs = [{name: value for name, value in run.items() if name not in shared} for run in runs]
    summary = summarize(runs, "weight", list(MEASURES))
    results = {"setup": setup, "summary": summary, "runs": runs}
    write_results(arguments.output, "consistency_experiment", results, table(summary, setup))


if __name__ == "__main__":
    main()
