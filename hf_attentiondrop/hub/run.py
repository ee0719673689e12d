"""The content of a card, taken from a Trainer: what it really trained, with what, and what came of it."""

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from torch import nn
from transformers import (
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerState,
)
from transformers.modelcard import TASK_MAPPING

from ..attention.parts import transformers_model
from ..report import report
from .content import CardContent, Data
from .methods import cards_of
from .training import describe_training


AUTO_CLASSES = {
    PreTrainedTokenizerBase: "AutoTokenizer",
    ImageProcessingMixin: "AutoImageProcessor",
    FeatureExtractionMixin: "AutoFeatureExtractor",
    ProcessorMixin: "AutoProcessor",
}
PACKAGES = ("hf_attentiondrop", "transformers", "torch", "accelerate", "datasets", "tokenizers")


def describe_run(
    trainer: Trainer,
    *,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | None = None,
    dataset: str | None = None,
    dataset_tags: str | None = None,
    dataset_args: str | None = None,
    dataset_split: str | None = None,
    dataset_test_split: str | None = None,
    dataset_subset: int | None = None,
    benchmark_task: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    plots: Iterable[str | Path] = (),
) -> CardContent:
    """What the card of a Trainer's model says. No file in the output folder is read for it: an earlier run may have
    left it there.

    Args:
        trainer ([`~transformers.Trainer`]): before or after training.
        language, license, tags (*optional*): metadata; unknown if not given.
        model_name (`str`, *optional*): by default the name of the repository, or of the output folder.
        finetuned_from (`str`, *optional*):
            Id on the Hub of the model that this one began as; found out where it was loaded by that id.
        tasks (`str`, *optional*): the Hub's name of the task; found out for the common heads.
        dataset (`str`, *optional*): the data in words.
        dataset_tags, dataset_args (`str`, *optional*): its id on the Hub, and its configuration.
        dataset_split, dataset_test_split (`str`, *optional*): the splits of the evaluation and of a final test.
        dataset_subset (`int`, *optional*): the size of the random subset of the split, if it was not all evaluated.
        benchmark_task (`str`, *optional*): the task of the benchmark that the data set is.
        metrics (`Mapping[str, Any]`, *optional*):
            See [`CardContent`]; by default those that the Trainer logged last of the model as it is.
        plots (*optional*): see [`describe_model`].

    Raises:
        ValueError: if a plot lies outside of the output folder.
    """
    adapter = next(iter(getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {}).values()), None)
    named = trainer.hub_model_id or trainer.args.hub_model_id
    folder = Path(trainer.args.output_dir)
    is_trained = trainer.state.global_step > 0
    content = describe_model(
        trainer.model,
        folder,
        _measured_by(trainer) if metrics is None else metrics,
        name=model_name or (named or folder.resolve().name).split("/")[-1],
        processor=trainer.processing_class,
        data=Data(
            dataset, dataset_tags, dataset_args, dataset_split, benchmark_task, dataset_test_split, dataset_subset
        ),
        base_model=finetuned_from,
        task=tasks,
        plots=plots,
    )
    if adapter is not None:
        environment = {**content.environment, "peft": sys.modules["peft"].__version__}
        is_classifier = content.model_class.endswith("Classification")
        num_labels = transformers_model(trainer.model).config.num_labels if is_classifier else None
        content = replace(content, adapter=adapter.peft_type.value, num_labels=num_labels, environment=environment)
    if is_trained:
        config = transformers_model(trainer.model).config
        origin = _describe_origin(content.base_model, config, True, adapter is not None)
        methods = (*content.methods, *getattr(trainer, "method_cards", ()))
        content = replace(content, origin=origin, methods=methods, training=describe_training(trainer))
    return replace(
        content,
        repo_id=named if named and "/" in named else None,
        base_model=content.base_model if is_trained else None,
        language=language,
        license=license,
        tags=(tags,) if isinstance(tags, str) else tuple(tags or ()),
    )


def describe_model(
    model: nn.Module,
    folder: Path,
    metrics: Mapping[str, Any],
    *,
    name: str,
    processor: Any = None,
    data: Data | None = None,
    base_model: str | None = None,
    task: str | None = None,
    plots: Iterable[str | Path] = (),
) -> CardContent:
    """What the card of a model says that is as it was loaded.

    Args:
        model (`torch.nn.Module`): a Transformers model, or a wrapper around one.
        folder (`Path`): where the card will be.
        metrics (`Mapping[str, Any]`): see [`CardContent`].
        name (`str`): its name.
        processor (*optional*): its tokenizer or processor.
        data ([`Data`], *optional*): what it was evaluated on.
        base_model, task (`str`, *optional*): see [`describe_run`].
        plots (*optional*): paths of the pictures to show, all of them in `folder`.

    Raises:
        ValueError: if a plot lies outside of `folder`.
    """
    base = transformers_model(model)
    base_model = base_model or _hub_id(base.config)
    return CardContent(
        name=name,
        model_class=type(base).__name__,
        origin=_describe_origin(base_model, base.config, False, False),
        methods=tuple(cards_of(base)),
        needs_plugin=any(row.reweighting for row in report(base).rows),
        base_model=base_model,
        processor=next((name for cls, name in AUTO_CLASSES.items() if isinstance(processor, cls)), None),
        task=task or _task_of(base),
        data=data or Data(),
        metrics=metrics,
        plots=tuple(_path_from(folder, plot) for plot in plots),
        environment={
            "Python": platform.python_version(),
            **{name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules},
            "Device": base.device.type,
        },
    )


def _hub_id(config: PreTrainedConfig) -> str | None:
    """The id on the Hub that a model was loaded by. A name alone does not tell, since a folder may have been moved
    away; the cache of what was downloaded does."""
    name = config._name_or_path
    if not name or os.path.exists(name) or name.count("/") > 1:
        return None
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    return name if any(folder.glob("snapshots/*/config.json")) else None  # Of any revision.


def _describe_origin(base_model: str | None, config: PreTrainedConfig, is_trained: bool, is_adapter: bool) -> str:
    if base_model:
        begun = f"[{base_model}](https://huggingface.co/{base_model})"
    elif config._name_or_path:
        # A path says more about its machine than anybody should read.
        begun = f"a local checkpoint, `{Path(config._name_or_path).name}`"
    else:
        return "trained from scratch" if is_trained else "not trained"
    if not is_trained:
        return f"with the weights of {begun}"
    return f"trained as an adapter of {begun}" if is_adapter else f"fine-tuned from {begun}"


def _task_of(model: PreTrainedModel) -> str | None:
    name = type(model).__name__
    tasks = (task for task, classes in TASK_MAPPING.items() for names in classes.values() if name in _as_tuple(names))
    return next(tasks, None)


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def count_samples(rows: Any) -> int | None:
    """The number of samples of a data set; `None` if it is a mapping or the name of one, or has no length."""
    return len(rows) if hasattr(rows, "__len__") and not isinstance(rows, Mapping | str) else None


def _measured_by(trainer: Trainer) -> Mapping[str, Any]:
    evaluated = getattr(trainer, "evaluated_samples", count_samples(trainer.eval_dataset))
    samples = {"train_samples": count_samples(trainer.train_dataset), "eval_samples": evaluated}
    known = {name: count for name, count in samples.items() if count is not None}
    return known | _last_evaluation(trainer.state, trainer.args.load_best_model_at_end)


def _last_evaluation(state: TrainerState, is_best_loaded: bool) -> dict[str, Any]:
    """The last logged evaluation of the weights that the Trainer ended with, on each of several data sets. One of
    earlier weights does not count."""
    history = state.log_history
    end = next((position for position, entry in enumerate(history) if "train_runtime" in entry), len(history))
    step = state.best_global_step if is_best_loaded and state.best_global_step else state.global_step
    evaluation: dict[str, Any] = {}
    for position, entry in enumerate(history):
        if any(name.startswith("eval_") for name in entry) and (position > end or entry.get("step") == step):
            evaluation |= entry
    return evaluation


def _path_from(folder: Path, plot: str | Path) -> str:
    """A path that is relative to the folder of the card, or to the working directory, as the card writes it."""
    path = Path(plot) if Path(plot).is_file() and not (folder / plot).is_file() else folder / plot
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"Expected plots in the folder of the card, {folder}, got {str(plot)!r}: the card is published with that "
            "folder, and would show nothing. Save the plot there."
        )
    return path.resolve().relative_to(folder.resolve()).as_posix()
