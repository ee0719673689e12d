"""The alignment of logits and labels, and the number of items of a task loss."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .label_shift import shifts_labels


IGNORE_INDEX = -100
# Prompt learning in the key-value cache: the logits have no positions for the virtual tokens.
CACHE_PROMPTS = frozenset({"PREFIX_TUNING", "CARTRIDGE"})


@dataclass(frozen=True)
class LabelAlignment:
    """Which label the logits at each position predict.

    Args:
        shifts_labels (`bool`, *optional*, defaults to `False`):
            Whether a position predicts the label of the next one, as in causal language models; `None` if unknown.
        virtual_tokens (`int`, defaults to 0): Positions that prompt tuning inserts before the first label.
        model_class (`str`): Name of the model class, for messages.

    Example:

    >>> import torch
    >>> batch = {"labels": torch.tensor([[5, 6, -100]])}
    >>> LabelAlignment(shifts_labels=True).targets(batch, length=3).tolist()
    [[6, -100, -100]]
    >>> LabelAlignment(shifts_labels=True).count_items(batch, batch_size=1).item()
    1
    """

    shifts_labels: bool | None = False
    virtual_tokens: int = 0
    model_class: str = field(default="The model", compare=False)

    @classmethod
    def of_model(cls, model: nn.Module, smooths_labels: bool = False) -> "LabelAlignment":
        """The alignment in the task loss of a model.

        Args:
            model (`torch.nn.Module`): The model, possibly a PEFT model, without the wrappers of a launcher.
            smooths_labels (`bool`, defaults to `False`):
                Whether the Trainer removes the labels from the inputs and computes the loss, for label smoothing.

        Raises:
            ValueError: for context-aware prompt tuning (CPT), which adds labeled items to the prompt.
        """
        prompt = getattr(model, "active_peft_config", None)
        virtual_tokens = 0
        if prompt is not None and prompt.is_prompt_learning:
            if prompt.peft_type == "CPT":
                raise ValueError(
                    "The consistency term does not support PEFT's CPT: CPT adds labeled examples to the prompt and "
                    "weights their losses, so the two terms would average over different items. Use prompt tuning, "
                    "p-tuning, prefix tuning or LoRA, or set `consistency_weight=0`."
                )
            virtual_tokens = 0 if prompt.peft_type in CACHE_PROMPTS else prompt.num_virtual_tokens
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        name = type(core).__name__
        shift: bool | None
        if _has_fused_head(core):
            shift = True
        elif smooths_labels:
            # The Trainer then computes the loss and decides by the class name.
            shift = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        else:
            shift = shifts_labels(core)
        return cls(shift, virtual_tokens, name)

    def count_items(self, inputs: Mapping[str, Any], batch_size: int) -> Tensor:
        """The number of items that the task loss of a batch averages over.

        Args:
            inputs (`Mapping[str, Any]`): The batch, with its labels.
            batch_size (`int`): Its number of rows `B`.

        Returns:
            `torch.Tensor`: a scalar, the number of labels other than -100, or `B` if the labels are not integers. For
            extractive question answering `(2,)`, the numbers of start and of end positions within the text: the task
            loss is the mean of their two means.

        Raises:
            ValueError: if the items depend on the shift of the labels and it is unknown.
        """
        if has_answers(inputs):
            return self.answer_mask(inputs).sum(dim=-1)
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return torch.tensor(batch_size)
        has_positions = labels.dim() > 1 and labels.shape[-1] > 1
        if has_positions and "shift_labels" not in inputs and self.virtual_tokens == 0 and self._check_shift():
            labels = labels[..., 1:]
        return labels.ne(IGNORE_INDEX).sum()

    def answer_mask(self, inputs: Mapping[str, Any]) -> Tensor:
        """Which start and which end positions lie within the text, `(2, B)`; question answering heads ignore the
        others."""
        length = self.logits_length(inputs)
        return torch.stack([inputs[name].reshape(-1) < length for name in ("start_positions", "end_positions")])

    def logits_length(self, inputs: Mapping[str, Any]) -> int:
        """The number of positions in the logits for a text."""
        text = next(inputs[name] for name in ("input_ids", "inputs_embeds") if isinstance(inputs.get(name), Tensor))
        return self.virtual_tokens + text.shape[1]

    def targets(self, inputs: Mapping[str, Any], length: int) -> Tensor:
        """The label that each position of the logits predicts, -100 for none.

        Args:
            inputs (`Mapping[str, Any]`): The batch, with `labels` or `shift_labels` of shape `(B, L)`.
            length (`int`): The number of positions in the logits.

        Returns:
            `torch.Tensor`: of shape `(B, length)`.

        Raises:
            ValueError: if the labels have another length, or if the shift of the labels is unknown.
        """
        is_shifted = "shift_labels" in inputs
        labels = inputs["shift_labels" if is_shifted else "labels"]
        prefix = length - labels.shape[1]
        if prefix not in (0, self.virtual_tokens):
            raise ValueError(
                f"Expected labels of {length} positions, like the logits, got shape {tuple(labels.shape)}: the "
                "consistency term must average over the same logits as the task loss, and those are unknown here. Set "
                "`consistency_weight=0` for this task."
            )
        labels = nn.functional.pad(labels, (prefix, 0), value=IGNORE_INDEX)
        if not is_shifted and self._check_shift():
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        return labels

    def _check_shift(self) -> bool:
        if self.shifts_labels is None:
            raise ValueError(
                f"The source of {self.model_class} does not show whether its loss compares the logits of a position "
                "with the label of that position or of the next one: the consistency term could average over other "
                "items than the task loss. Compute the loss in its forward with `self.loss_function(...)` or "
                "`cross_entropy`, or set `consistency_weight=0`."
            )
        return self.shifts_labels


def has_answers(inputs: Mapping[str, Any]) -> bool:
    """True for a batch of extractive question answering."""
    return isinstance(inputs.get("start_positions"), Tensor) and isinstance(inputs.get("end_positions"), Tensor)


def _has_fused_head(model: nn.Module) -> bool:
    """True if TRL replaced the forward of the model by one that accepts `fused_lm_head=True`. That forward returns
    the log-probabilities of the next tokens, independent of the loss of the model."""
    forward = vars(model).get("forward")
    return any("fused_lm_head" in function.__code__.co_varnames for function in _wrapped_functions(forward))


def _wrapped_functions(function: Any) -> Iterator[Any]:
    while function is not None:
        if hasattr(function, "__code__"):
            yield function
        function = getattr(function, "__wrapped__", None)
