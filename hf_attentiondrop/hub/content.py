"""The content of a model card, before it is rendered."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..methods.card import MethodCard


@dataclass(frozen=True)
class Data:
    """The data that a model was trained and evaluated on; unknown fields are `None`.

    Args:
        name (`str`, *optional*): in words.
        repo_id (`str`, *optional*): id of the data set on the Hub.
        config (`str`, *optional*): its configuration.
        split (`str`, *optional*): the evaluation split.
        benchmark_task (`str`, *optional*):
            The evaluated task, if the data set is a benchmark on the Hub; its `eval.yaml` lists the tasks.
        test_split (`str`, *optional*): the split of the final test.
        subset (`int`, *optional*): the size of the random subset of the split that was evaluated, if not all of it.
    """

    name: str | None = None
    repo_id: str | None = None
    config: str | None = None
    split: str | None = None
    benchmark_task: str | None = None
    test_split: str | None = None
    subset: int | None = None


@dataclass(frozen=True)
class CardContent:
    """The content of a card. The card leaves out fields that are `None` or empty.

    Args:
        name (`str`): name of the model.
        model_class (`str`): its class in Transformers.
        origin (`str`): the origin of its weights, such as "trained from scratch".
        methods (`tuple[MethodCard, ...]`): the methods applied to its attention and its loss.
        needs_plugin (`bool`): whether it has learned attention parameters, which need this package to load.
        repo_id (`str`, *optional*): the repository or path to load it from; by default the folder of the card.
        base_model (`str`, *optional*): id on the Hub of the base model.
        adapter (`str`, *optional*): the kind of PEFT adapter, such as "LORA".
        num_labels (`int`, *optional*): the number of classes of an adapted classifier, whose base may have another.
        processor (`str`, *optional*): the Auto class of its tokenizer or processor.
        task (`str`, *optional*): its task on the Hub, such as "text-classification".
        language, license (`str`, *optional*), tags (`tuple[str, ...]`): metadata in the format of the Hub.
        data ([`Data`]): training and evaluation data.
        metrics (`Mapping[str, Any]`):
            Metrics with the names of a Trainer, those of a final test with the prefix `test_`, and the nested
            `calibration`, `robustness` and `attention`. For training labels that were replaced at random,
            `label_noise`, the probability, and `changed_labels`, their number.
        plots (`tuple[str, ...]`): images, as paths relative to the card.
        training, environment (`Mapping[str, str]`): settings and versions.
    """

    name: str
    model_class: str
    origin: str
    methods: tuple[MethodCard, ...] = ()
    needs_plugin: bool = False
    repo_id: str | None = None
    base_model: str | None = None
    adapter: str | None = None
    num_labels: int | None = None
    processor: str | None = None
    task: str | None = None
    language: str | list[str] | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    data: Data = Data()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    plots: tuple[str, ...] = ()
    training: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
