"""Publishing a trained model on the Hub: model card, evaluation results and upload."""

from .card import CARD_FILE, METRICS_FILE, build_card, check_card, write_card
from .content import CardContent, Data
from .run import describe_model, describe_run
from .upload import ModelCardMixin, UploadError


__all__ = [
    "CARD_FILE",
    "METRICS_FILE",
    "CardContent",
    "Data",
    "ModelCardMixin",
    "UploadError",
    "build_card",
    "check_card",
    "describe_model",
    "describe_run",
    "write_card",
]
