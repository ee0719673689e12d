"""The methods: one file and one row each."""

from .affine_scaled import AffineScaledConfig
from .attention_sink import AttentionSinkConfig
from .blur import BlurredSmoothing
from .drophead import DropHead
from .dropkey import DropKey
from .gated_attention import GatedAttentionConfig
from .hard import HardMasking
from .learned import LearnedMethod
from .method import Method, Perturbation


METHODS: tuple[type[Method], ...] = (
    HardMasking,
    BlurredSmoothing,
    DropHead,
    DropKey,
    AffineScaledConfig,
    AttentionSinkConfig,
    GatedAttentionConfig,
)
PERTURBATIONS: dict[str, type[Perturbation]] = {
    method.variant: method for method in METHODS if issubclass(method, Perturbation)
}
LEARNED_METHODS: dict[str, type[LearnedMethod]] = {
    method.method: method for method in METHODS if issubclass(method, LearnedMethod)
}
