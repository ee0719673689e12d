"""A table of the attention modules of a model and the methods that act on each of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .attention.call import SDPA
from .attention.dropout import attention_dropout
from .attention.modules import attention_modules
from .attention.parts import transformers_models
from .integration.functions import perturbations_of_module
from .methods.profile import Value


@dataclass(frozen=True)
class ReportRow:
    """One attention module of a [`Report`].

    Args:
        name: name of the module in the model.
        kind: `"encoder_self"`, `"decoder_self"` or `"cross"`; `"-"` if the module does not use this package.
        layer: index of its layer within its stack; -1 if the module does not use this package.
        implementation: its attention implementation, with the base attention if that is not SDPA.
        applied: perturbations that act on it in training, joined by " + "; empty for none.
        calls: number of perturbed attention calls so far; most modules make one per forward pass.
        reweighting: learned method attached to it; empty for none.
        needs_score_matrix: True if attention dropout forces a full score matrix on CUDA (FlexAttention has no
            dropout).
        current: current value of each perturbation in `applied`, a tuple for one per head, where a schedule or an
            adaptive strength changes the configured values; otherwise empty.
    """

    name: str
    kind: str
    layer: int
    implementation: str
    applied: str
    calls: int
    reweighting: str = ""
    needs_score_matrix: bool = False
    current: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Report:
    """The attention modules of a model. Printing it shows a table.

    Args:
        model: class of the model.
        rows: one [`ReportRow`] per attention module.
    """

    model: str
    rows: tuple[ReportRow, ...]

    @property
    def active(self) -> tuple[ReportRow, ...]:
        """The rows of the modules that are perturbed in training."""
        return tuple(row for row in self.rows if row.applied)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            ("module", "kind", "layer", "implementation", "in training", "calls", "reweighting")
        ]
        for row in self.rows:
            place = (row.name, row.kind, str(row.layer), row.implementation)
            applied = row.applied or "-"
            if row.current:
                applied += f" (now {', '.join(map(_shown, row.current))})"
            table.append((*place, applied, str(row.calls), row.reweighting or "-"))
        reweighted = sum(bool(row.reweighting) for row in self.rows)
        if not reweighted:
            table = [line[:-1] for line in table]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        lines.insert(1, "  ".join("-" * width for width in widths))
        summary = f"{self.model}: {len(self.active)} of {len(self.rows)} attention modules are perturbed in training"
        summary += f", {reweighted} reweighted" if reweighted else ""
        if dropped := sum(row.needs_score_matrix for row in self.rows):
            lines.append(
                f"on CUDA, the model's attention dropout makes {dropped} of them hold the full score matrix; set it "
                "to 0 to save memory"
            )
        return "\n".join([summary, *(line.rstrip() for line in lines)])


def report(model: Any) -> Report:
    """Lists the attention modules of a model, the methods that act on each, and how often each was perturbed.

    Args:
        model: a Transformers model, or a wrapper around one.

    Returns:
        A [`Report`]: print it, or read its `rows`. Calls that activation checkpointing repeats in the backward pass
        count once.

    Raises:
        TypeError: if `model` contains no Transformers model.

    Example:

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64)
    >>> print(report(BertModel._from_config(config, attn_implementation="attentiondrop")))
    BertModel: 1 of 1 attention modules are perturbed in training
    module                          kind          layer  implementation  in training               calls
    ------------------------------  ------------  -----  --------------  ------------------------  -----
    encoder.layer.0.attention.self  encoder_self  0      attentiondrop   hard p=0.1 k=5 fill=mask  0
    on CUDA, the model's attention dropout makes 1 of them hold the full score matrix; set it to 0 to save memory
    """
    bases = transformers_models(model)
    if len(bases) == 1:
        (base,) = bases.values()
        return Report(type(base).__name__, tuple(_rows(base)))
    rows = [row for name, base in bases.items() for row in _rows(base, f"{name}.")]
    return Report(type(model).__name__, tuple(rows))


def _rows(model: PreTrainedModel, prefix: str = "") -> Iterator[ReportRow]:
    for name, module in attention_modules(model):
        state = getattr(module, "attention_drop_state", None)
        implementation = module.config._attn_implementation
        if state is None:
            yield ReportRow(prefix + name, "-", -1, implementation, "", 0)
            continue
        learned = getattr(module, "reweighting", None)
        perturbations = [perturbation for perturbation, _ in perturbations_of_module(module)]
        dropout = attention_dropout(module)
        yield ReportRow(
            prefix + name,
            state.place.kind,
            state.place.layer,
            implementation if state.base == SDPA else f"{implementation} on {state.base}",
            applied=" + ".join(perturbation.at(state.place).summary for perturbation in perturbations),
            calls=int(state.calls),
            reweighting="" if learned is None else learned.summary,
            needs_score_matrix=any(perturbation.needs_score_matrix(dropout) for perturbation in perturbations),
            current=tuple(state.values) if perturbations and state.is_scaled else (),
        )


def _shown(value: Value) -> str:
    if not isinstance(value, tuple):
        return f"{value:.4g}"
    lowest, highest = f"{min(value):.4g}", f"{max(value):.4g}"
    return lowest if lowest == highest else f"{lowest} to {highest}"
