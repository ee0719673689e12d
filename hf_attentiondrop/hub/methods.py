"""The methods on a model card: those that act on the attention of a model, and how its training varied them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ..attention.modules import attention_modules
from ..methods.card import MethodCard
from ..methods.method import ADAPTIVE_KEY, SCHEDULE_KEY
from ..report import report


# Entries of the config that describe how a training varied the values of perturbations.
RECORDS = {SCHEDULE_KEY: "schedule", ADAPTIVE_KEY: "adaptive strength"}


def cards_of(model: PreTrainedModel) -> Iterator[MethodCard]:
    """Yields the cards of the methods that act on the attention, each once for all modules.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, before or after training.
    """
    rows = {row.name: row for row in report(model).rows}
    modules = [(rows[name], module) for name, module in attention_modules(model) if name in rows]
    states = [module.attention_drop_state for row, module in modules if row.calls or row.applied]
    # The implementation may have been switched on, or off, after the training, and the configuration replaced.
    applied = dict.fromkeys(perturbation for state in states for perturbation in state.applied)
    configured = dict.fromkeys(perturbation for state in states for perturbation, _ in state.active)
    records = {name: getattr(model.config, key, None) for key, name in RECORDS.items()}
    for perturbation in applied | configured:
        for card in perturbation.cards():
            if perturbation not in applied:
                card = _as_configured(card)
            yield _as_scheduled(card, perturbation.scheduled, records) if perturbation in configured else card
    for method in dict.fromkeys(module.reweighting.config for row, module in modules if row.reweighting):
        yield from method.cards()


def _as_configured(card: MethodCard) -> MethodCard:
    """Returns the card of a method that the config names, whether or not the model was trained with it."""
    text = "The model's config names this method; whether its weights were trained with it is not recorded. "
    return replace(card, name=f"{card.name} (configured)", text=text + card.text, tag=None)


def _as_scheduled(card: MethodCard, scheduled: str, records: Mapping[str, Mapping[str, Any] | None]) -> MethodCard:
    """Returns the card of a method with what the config says about how the training varied its values."""
    found = {name: record for name, record in records.items() if record}
    if not found:
        return card
    text = f"{card.text} The training varied `{scheduled}`, up to the value below: {' and '.join(found)}."
    shown = {name: ", ".join(f"{key} {value}" for key, value in record.items()) for name, record in found.items()}
    return replace(card, text=text, settings={**card.settings, **shown})
