"""Effect of learned reweighting on a language model trained from scratch: loss, gradient norms, attention statistics.

    python benchmarks/reweighting_experiment.py

Each method trains the language-model recipe's LLaMA on Python's documentation with the same seeds and number of steps,
without AttentionDrop and the consistency term. Affine scaling and gate use the initialization of their papers
(`init=paper`), because there are no pretrained weights to preserve.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from experiments import CONFIDENCE, cell, run_recipe, summarize, write_results
from measuring import hardware
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attentiondrop.evaluation.diagnostics import attention_statistics
from hf_attentiondrop.evaluation.gradients import SPIKE_FACTOR, SPIKE_WINDOW, gradient_norms


METHODS = {
    "softmax": {"attn_implementation": "sdpa"},
    "sink": {"attn_implementation": "attention_sink"},
    "gate": {"attn_implementation": "gated_attention", "attention_reweighting": "{init: paper}"},
    "affine": {"attn_implementation": "affine_scaled", "attention_reweighting": "{init: paper}"},
    "affine + gate": {"attn_implementation": "affine_scaled", "attention_reweighting": "{init: paper, gate: true}"},
}
MEASURES = {
    "validation_loss": "validation loss",
    "gradient_norm_variance": "gradient-norm variance",
    "first_token_mass": "first-token mass",
    "entropy": "entropy (nats)",
}
MEASURED_BLOCKS = 64
BLOCK_SIZE = 128


def held_out_batches(folder: str) -> list[dict[str, torch.Tensor]]:
    """Returns the first validation blocks of the run, packed by the recipe."""
    import causal_lm

    arguments = causal_lm.TextDataArguments(block_size=BLOCK_SIZE)
    data = causal_lm.load_data(arguments)
    packed = causal_lm.pack(data, AutoTokenizer.from_pretrained(folder), arguments)
    blocks = [block for block in packed["validation"]["input_ids"] if len(block) == BLOCK_SIZE]
    return [{"input_ids": batch} for batch in torch.tensor(blocks[:MEASURED_BLOCKS]).split(16)]


def run(method: str, seed: int, epochs: float, first_steps: int) -> dict[str, Any]:
    """Trains one model and returns its measures."""
    options = {"block_size": BLOCK_SIZE, "consistency_weight": 0, "num_train_epochs": epochs, "logging_steps": 1}
    with tempfile.TemporaryDirectory() as folder:
        metrics = run_recipe("causal_lm", folder, seed=seed, **METHODS[method], **options)
        history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
        norms = [logs["grad_norm"] for logs in history if "grad_norm" in logs]
        model = AutoModelForCausalLM.from_pretrained(folder)
        attention = attention_statistics(model, held_out_batches(folder))["attentions"].means()
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {
        "method": method,
        "seed": seed,
        "validation_loss": math.log(metrics["eval_perplexity"]),
        "gradient_norm_variance": gradient_norms(norms[:first_steps]).variance,
        "gradient_norm_spikes": gradient_norms(norms).spikes,
        "steps": len(norms),
        "first_token_mass": attention["first_token_mass"],
        "entropy": attention["entropy"],
        "parameters": sum(parameters.values()),
        "extra_parameters": sum(count for name, count in parameters.items() if "reweighting" in name),
        "versions": metrics["versions"],
    }


def table(summary: list[dict[str, Any]], runs: list[dict[str, Any]], setup: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    base = next(run for run in runs if not run["extra_parameters"])
    lines = [
        "# Learned reweighting of a language model from scratch",
        "",
        f"`{setup['command']}` on {setup['hardware']}, {setup['threads']} thread(s); {versions}.",
        "",
        f"The language-model recipe's LLaMA ({base['parameters']:,} parameters) on Python's documentation, "
        f"{base['steps']} steps, without AttentionDrop and the consistency term; the same data in all runs. The "
        f"variance of gradient norms covers the first {setup['first_steps']} steps, before clipping. Spikes are "
        f"gradient norms above {SPIKE_FACTOR:g} times the median of the previous {SPIKE_WINDOW}, over all steps and "
        f"seeds. First-token mass and entropy are means over layers, heads and queries in {MEASURED_BLOCKS} held-out "
        f"blocks of {BLOCK_SIZE} tokens; for affine scaling they use absolute weights, normalized to a sum of 1.",
        "",
        f"Means over {len(setup['seeds'])} seeds ± half-width of the {CONFIDENCE:.0%} confidence interval "
        f"(t-distribution); in italics the difference from {summary[0]['method']}, paired by seed.",
        "",
        "| method | extra parameters | spikes | " + " | ".join(MEASURES.values()) + " |",
        "|---|---:|---:|" + "---:|" * len(MEASURES),
    ]
    for row in summary:
        group = [run for run in runs if run["method"] == row["method"]]
        extra, spikes = group[0]["extra_parameters"], sum(run["gradient_norm_spikes"] for run in group)
        cells = [cell(row[measure]) for measure in MEASURES]
        lines.append(f"| {row['method']} | {extra:,} | {spikes} | " + " | ".join(cells) + " |")
        if row is not summary[0]:
            cells = [f"*{cell(row[measure]['difference'], '+')}*" for measure in MEASURES]
            lines.append("| | | | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--first_steps", type=int, default=100, help="steps for the variance of gradient norms")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    runs = [
        run(method, seed, arguments.epochs, arguments.first_steps) for seed in arguments.seeds for method in METHODS
    ]
    setup = {
        "command": f"python benchmarks/reweighting_experiment.py --seeds {' '.join(map(str, arguments.seeds))} "
        f"--epochs {arguments.epochs:g} --first_steps {arguments.first_steps} --threads {arguments.threads}",
        "hardware": hardware("cpu"),
        "threads": arguments.threads,
        "seeds": arguments.seeds,
        "first_steps": arguments.first_steps,
        "versions": runs[0]["versions"],
    }
    runs = [{name: value for name, value in run.items() if name != "versions"} for run in runs]
    summary = summarize(runs, "method", list(MEASURES))
    results = {"setup": setup, "summary": summary, "runs": runs}
    write_results(arguments.output, "reweighting_experiment", results, table(summary, runs, setup))


if __name__ == "__main__":
    main()
