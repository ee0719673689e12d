"""AttentionDrop and learned reweighting of attention for Hugging Face Transformers, as attention implementations.

Importing the package registers `"attentiondrop"`, `"affine_scaled"`, `"attention_sink"` and `"gated_attention"`.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from .version import __version__, require_minimum_versions


require_minimum_versions()

from .configuration import AttentionDropConfig  # noqa: E402
from .registration import register  # noqa: E402
from .report import Report, report  # noqa: E402
from .reweighting_configuration import (  # noqa: E402
    AffineScaledConfig,
    AttentionSinkConfig,
    GatedAttentionConfig,
)
from .settings import configure, set_base_attention, set_scheduled_value  # noqa: E402


if TYPE_CHECKING:
    from .losses import consistency_loss
    from .trainer import AttentionDropSeq2SeqTrainer, AttentionDropTrainer, ConsistencyTrainerMixin
    from .training_args import (
        AttentionDropSeq2SeqTrainingArguments,
        AttentionDropTrainingArguments,
        ConsistencyArguments,
    )

register()

# Loaded when first asked for: a training loop of one's own does not need the Trainer and what it imports.
_LAZY = {
    "AttentionDropSeq2SeqTrainer": "trainer",
    "AttentionDropSeq2SeqTrainingArguments": "training_args",
    "AttentionDropTrainer": "trainer",
    "AttentionDropTrainingArguments": "training_args",
    "ConsistencyArguments": "training_args",
    "ConsistencyTrainerMixin": "trainer",
    "consistency_loss": "losses",
}

__all__ = [
    "AffineScaledConfig",
    "AttentionDropConfig",
    "AttentionDropSeq2SeqTrainer",
    "AttentionDropSeq2SeqTrainingArguments",
    "AttentionDropTrainer",
    "AttentionDropTrainingArguments",
    "AttentionSinkConfig",
    "ConsistencyArguments",
    "ConsistencyTrainerMixin",
    "GatedAttentionConfig",
    "Report",
    "__version__",
    "configure",
    "consistency_loss",
    "report",
    "set_base_attention",
    "set_scheduled_value",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _LAZY[name] in ("trainer", "training_args") and importlib.util.find_spec("accelerate") is None:
        raise ImportError(
            f"{name} builds on Transformers' Trainer, which needs accelerate. Install it with: pip install accelerate"
        )
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    # For tab completion: what is loaded later belongs to it, and what was imported for use in here does not.
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
