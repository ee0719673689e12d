"""The items of a task loss, and the divergence of two passes over them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .label_shift import shifts_labels
from .losses import consistency_loss


IGNORE_INDEX = -100
# Prompt learning that works on the key-value cache: the logits get no positions for virtual tokens.
CACHE_PROMPTS = frozenset({"PREFIX_TUNING", "CARTRIDGE"})


@dataclass(frozen=True)
class LabelAlignment:
    """Which label the logits of a position predict.

    Args:
        shifts_labels: whether a position predicts the label of the next one, as in causal language models; `None` if
            that is unknown.
        virtual_tokens: how many positions prompt tuning puts before the first label.
        model_class: the name of the model class, for messages.
    """

    shifts_labels: bool | None = False
    virtual_tokens: int = 0
    model_class: str = field(default="The model", compare=False)

    @classmethod
    def of_model(cls, model: nn.Module, smooths_labels: bool = False) -> "LabelAlignment":
        """The alignment of the task loss of a model, a PEFT model included.

        Args:
            model: the model, without the wrappers of a launcher.
            smooths_labels: whether the Trainer takes the labels away from the model, for label smoothing.

        Raises:
            ValueError: for context-aware prompt tuning, which puts labelled items of its own into the prompt.
        """
        prompt = getattr(model, "active_peft_config", None)
        virtual_tokens = 0
        if prompt is not None and prompt.is_prompt_learning:
            if prompt.peft_type == "CPT":
                raise ValueError(
                    "The consistency term does not know PEFT's CPT: it puts labelled examples into the prompt and "
                    "weighs their losses, so the items of the two terms would differ. Use prompt tuning, p-tuning, "
                    "prefix tuning or LoRA, or set `consistency_weight=0`."
                )
            virtual_tokens = 0 if prompt.peft_type in CACHE_PROMPTS else prompt.num_virtual_tokens
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        name = type(core).__name__
        if _has_fused_head(core):
            shift = True
        elif smooths_labels:
            # The Trainer computes the loss then, and goes by the name.
            shift = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        else:
            shift = shifts_labels(core)
        return cls(shift, virtual_tokens, name)

    def count_items(self, inputs: Mapping[str, Any], batch_size: int) -> Tensor:
        """How many items the task loss of a batch is a mean over.

        Returns:
            `torch.Tensor`: a scalar, of labels other than -100, or of rows where labels are not integers. For
            extractive question answering `(2,)`, the starts and the ends that lie within the text: the task loss is
            the mean of their two means.

        Raises:
            ValueError: if it is unknown whether the model shifts its labels.
        """
        if _asks_for_answers(inputs):
            return self.answers(inputs).sum(dim=-1)
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return torch.tensor(batch_size)
        has_positions = labels.dim() > 1 and labels.shape[-1] > 1
        if has_positions and "shift_labels" not in inputs and self.virtual_tokens == 0 and self._shifts():
            labels = labels[..., 1:]
        return labels.ne(IGNORE_INDEX).sum()

    def answers(self, inputs: Mapping[str, Any]) -> Tensor:
        """Which rows have a start, and which an end, within the text, `(2, B)`: question answering heads ignore
        positions beyond its end."""
        length = self.length(inputs)
        return torch.stack([inputs[name].reshape(-1) < length for name in ("start_positions", "end_positions")])

    def length(self, inputs: Mapping[str, Any]) -> int:
        """How many positions the logits of a text have."""
        text = next(inputs[name] for name in ("input_ids", "inputs_embeds") if isinstance(inputs.get(name), Tensor))
        return self.virtual_tokens + text.shape[1]

    def targets(self, inputs: Mapping[str, Any], length: int) -> Tensor:
        """The label that each of `length` positions of the logits predicts, `(B, length)`, -100 for none.

        Raises:
            ValueError: if the labels are of another length, or if it is unknown whether the model shifts them.
        """
        is_shifted = "shift_labels" in inputs
        labels = inputs["shift_labels" if is_shifted else "labels"]
        prefix = length - labels.shape[1]
        if prefix not in (0, self.virtual_tokens):
            raise ValueError(
                f"Expected labels of {length} positions, as the logits have, got shape {tuple(labels.shape)}: it "
                "cannot be told which logits the task loss looks at, and the consistency term is a mean over the same "
                "items. Set `consistency_weight=0` for this task."
            )
        labels = nn.functional.pad(labels, (prefix, 0), value=IGNORE_INDEX)
        if not is_shifted and self._shifts():
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        return labels

    def _shifts(self) -> bool:
        if self.shifts_labels is None:
            raise ValueError(
                f"It cannot be told from the source of {self.model_class} whether its loss compares the logits of a "
                "position with the label of that position or of the next one: the consistency term, a mean over the "
                "items of the task loss, could look at other items. Let its forward compute the loss with "
                "`self.loss_function(...)` or `cross_entropy`, or set `consistency_weight=0`."
            )
        return self.shifts_labels


def _has_fused_head(model: nn.Module) -> bool:
    """Whether TRL has replaced the forward of a model by one that answers `fused_lm_head=True`, with the
    log-probability of the next token whatever the model's own loss does."""
    forward = vars(model).get("forward")
    return any("fused_lm_head" in function.__code__.co_varnames for function in _wrapped_functions(forward))


def _wrapped_functions(function: Any) -> Iterator[Any]:
    while function is not None:
        if hasattr(function, "__code__"):
            yield function
        function = getattr(function, "__wrapped__", None)


def _asks_for_answers(inputs: Mapping[str, Any]) -> bool:
    return isinstance(inputs.get("start_positions"), Tensor) and isinstance(inputs.get("end_positions"), Tensor)


def output_divergence(
    outputs: Any,
    inputs: Mapping[str, Any],
    alignment: LabelAlignment,
    problem_type: str | None = None,
    divergence: str = "symmetric_kl",
) -> Tensor:
    """The divergence of the two halves of a model's outputs, over the items of the task loss.

    Args:
        outputs: what the model returned for the doubled batch.
        inputs: the batch before it was doubled, with its labels.
        alignment: which label a position predicts.
        problem_type: as in the model's config; `None` decides by the labels, as Transformers does.
        divergence: see [`consistency_loss`].

    Returns:
        `torch.Tensor`: a scalar; for extractive question answering `(2,)`, of the starts and of the ends.

    Raises:
        ValueError: if there are no logits, or if it cannot be told which of them the task loss looks at.
    """
    outputs = outputs if isinstance(outputs, Mapping) else {}
    if outputs.get("start_logits") is not None and _asks_for_answers(inputs):
        answers, length = alignment.answers(inputs), alignment.length(inputs)
        logits = outputs["start_logits"], outputs["end_logits"]
        if logits[0].shape[1] != length:
            raise ValueError(
                f"Expected answers among {length} positions, as the text has, got logits of shape "
                f"{tuple(logits[0].shape)}: it cannot be told which answers the task loss ignores, and the "
                "consistency term is a mean over the same answers. Set `consistency_weight=0` for this task."
            )
        return torch.stack([consistency_loss(*pair, divergence) for pair in zip(logits, answers, strict=True)])

    logits, labels = outputs.get("logits"), inputs.get("labels")
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"Expected the model to return a tensor `logits` in training, got {sorted(outputs) or 'no mapping'}: "
            "without logits there is nothing to compare. Switch off fused losses that build none (Liger's "
            "`fused_linear_cross_entropy`), leave `return_dict` on, or set `consistency_weight=0`."
        )
    if isinstance(labels, Tensor):
        batch_size = len(logits) // 2
        if logits.dim() == 2 and (labels.is_floating_point() or labels.numel() == batch_size):
            return _divergence_of_rows(logits, labels, problem_type, divergence)
        if logits.dim() == 3 and labels.dim() == 2 and len(labels) == batch_size and not labels.is_floating_point():
            targets = alignment.targets(inputs, logits.shape[1])
            return consistency_loss(logits, targets.ne(IGNORE_INDEX), divergence)
    got = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    raise ValueError(
        "Expected logits of shape (2B, C) with labels (B,), or logits (2B, L, C) with labels (B, L), got logits "
        f"{tuple(logits.shape)} and labels of {got}: it cannot be told which logits the task loss looks at, and the "
        "consistency term is a mean over the same items. Set `consistency_weight=0` for this task."
    )


def _divergence_of_rows(logits: Tensor, labels: Tensor, problem_type: str | None, divergence: str) -> Tensor:
    if problem_type is None and logits.shape[-1] == 1:
        problem_type = "regression"
    elif problem_type is None:
        problem_type = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    is_categorical = problem_type == "single_label_classification"
    weights = labels.reshape(-1).ne(IGNORE_INDEX) if is_categorical else None
    return consistency_loss(logits, weights, divergence, problem_type)


def answer_losses(outputs: Mapping[str, Any], inputs: Mapping[str, Any], alignment: LabelAlignment) -> Tensor:
    """The two means that the loss of question answering is the mean of, over the starts and over the ends, `(2,)`; 0
    for a mean over none.

    Args:
        outputs: what the model returned for the doubled batch.
        inputs: the batch before it was doubled.
        alignment: which positions the logits stand for.
    """
    losses = []
    for name, seen in zip(("start", "end"), alignment.answers(inputs), strict=True):
        logits, seen = outputs[f"{name}_logits"], seen.repeat(2)
        # As the heads do it: what lies before the text counts as its first position.
        targets = inputs[f"{name}_positions"].reshape(-1).repeat(2).clamp(min=0).masked_fill(~seen, IGNORE_INDEX)
        losses.append(nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / seen.sum().clamp(min=1))
    return torch.stack(losses)


def without_value(task_loss: Tensor, outputs: Mapping[str, Any]) -> Tensor:
    """The task loss of a micro-batch that has no item: its value, a mean over none and so NaN, becomes 0.

    The gradients of what else is in it, such as the load balancing loss of experts, stay. Through the logits, which
    nothing is asked of, comes none: a sum that was divided by 0 would send NaN.
    """
    logits = outputs.get("logits")
    if logits is not None and logits.requires_grad:
        logits.register_hook(torch.zeros_like)
    return _WithoutValue.apply(task_loss)


class _WithoutValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return torch.zeros_like(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def has_dropout(model: nn.Module) -> bool:
    """Whether some module drops something of each sample by itself; layer drop hits both passes alike."""
    return any(
        isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in vars(module).items()
        if ("drop" in name and "layerdrop" not in name) or (name == "p" and isinstance(module, _DropoutNd))
    )
