"""AttentionDrop and learned reweighting of attention for Hugging Face Transformers.

Importing the package registers the attention implementations `"attentiondrop"`, `"affine_scaled"`, `"attention_sink"`
and `"gated_attention"`; see `integration/registration.py` for everything that it changes in Transformers.

Shapes in docstrings: `B` batch size, `H` query heads, `Hkv` key and value heads, `Q` queries, `K` keys, `D` head
dimension; `B|1` is either `B` or 1.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from .version import __version__, check_minimum_versions


check_minimum_versions()

from .configure import configure, scale_attention_drop, set_base_attention  # noqa: E402
from .integration.registration import register  # noqa: E402
from .methods import (  # noqa: E402
    AffineScaledConfig,
    AttentionSinkConfig,
    BlurredSmoothing,
    DropHead,
    DropKey,
    GatedAttentionConfig,
    HardMasking,
)
from .methods.parsing import AttentionDropConfig  # noqa: E402
from .report import Report, report  # noqa: E402
from .training.dropconnect import apply_dropconnect, dropconnect_of  # noqa: E402


if TYPE_CHECKING:
    from .training.adaptive import AdaptiveStrengthCallback
    from .training.arguments import (
        AttentionDropSeq2SeqTrainingArguments,
        AttentionDropTrainingArguments,
        ConsistencyArguments,
    )
    from .training.losses import consistency_loss
    from .training.schedule import AttentionDropSchedule, ScheduleArguments
    from .training.schedule_callback import AttentionDropScheduleCallback
    from .training.trainer import AttentionDropSeq2SeqTrainer, AttentionDropTrainer, ConsistencyTrainerMixin

register()

# Imported on first access, because a custom training loop does not need the Trainer and its dependencies.
_LAZY = {
    "AdaptiveStrengthCallback": "training.adaptive",
    "AttentionDropSchedule": "training.schedule",
    "AttentionDropScheduleCallback": "training.schedule_callback",
    "AttentionDropSeq2SeqTrainer": "training.trainer",
    "AttentionDropSeq2SeqTrainingArguments": "training.arguments",
    "AttentionDropTrainer": "training.trainer",
    "AttentionDropTrainingArguments": "training.arguments",
    "ConsistencyArguments": "training.arguments",
    "ConsistencyTrainerMixin": "training.trainer",
    "ScheduleArguments": "training.schedule",
    "consistency_loss": "training.losses",
}

__all__ = [
    "AdaptiveStrengthCallback",
    "AffineScaledConfig",
    "AttentionDropConfig",
    "AttentionDropSchedule",
    "AttentionDropScheduleCallback",
    "AttentionDropSeq2SeqTrainer",
    "AttentionDropSeq2SeqTrainingArguments",
    "AttentionDropTrainer",
    "AttentionDropTrainingArguments",
    "AttentionSinkConfig",
    "BlurredSmoothing",
    "ConsistencyArguments",
    "ConsistencyTrainerMixin",
    "DropHead",
    "DropKey",
    "GatedAttentionConfig",
    "HardMasking",
    "Report",
    "ScheduleArguments",
    "__version__",
    "apply_dropconnect",
    "configure",
    "consistency_loss",
    "dropconnect_of",
    "report",
    "scale_attention_drop",
    "set_base_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _LAZY[name] not in ("training.losses", "training.schedule") and importlib.util.find_spec("accelerate") is None:
        raise ImportError(
            f"{name} builds on Transformers' Trainer, which needs accelerate. Install it with: pip install accelerate"
        )
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    # For tab completion: includes lazy names, leaves out helpers imported above.
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
