"""The items of a task loss, and the divergence of two passes over them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .losses import consistency_loss


IGNORE_INDEX = -100
# Listed among the causal language models, but these compare logits and labels of the same position.
UNSHIFTED_MODELS = frozenset({"XLMWithLMHeadModel", "XLNetLMHeadModel"})
# Prompt learning that works on the key-value cache: the logits get no positions for virtual tokens.
CACHE_PROMPTS = frozenset({"PREFIX_TUNING", "CARTRIDGE"})


@dataclass(frozen=True)
class LabelAlignment:
    """Which label the logits of a position predict.

    Args:
        shifts_labels: whether a position predicts the label of the next one, as in causal language models.
        virtual_tokens: how many positions prompt tuning puts before the first label.
    """

    shifts_labels: bool = False
    virtual_tokens: int = 0

    @classmethod
    def of_model(cls, model: nn.Module, shifts_labels: bool) -> "LabelAlignment":
        """The alignment of a model, a PEFT model included.

        Args:
            model: the model, without the wrappers of a launcher.
            shifts_labels: what the Trainer found by the model's loss type, which some older models lack.

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
        is_causal = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and name not in UNSHIFTED_MODELS
        return cls(shifts_labels or is_causal, virtual_tokens)

    def count_items(self, inputs: Mapping[str, Any], batch_size: int) -> Tensor:
        """How many items the task loss of a batch is a mean over, a scalar: labels other than -100, or rows where
        labels are not integers."""
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return torch.tensor(batch_size)
        if self.shifts_labels and self.virtual_tokens == 0 and "shift_labels" not in inputs:
            labels = labels[..., 1:]
        return labels.ne(IGNORE_INDEX).sum()

    def targets(self, inputs: Mapping[str, Any], length: int) -> Tensor:
        """The label that each of `length` positions of the logits predicts, `(B, length)`, -100 for none.

        Raises:
            ValueError: if the labels are of another length.
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
        if self.shifts_labels and not is_shifted:
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        return labels


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
        `torch.Tensor`: a scalar.

    Raises:
        ValueError: if there are no logits, or if it cannot be told which of them the task loss looks at.
    """
    outputs = outputs if isinstance(outputs, Mapping) else {}
    if outputs.get("start_logits") is not None and "start_positions" in inputs:
        logits = torch.stack((outputs["start_logits"], outputs["end_logits"]), dim=1)  # (2B, 2, L)
        positions = torch.stack((inputs["start_positions"], inputs["end_positions"]), dim=1)
        # The question answering heads ignore answers that lie beyond the end of the text.
        return consistency_loss(logits, positions.view(-1, 2) < logits.shape[-1], divergence)

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


def has_dropout(model: nn.Module) -> bool:
    """Whether some module drops something of each sample by itself; layer drop hits both passes alike."""
    return any(
        isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in vars(module).items()
        if ("drop" in name and "layerdrop" not in name) or (name == "p" and isinstance(module, _DropoutNd))
    )
