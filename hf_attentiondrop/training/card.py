"""The model-card section about the consistency term."""

from dataclasses import asdict

from ..methods.card import MethodCard
from .arguments import ConsistencyArguments


R_DROP = """@inproceedings{liang2021rdrop,
  title     = {R-Drop: Regularized Dropout for Neural Networks},
  author    = {Liang, Xiaobo and Wu, Lijun and Li, Juntao and Wang, Yue and Meng, Qi and Qin, Tao and Chen, Wei and \
Zhang, Min and Liu, Tie-Yan},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021},
  note      = {arXiv:2106.14448}
}"""
DIVERGENCE_FORMULAS = {
    "symmetric_kl": "D(P1, P2) = 1/2 [KL(P1‖P2) + KL(P2‖P1)]",
    "kl": "D(P1, P2) = KL(P1‖P2)",
    "js": "D(P1, P2) = 1/2 [KL(P1‖M) + KL(P2‖M)],   M = (P1 + P2) / 2",
}


def consistency_card(arguments: ConsistencyArguments) -> MethodCard:
    """The card of the consistency term with the given settings.

    Args:
        arguments ([`ConsistencyArguments`]): Settings of the term.

    Example:

    >>> from hf_attentiondrop import ConsistencyArguments
    >>> print(consistency_card(ConsistencyArguments(consistency_weight=0.5, consistency_divergence="kl")).formula)
    loss = task + λ · D(P1, P2),   λ = consistency_weight
    D(P1, P2) = KL(P1‖P2)
    """
    fraction, interval = arguments.consistency_fraction, arguments.consistency_interval
    text = (
        "In training, each batch runs twice with independent perturbations, and the divergence between the two output "
        "distributions is added to the task loss."
    )
    weight = "consistency_weight"
    if fraction < 1:
        text += f" Only a random share of {fraction:g} of the rows runs twice; D is the mean over these rows."
    if interval > 1:
        text += f" The term is part of one in {interval} optimizer steps; the others run one pass."
        weight += f" in optimizer steps 0, {interval}, {2 * interval}, …"
    return MethodCard(
        name="Consistency between two passes",
        text=text,
        formula=f"loss = task + λ · D(P1, P2),   λ = {weight}\n"
        f"{DIVERGENCE_FORMULAS[arguments.consistency_divergence]}",
        tag="consistency-regularization",
        citation=R_DROP,
        # The shared trunk changes the speed, not the result.
        settings={k: v for k, v in asdict(arguments).items() if k != "consistency_shared_trunk"},
    )
