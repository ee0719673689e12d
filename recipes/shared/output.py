"""The output folder of a recipe: the check before the run, and the record that the run writes."""

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
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME

import hf_attentiondrop
from hf_attentiondrop.attention.dropout import dropout_of
from hf_attentiondrop.evaluation.classifier import ClassifierEvaluation, save_plots
from hf_attentiondrop.evaluation.diagnostics import AttentionStatistics
from hf_attentiondrop.evaluation.sample_maps import map_first_sample
from hf_attentiondrop.hub import CARD_FILE, METRICS_FILE
from hf_attentiondrop.hub.tables import HUB_METRICS, evaluation_metrics

from .checkpoints import find_checkpoint
from .evaluation import held_out_batches
from .parser import RecipeParser


RUN_FILE = "run.yaml"
# Locked by the run that writes into the folder. Names with a leading underscore are not uploaded.
LOCK_FILE = "_lock"
NESTED_METRICS = ("calibration", "robustness", "attention")
# Arguments that do not change the result of a run.
NOT_IN_RUN_FILE = ("config", "overwrite_output_dir", "resume_from_checkpoint", "use_cpu", "hub_token")


def check_output_dir(arguments: TrainingArguments) -> str | None:
    """Checks that the run may write into its output folder, and finds the checkpoint to resume from.

    Returns:
        `str`, *optional*: the checkpoint folder.

    Raises:
        ValueError:
            If the checkpoint is missing or would not be used, if the folder is not empty and the run does not resume
            in it, or if a model is to be uploaded that is not saved.
    """
    folder = Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir: expected a folder, {folder} is a file.")
    if arguments.push_to_hub and not arguments.save_model:
        raise ValueError(
            "--push_to_hub uploads the trained model, which --save_model false would not write. Leave out one of them."
        )
    if arguments.resume_from_checkpoint is not None and not arguments.do_train:
        raise ValueError(
            "--resume_from_checkpoint continues a training, and --do_train false leaves it out: the checkpoint would "
            "not be loaded. Name its folder with --model_name_or_path to evaluate it."
        )
    checkpoint = find_checkpoint(arguments)
    is_continued = checkpoint is not None and Path(checkpoint).resolve().is_relative_to(folder.resolve())
    is_free = not folder.exists() or all(path.name == LOCK_FILE for path in folder.iterdir())
    if not (is_free or is_continued or arguments.overwrite_output_dir):
        raise ValueError(
            f"--output_dir: {folder} is not empty, and the run would overwrite its files. Pass another folder, "
            "or add --overwrite_output_dir, or --resume_from_checkpoint to continue the run in it."
        )
    # The first process must not write before all have checked.
    arguments.distributed_state.wait_for_everyone()
    return checkpoint


def write_record(parser: RecipeParser, folder: str, metrics: Mapping[str, Any]) -> None:
    """Writes `metrics.json`, and `run.yaml` with the arguments that reproduce the run."""
    record = {**metrics, "versions": _versions()}
    (Path(folder) / METRICS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    # All arguments of the recipe, and those of Transformers that were passed or differ from its defaults. A passed
    # default counts, because the recipe may have another.
    defaults = vars(HfArgumentParser(TrainingArguments).parse_args([]))
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in parser.values.items()
        if name not in NOT_IN_RUN_FILE and value is not None and (name in parser.given or value != defaults.get(name))
    }
    header = f"# accelerate launch recipes/{parser.prog} --config {RUN_FILE} --output_dir <another folder>\n"
    (Path(folder) / RUN_FILE).write_text(header + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def finish(
    trainer: Trainer,
    parser: RecipeParser,
    title: str,
    data: str,
    metrics: dict[str, Any],
    results: Mapping[str, str],
    evaluation: ClassifierEvaluation | None = None,
    attention: Mapping[str, AttentionStatistics] | None = None,
) -> None:
    """Finishes a run: writes metrics, plots and the model card, prints the results, and uploads with `--push_to_hub`.

    Args:
        trainer ([`~transformers.Trainer`]): of the run.
        parser ([`RecipeParser`]): with the arguments of the run.
        title (`str`): of the printed table.
        data (`str`): description of the built-in data.
        metrics (`dict[str, Any]`): all metrics.
        results (`Mapping[str, str]`): rows of the printed table.
        evaluation ([`ClassifierEvaluation`], *optional*): of a classifier.
        attention (`Mapping[str, AttentionStatistics]`, *optional*): of any other model.
    """
    folder = trainer.args.output_dir
    if evaluation is not None:
        metrics |= {name: value for name, value in evaluation.metrics.items() if name in NESTED_METRICS}
        results = {**results, "calibration error": f"{metrics['calibration']['expected_calibration_error']:.4f}"}
        for row in metrics.get("robustness", {}).get("attacks", ())[-1:]:
            under = f"under {row['name']}, epsilon {row['epsilon']:.4g}"
            results["robust accuracy"] = f"{row['accuracy']:.4f} {under}"
    elif attention:
        metrics["attention"] = {stack: measured.metrics() for stack, measured in attention.items()}
    for name, value in evaluation_metrics(metrics, "test").items():
        if name in HUB_METRICS:
            results = {**results, f"test {name}": f"{value:.4f} (on {metrics['test_samples']} samples)"}
    metrics["dropout"] = dropout_of(trainer.model.config)
    if (p := hf_attentiondrop.dropconnect_of(trainer.model)) is not None:
        metrics["dropconnect"] = p
    card = describe_data(parser.values, data, metrics)
    sample = None
    if evaluation is not None or attention:
        # Every process, because a sharded model runs only if all processes run it.
        sample = map_first_sample(trainer.model, held_out_batches(trainer), trainer.processing_class)
    if trainer.is_world_process_zero():
        plots = save_plots(folder, evaluation, attention, trainer.state.log_history, sample)
        card |= {"metrics": metrics, "plots": plots}
        write_record(parser, folder, metrics)
        trainer.create_model_card(**card)
        has_model = trainer.args.do_train and trainer.args.save_model
        print_results(title, results, folder, has_model)
    if trainer.args.push_to_hub:
        with parser.exiting_on_bad_input():
            trainer.push_to_hub(**card)


def describe_data(values: Mapping[str, Any], built_in: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The data in the model card: its id on the Hub, or a description; evaluation and test data if they were used."""
    name, subset = values["dataset_name"], values["max_eval_samples"]
    # A limit above the number of samples is none.
    has_subset = values["do_eval"] and subset is not None and metrics["eval_samples"] == subset
    if name is not None and not Path(name).exists():
        return {
            "dataset_tags": name,
            "dataset_args": values["dataset_config_name"],
            "dataset_split": values["validation_split"] if values["do_eval"] else None,
            "dataset_subset": subset if has_subset else None,
            "dataset_test_split": values["test_split"] if values["do_predict"] else None,
        }
    # Only the last part of a path: the rest is specific to the machine.
    train, validation, test = (
        Path(local).resolve().name if local else None
        for local in (
            name or values.get("train_file") or values.get("train_dir"),
            values["do_eval"] and (values.get("validation_file") or values.get("validation_dir")),
            values["do_predict"] and (values.get("test_file") or values.get("test_dir")),
        )
    )
    if has_subset:
        validation = f"a random subset of {subset} {f'samples of {validation}' if validation else 'held-out samples'}"
    parts = [train or built_in, validation and f"evaluated on {validation}", test and f"tested on {test}"]
    return {"dataset": ", ".join(filter(None, parts))}


def describe_attention(model: PreTrainedModel) -> str:
    """Describes the methods that ran on the attention of the model, in one line."""
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


def print_results(title: str, results: Mapping[str, str], folder: str, has_model: bool) -> None:
    """Prints a table of the results and of the files that the run wrote, perhaps a model among them."""
    models = {"model": Path(folder, SAFE_WEIGHTS_NAME), "adapter": Path(folder, ADAPTER_SAFE_WEIGHTS_NAME)}
    written = {
        **(models if has_model else {}),
        "metrics": Path(folder, METRICS_FILE),
        "arguments": Path(folder, RUN_FILE),
        "report": Path(folder, CARD_FILE),
    }
    rows = {**results, **{name: str(path) for name, path in written.items() if path.exists()}}
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    rule = "-" * max(map(len, lines))
    print("\n".join(["", title, rule, *lines, rule]))


def _versions() -> dict[str, str]:
    modules = (hf_attentiondrop, torch, transformers, accelerate, datasets)
    return {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}
