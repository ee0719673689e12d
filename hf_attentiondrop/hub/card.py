"""Rendering and validation of the model card, and the structured evaluation results in it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import validate_repo_id, yaml_dump

from .content import CardContent, Data
from .loading import loading_code, loading_text
from .tables import (
    HUB_METRICS,
    Table,
    attention_table,
    calibration_table,
    evaluation_metrics,
    final_test_table,
    number,
    results_table,
    robustness_table,
    title_of,
)


TEMPLATE = Path(__file__).with_name("model_card.md")
CARD_FILE = "README.md"
# Reports write their metrics to this file. Cards never read it: another run may have left it there.
METRICS_FILE = "metrics.json"
EVAL_RESULTS_FOLDER = ".eval_results"
NORM_TITLES = {"linf": "L∞", "l2": "L2"}


def build_card(content: CardContent) -> ModelCard:
    """Renders the card in Markdown.

    Example:

    >>> card = build_card(CardContent("digits", "ViTForImageClassification", "trained from scratch"))
    >>> print(card.data.to_yaml())
    library_name: transformers
    tags:
    - hf-attentiondrop
    >>> "## Method" in card.text  # no method was used
    False
    """
    robustness = content.metrics.get("robustness") or {}
    attention = content.metrics.get("attention") or {}
    return ModelCard.from_template(
        _metadata(content),
        template_path=str(TEMPLATE),
        content=content,
        loading_text=loading_text(content),
        loading_code=loading_code(content),
        method_tables=[_table(("Setting", "Value"), method.settings, quote=True) for method in content.methods],
        data_text=_describe_data(content.data),
        samples=_table(
            ("Part", "Samples"), {name: content.metrics.get(f"{key}_samples") for key, name in _PARTS.items()}
        ),
        tested=final_test_table(content.metrics),
        results=results_table(content.metrics),
        calibration=calibration_table(content.metrics),
        robustness=robustness_table(content.metrics),
        attention=attention_table(content.metrics),
        norm=NORM_TITLES.get(robustness.get("norm", ""), robustness.get("norm")),
        attacked=robustness.get("samples"),
        attended=max((means.get("samples", 0) for means in attention.values()), default=0),
        space=robustness.get("space"),
        deviation=number(robustness["embedding_deviation"]) if "embedding_deviation" in robustness else None,
        plots=[(Path(plot).stem.replace("_", " ").capitalize(), quote(plot)) for plot in content.plots],
        training=_table(("Argument", "Value"), content.training),
        environment=_table(("Software", "Version"), content.environment),
        papers=list(dict.fromkeys(method.citation for method in content.methods)),
    )


def write_card(content: CardContent, folder: str | Path) -> Path:
    """Writes README.md, and the entry of a benchmark's leaderboard below `.eval_results`.

    Args:
        content ([`CardContent`]): of the card.
        folder (`str` or `Path`): to write to; it contains the plots.

    Returns:
        `Path`: the card.

    Raises:
        ValueError: if a plot does not exist, or an id cannot be one on the Hub.
    """
    folder = Path(folder)
    card = build_card(content)
    check_card(card, folder)
    folder.mkdir(parents=True, exist_ok=True)
    card.save(folder / CARD_FILE)
    if entry := _benchmark_entry(content):
        path = folder / EVAL_RESULTS_FOLDER / f"{entry.dataset_id.split('/')[-1]}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")
    return folder / CARD_FILE


def check_card(card: ModelCard, folder: Path) -> None:
    """Checks the plots and ids of a card; the Hub validates the rest on upload.

    Raises:
        ValueError: if a plot does not exist in `folder`, or an id cannot be one on the Hub.
    """
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.text):
        if not (folder / unquote(picture)).is_file():
            raise ValueError(
                f"The card shows {picture!r}, and there is no such file in {folder}. Save the plot there, or leave it "
                "out of `plots`."
            )
    ids = {"base_model": card.data.base_model, "datasets": card.data.datasets}
    for name, value in ids.items():
        for repo_id in [value] if isinstance(value, str) else value or []:
            # Raises a ValueError that says what an id looks like.
            try:
                validate_repo_id(repo_id)
            except ValueError as error:
                raise ValueError(
                    f"`{name}` of a card must be an id on the Hub, got {repo_id!r}: {error} If there is none, leave "
                    "it out and describe it in words."
                ) from error


_PARTS = {"train": "Training", "eval": "Evaluation", "test": "Test"}


def _metadata(content: CardContent) -> ModelCardData:
    metrics = evaluation_metrics(content.metrics)
    hub_metrics = dict.fromkeys(HUB_METRICS[name] for name in metrics if name in HUB_METRICS)
    results = _eval_results(content, metrics)
    adapter = [content.adapter.lower()] if content.adapter else []
    tags = ["hf-attentiondrop", *(method.tag for method in content.methods if method.tag), *adapter, *content.tags]
    return ModelCardData(
        language=content.language,
        license=content.license,
        library_name="peft" if content.adapter else "transformers",
        pipeline_tag=content.task,
        tags=list(dict.fromkeys(tags)),
        base_model=content.base_model,
        datasets=[content.data.repo_id] if content.data.repo_id else None,
        metrics=list(hub_metrics) or None,
        model_name=content.name if results else None,
        eval_results=results or None,
    )


def _eval_results(content: CardContent, metrics: Mapping[str, float]) -> list[EvalResult]:
    """The model-index: metrics that the Hub knows, on a data set of the Hub."""
    data = content.data
    if not (content.task and data.repo_id):
        return []
    return [
        EvalResult(
            task_type=content.task,
            dataset_type=data.repo_id,
            dataset_name=data.name or data.repo_id,
            dataset_config=data.config,
            dataset_split=data.split,
            dataset_args={"random_subset": data.subset} if data.subset else None,
            metric_type=HUB_METRICS[name],
            metric_name=title_of(name),
            metric_value=value,
        )
        for name, value in metrics.items()
        if name in HUB_METRICS
    ]


def _benchmark_entry(content: CardContent) -> EvalResultEntry | None:
    """The first metric that the Hub knows, as an entry for the benchmark of the data set, which is all of a split."""
    data, metrics = content.data, evaluation_metrics(content.metrics)
    name = next((name for name in HUB_METRICS if name in metrics), None)
    if data.subset or not (data.repo_id and data.benchmark_task and name):
        return None
    notes = ", ".join(filter(None, (title_of(name), data.split and f"split {data.split}")))
    return EvalResultEntry(data.repo_id, data.benchmark_task, metrics[name], notes=notes)


def _describe_data(data: Data) -> str:
    if not (data.repo_id or data.name):
        return ""
    name = _cell(data.name or data.repo_id)
    name = f"[{name}](https://huggingface.co/datasets/{data.repo_id})" if data.repo_id else name
    described = [
        name,
        data.config and f"configuration `{data.config}`",
        data.split and f"evaluated on the split `{data.split}`",
        f"a random subset of {data.subset} samples" if data.subset else None,
        data.test_split and f"tested on the split `{data.test_split}`",
    ]
    return ", ".join(filter(None, described))


def _table(header: tuple[str, str], values: Mapping[str, Any], quote: bool = False) -> Table:
    rows = [(f"`{name}`" if quote else name, _cell(value)) for name, value in values.items() if value is not None]
    return [header, *rows] if rows else []


def _cell(value: Any) -> str:
    """Text without line breaks and column separators, for a table cell."""
    text = ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
