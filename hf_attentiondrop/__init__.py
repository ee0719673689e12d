"""AttentionDrop and learned reweighting of attention for Hugging Face Transformers, as attention implementations.

Importing the package registers `"attentiondrop"`, `"affine_scaled"`, `"attention_sink"` and `"gated_attention"`.
"""

from .version import __version__, require_minimum_versions


require_minimum_versions()

from .configuration import AttentionDropConfig  # noqa: E402
from .registration import configure, register  # noqa: E402
from .report import Report, report  # noqa: E402
from .reweighting_configuration import (  # noqa: E402
    AffineScaledConfig,
    AttentionSinkConfig,
    GatedAttentionConfig,
)


register()

__all__ = [
    "AffineScaledConfig",
    "AttentionDropConfig",
    "AttentionSinkConfig",
    "GatedAttentionConfig",
    "Report",
    "__version__",
    "configure",
    "report",
]
