"""What a model card says, before it is written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..methods.card import MethodCard


@dataclass(frozen=True)
class Data:
    """The data that a model was trained and evaluated on, as far as it is known.

    Args:
        name (`str`, *optional*): in words.
        repo_id (`str`, *optional*): id of the data set on the Hub.
        config (`str`, *optional*): its configuration.
        split (`str`, *optional*): the split that was evaluated on.
        benchmark_task (`str`, *optional*):
            The task that was evaluated, if the data set is a benchmark on the Hub; its `eval.yaml` names them.
        subset (`int`, *optional*): the size of the random subset of the split that was evaluated, if not all of it.
    """

    name: str | None = None
    repo_id: str | None = None
    config: str | None = None
    split: str | None = None
    benchmark_task: str | None = None
    subset: int | None = None


@dataclass(frozen=True)
class CardContent:
    """What a card says. Whatever is `None` or empty is unknown, and the card leaves it out.

    Args:
        name (`str`): name of the model.
        model_class (`str`): its class in Transformers.
        origin (`str`): where its weights began, as in "trained from scratch".
        methods (`tuple[MethodCard, ...]`): what was done to its attention and its loss.
        needs_plugin (`bool`): whether it has learned attention weights, without which it does not load.
        repo_id (`str`, *optional*): the repository, or path, that it is loaded from; by default the card's own folder.
        base_model (`str`, *optional*): id on the Hub of the model that it began as.
        adapter (`str`, *optional*): the kind of PEFT adapter that it is, as in "LORA".
        processor (`str`, *optional*): the Auto class of its tokenizer or processor.
        task (`str`, *optional*): the Hub's name of its task, as in "text-classification".
        language, license (`str`, *optional*), tags (`tuple[str, ...]`): metadata as the Hub knows it.
        data ([`Data`]): what it was trained and evaluated on.
        metrics (`Mapping[str, Any]`):
            Figures with the names that a Trainer gives them, and beside them `calibration` and `robustness`.
        plots (`tuple[str, ...]`): pictures, by their paths relative to the card.
        training, environment (`Mapping[str, str]`): settings and versions, in words.
    """

    name: str
    model_class: str
    origin: str
    methods: tuple[MethodCard, ...] = ()
    needs_plugin: bool = False
    repo_id: str | None = None
    base_model: str | None = None
    adapter: str | None = None
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
