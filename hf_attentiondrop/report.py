"""A table of what happens to every attention module of a model: AttentionDrop in training, and learned reweighting."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .configure import transformers_models
from .integration.functions import runs_attention_drop
from .methods.sites import SDPA, attention_dropout, attention_modules


@dataclass(frozen=True)
class ReportRow:
    """One attention module.

    Args:
        name: its name in the model.
        kind: `"encoder_self"`, `"decoder_self"` or `"cross"`.
        layer: its layer within its stack.
        implementation: the attention implementation it runs, and the base attention below if that is not SDPA.
        applied: what happens to it in training, in words; empty for nothing.
        scheduled: the `p` or `sigma_max` that a schedule set it to; `None` for the configured one.
        calls: how many of its attention calls were perturbed so far; most modules make one per forward pass.
        reweighting: what learned weights are attached to it, in words; empty for none.
        needs_score_matrix: whether attention dropout, which FlexAttention has not, makes it hold all scores on CUDA.
    """

    name: str
    kind: str
    layer: int
    implementation: str
    applied: str
    calls: int
    reweighting: str = ""
    needs_score_matrix: bool = False
    scheduled: float | None = None


@dataclass(frozen=True)
class Report:
    """The attention modules of a model; printed, a table."""

    model: str
    rows: tuple[ReportRow, ...]

    @property
    def active(self) -> tuple[ReportRow, ...]:
        """The rows of the modules that are perturbed in training."""
        return tuple(row for row in self.rows if row.applied)

    def __str__(self) -> str:
        table = [("module", "kind", "layer", "implementation", "in training", "calls", "reweighting")]
        for row in self.rows:
            place = (row.name, row.kind, str(row.layer), row.implementation)
            applied = row.applied or "-"
            if row.scheduled is not None:
                applied += f" (now {row.scheduled:.4g})"
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
                f"attention dropout in {dropped} of them: on CUDA these hold all scores at any length, since "
                "FlexAttention has no dropout"
            )
        return "\n".join([summary, *(line.rstrip() for line in lines)])


def report(model: Any) -> Report:
    """Says of every attention module what AttentionDrop does to it in training, and how often it did.

    Args:
        model: a Transformers model, or a wrapper around one.

    Returns:
        A [`Report`]: print it, or read its `rows`. `calls` counts attention calls; those that activation checkpointing
        repeats in the backward pass count once.

    Raises:
        TypeError: if there is no Transformers model in `model`.

    Example:

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64)
    >>> print(report(BertModel._from_config(config, attn_implementation="attentiondrop")))
    BertModel: 1 of 1 attention modules are perturbed in training
    module                          kind          layer  implementation  in training               calls
    ------------------------------  ------------  -----  --------------  ------------------------  -----
    encoder.layer.0.attention.self  encoder_self  0      attentiondrop   hard p=0.1 k=5 fill=mask  0
    attention dropout in 1 of them: on CUDA these hold all scores at any length, since FlexAttention has no dropout
    """
    bases = transformers_models(model)
    if len(bases) == 1:
        (base,) = bases.values()
        return Report(type(base).__name__, tuple(_rows(base)))
    rows = [row for name, base in bases.items() for row in _rows(base, f"{name}.")]
    return Report(type(model).__name__, tuple(rows))


def _rows(model: PreTrainedModel, prefix: str = "") -> Iterator[ReportRow]:
    for name, module in attention_modules(model):
        site = getattr(module, "attention_drop_site", None)
        implementation = module.config._attn_implementation
        if site is None:
            yield ReportRow(prefix + name, "-", -1, implementation, "", 0)
            continue
        reweighting = getattr(module, "reweighting", None)
        drop = site.perturbation if runs_attention_drop(module) else None
        yield ReportRow(
            prefix + name,
            site.kind,
            site.layer,
            implementation if site.base == SDPA else f"{implementation} on {site.base}",
            applied="" if drop is None else drop.summary,
            calls=int(site.calls),
            reweighting="" if reweighting is None else reweighting.summary,
            needs_score_matrix=drop is not None and drop.variant == "hard" and attention_dropout(module) > 0,
            scheduled=None if drop is None else site.scheduled,
        )
