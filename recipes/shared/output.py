"""The output folder of a recipe: what may be in it before the run, and the record that the run leaves in it."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import transformers
import yaml
from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME

import hf_attentiondrop

from .arguments import RecipeParser
from .checkpoints import find_checkpoint


METRICS_FILE = "metrics.json"
RUN_FILE = "run.yaml"
# How a run was started, and on what, is no part of what it computes.
NOT_IN_RUN_FILE = ("config", "overwrite_output_dir", "resume_from_checkpoint", "use_cpu")


def check_output_dir(arguments: TrainingArguments) -> str | None:
    """Checks that the run may write into its output folder, and finds the checkpoint to continue from.

    Returns:
        `str`, *optional*: the checkpoint folder.

    Raises:
        ValueError: if there is no checkpoint, or the folder holds something and the arguments do not say to go on.
    """
    folder = Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir: expected a folder, {folder} is a file.")
    checkpoint = find_checkpoint(arguments)
    is_continued = checkpoint is not None and Path(checkpoint).resolve().is_relative_to(folder.resolve())
    is_free = not folder.exists() or not any(folder.iterdir())
    if not (is_free or is_continued or arguments.overwrite_output_dir):
        raise ValueError(
            f"--output_dir: {folder} is not empty, and the run would overwrite what is in it. Name another folder, "
            "or add --overwrite_output_dir, or --resume_from_checkpoint to continue the run in it."
        )
    # The first process must not write before the last one has looked.
    arguments.distributed_state.wait_for_everyone()
    return checkpoint


def write_record(parser: RecipeParser, folder: str, metrics: Mapping[str, Any]) -> None:
    """Writes `metrics.json`, and `run.yaml` with the arguments that reproduce the run."""
    record = {**metrics, "versions": _versions()}
    (Path(folder) / METRICS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    # Every argument of the recipe, and of Transformers' many those that differ from its defaults.
    defaults = vars(HfArgumentParser(TrainingArguments).parse_args([]))
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in parser.values.items()
        if name not in NOT_IN_RUN_FILE and value is not None and value != defaults.get(name)
    }
    header = f"# accelerate launch recipes/{parser.prog} --config {RUN_FILE} --output_dir <another folder>\n"
    (Path(folder) / RUN_FILE).write_text(header + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def describe_attention(model: PreTrainedModel) -> str:
    """What was done to the model's attention, in one line."""
    rows = hf_attentiondrop.report(model).rows
    active = [row for row in rows if row.applied]
    learned = [row for row in rows if row.reweighting]
    parts = []
    if learned:
        parts.append(f"{learned[0].implementation} in {len(learned)} of {len(rows)} modules")
    if active:
        passes = sum(row.calls for row in active)
        parts.append(f"{active[0].applied}; {len(active)} of {len(rows)} modules, {passes} passes")
    return ", ".join(parts) or f"not perturbed ({model.config._attn_implementation})"


def print_results(title: str, results: Mapping[str, str], folder: str) -> None:
    """Prints a small table: the results, and where to find what the run wrote."""
    written = {
        "model": Path(folder, SAFE_WEIGHTS_NAME),
        "adapter": Path(folder, ADAPTER_SAFE_WEIGHTS_NAME),
        "metrics": Path(folder, METRICS_FILE),
        "arguments": Path(folder, RUN_FILE),
    }
    rows = {**results, **{name: str(path) for name, path in written.items() if path.exists()}}
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    rule = "-" * max(map(len, lines))
    print("\n".join(["", title, rule, *lines, rule]))


def _versions() -> dict[str, str]:
    modules = (hf_attentiondrop, torch, transformers, accelerate, datasets)
    return {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}
