"""What a card says of each method: in words, as a formula, with its settings, and with the paper to cite."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..methods.configuration import FIELDS_OF_VARIANTS, AttentionDropConfig
from ..methods.reweighting_configuration import (
    AffineScaledConfig,
    AttentionSinkConfig,
    GatedAttentionConfig,
    ReweightingConfig,
)
from ..training.arguments import ConsistencyArguments


PAPERS = {
    "attentiondrop": """@article{baig2025attentiondrop,
  title   = {AttentionDrop: A Novel Regularization Method for Transformer Models},
  author  = {Baig, Mirza Samad Ahmed and Gillani, Syeda Anshrah and Khan, Abdul Akbar and Shah, Shahid Munir and \
Khan, Muhammad Omer},
  journal = {arXiv preprint arXiv:2504.12088},
  year    = {2025}
}""",
    "affine": """@article{bae2026affine,
  title   = {Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention},
  author  = {Bae, Jeongin and Park, Baeseong and Park, Gunho and Kim, Minsub and Lee, Joonhyung and Yoo, Junhee and \
Woo, Sunghyeon and Ryu, Jiwon and Kwon, Se Jung and Lee, Dongsoo},
  journal = {arXiv preprint arXiv:2602.23057},
  year    = {2026}
}""",
    "gate": """@article{qiu2025gated,
  title   = {Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free},
  author  = {Qiu, Zihan and Wang, Zekun and Zheng, Bo and others},
  journal = {arXiv preprint arXiv:2505.06708},
  year    = {2025}
}""",
    "rdrop": """@inproceedings{liang2021rdrop,
  title     = {R-Drop: Regularized Dropout for Neural Networks},
  author    = {Liang, Xiaobo and Wu, Lijun and Li, Juntao and Wang, Yue and Meng, Qi and Qin, Tao and Chen, Wei and \
Zhang, Min and Liu, Tie-Yan},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021},
  note      = {arXiv:2106.14448}
}""",
}
DIVERGENCE_FORMULAS = {
    "symmetric_kl": "D(P1, P2) = 1/2 [KL(P1‖P2) + KL(P2‖P1)]",
    "kl": "D(P1, P2) = KL(P1‖P2)",
    "js": "D(P1, P2) = 1/2 [KL(P1‖M) + KL(P2‖M)],   M = (P1 + P2) / 2",
}
ACTIVATION_FORMULAS = {"linear_clip": "φ(z) = clamp(0.1 z + 0.5, 0, 1)", "sigmoid": "φ(z) = 1 / (1 + exp(-z))"}


@dataclass(frozen=True)
class Method:
    """One method, as a card presents it.

    Args:
        name (`str`): its heading.
        text (`str`): what it does.
        formula (`str`): plain text, to be read as it stands.
        tag (`str`, *optional*): what it is found by on the Hub; `None` where nobody should find it.
        paper (`str`): key of the paper in `PAPERS`.
        settings (`dict[str, Any]`): its hyperparameters.
    """

    name: str
    text: str
    formula: str
    tag: str | None
    paper: str
    settings: dict[str, Any] = field(default_factory=dict)


def describe_drop(config: AttentionDropConfig, was_applied: bool = True) -> Method:
    """What AttentionDrop does in training.

    Args:
        config: its configuration.
        was_applied: whether the model was trained with it. An entry in a config alone does not tell.

    Example:

    >>> print(describe_drop(AttentionDropConfig(p=0.2, fill="zero")).formula)
    L'[i,j] = 0 with probability p, for each j of S_i
    L = scaling · Q Kᵀ,   S_i: the k highest scores L[i,j] of the keys that query i sees
    """
    method = _drop(config)
    if was_applied:
        return method
    text = (
        "The config of the model asks for this method; whether its weights were trained with it is not recorded. "
        + method.text
    )
    return replace(method, name=f"{method.name} (configured)", text=text, tag=None)


def _drop(config: AttentionDropConfig) -> Method:
    names = ("variant", *FIELDS_OF_VARIANTS[config.variant], "layers", "attentions")
    settings = {name: getattr(config, name) for name in names}
    if config.variant == "blur":
        return Method(
            "AttentionDrop: blurred attention smoothing",
            "In training, attention scores are smoothed along the keys by a Gaussian whose width is drawn anew for "
            "every sample and layer, over the neighbours that each key may see itself. In evaluation attention is "
            "what it is without the method.",
            "L'[i,j] = Σ_t g_t m[j,j+t] L[i,j+t] / Σ_t g_t m[j,j+t],   |t| ≤ (width - 1) / 2\n"
            "L = scaling · Q Kᵀ,   g: Gaussian with σ ~ U(0, sigma_max),   m[j,j+t] = 1 if j may see j+t, else 0",
            "attentiondrop",
            "attentiondrop",
            settings,
        )
    effect, value = {
        "mask": ("dropped with probability `p`, and the rest renormalised; one key always survives", "-∞"),
        "zero": ("given a score of 0 with probability `p`", "0"),
    }[config.fill]
    return Method(
        "AttentionDrop: hard attention masking",
        f"In training, each of the `k` strongest keys of every query is {effect}. In evaluation attention is what it "
        "is without the method.",
        f"L'[i,j] = {value} with probability p, for each j of S_i\n"
        "L = scaling · Q Kᵀ,   S_i: the k highest scores L[i,j] of the keys that query i sees",
        "attentiondrop",
        "attentiondrop",
        settings,
    )


def describe_consistency(arguments: ConsistencyArguments) -> Method:
    """What the consistency term adds to the loss."""
    return Method(
        "Consistency between two passes",
        "In training, each batch runs twice with independent perturbations, and what the two passes disagree about is "
        "added to the task loss.",
        f"loss = task + λ · D(P1, P2),   λ = consistency_weight\n"
        f"{DIVERGENCE_FORMULAS[arguments.consistency_divergence]}",
        "consistency-regularization",
        "rdrop",
        asdict(arguments),
    )


def describe_reweighting(config: ReweightingConfig) -> Iterator[Method]:
    """What attention learns on top of the softmax: one method, or with a gated affine scale two."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("method", "gate")}
    if isinstance(config, AffineScaledConfig):
        yield Method(
            "Affine-Scaled Attention",
            "Attention weights are the softmax times a learned scale per query and head, plus a bias that balances it "
            "against a moving average of the scale.",
            "weights = α · softmax(L) + β on the keys that a query sees,   β = (α_ma - α) / N\n"
            f"α = {'φ(W_a x)' if config.init == 'paper' else '1 + φ(W_a x) - φ(0)'},   "
            f"{ACTIVATION_FORMULAS[config.activation]}\n"
            "α_ma ← momentum · α_ma + (1 - momentum) · mean(α) in training,   "
            f"N: the number of {'keys that the query sees' if config.bias_length == 'visible' else 'keys'}",
            "affine-scaled-attention",
            "affine",
            settings,
        )
        if config.gate:
            yield _gate(config.init, {"init": config.init})
    elif isinstance(config, AttentionSinkConfig):
        yield Method(
            "Learned attention sink",
            "Every head learns a score that takes part in the softmax with nothing to give, so that a query may give "
            "its weight to no key: one of the methods that Affine-Scaled Attention compares with.",
            "weights[i,j] = exp(L[i,j]) / (exp(s) + Σ_t exp(L[i,t])),   s: learned, one per head, starts at init",
            "attention-sink",
            "affine",
            settings,
        )
    elif isinstance(config, GatedAttentionConfig):
        yield _gate(config.init, settings)


def _gate(init: str, settings: dict[str, Any]) -> Method:
    return Method(
        "Gated attention",
        "The attention output is multiplied, component by component, by a learned gate.",
        f"output' = output · {'sigmoid(W_g x)' if init == 'paper' else '2 · sigmoid(W_g x)'}",
        "gated-attention",
        "gate",
        settings,
    )
