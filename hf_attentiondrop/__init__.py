"""AttentionDrop for Hugging Face Transformers; importing it registers `attn_implementation="attentiondrop"`."""

from .version import __version__, require_minimum_versions


require_minimum_versions()

from .configuration import AttentionDropConfig  # noqa: E402
from .registration import configure, register  # noqa: E402
from .report import Report, report  # noqa: E402


register()

__all__ = ["AttentionDropConfig", "Report", "__version__", "configure", "report"]
