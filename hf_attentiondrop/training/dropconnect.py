"""DropConnect on the linear layers of a model: a baseline of the AttentionDrop paper.

The class of each layer is swapped for a subclass that drops weights in its forward pass. Parameters, their names and
the state dict stay the same.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..functional.dropconnect import drop_weights
from ..methods.card import MethodCard
from ..validation import is_number


ALL_LINEAR = "all-linear"
# What wrappers put before the names of the model: DDP, and PEFT.
WRAPPER_PREFIX = re.compile(r"^(module\.|base_model\.model\.)+")
CITATION = """@inproceedings{wan2013dropconnect,
  title     = {Regularization of Neural Networks using DropConnect},
  author    = {Wan, Li and Zeiler, Matthew and Zhang, Sixin and LeCun, Yann and Fergus, Rob},
  booktitle = {Proceedings of the 30th International Conference on Machine Learning},
  pages     = {1058--1066},
  year      = {2013}
}"""


class DropConnectLinear(nn.Linear):
    """[`~torch.nn.Linear`] that drops weights in training."""

    dropconnect_p: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return F.linear(input, drop_weights(self.weight, self.dropconnect_p), self.bias)


class DropConnectConv1D(Conv1D):
    """Transformers' `Conv1D`, the linear layer of GPT-2, that drops weights in training."""

    dropconnect_p: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return F.linear(x, drop_weights(self.weight, self.dropconnect_p).T, self.bias)


DropConnectLayer = DropConnectLinear | DropConnectConv1D
DROPPING: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: DropConnectLinear, Conv1D: DropConnectConv1D}
PLAIN = {dropping: plain for plain, dropping in DROPPING.items()}


def apply_dropconnect(model: nn.Module, p: float, target_modules: str | Sequence[str] | None = None) -> None:
    """Applies DropConnect to the linear layers of a model: in training, each weight is zeroed with probability `p` in
    each forward pass, and the others are scaled by `1 / (1 - p)`. Evaluation mode is unchanged, bit for bit.

    All samples of a batch share one mask. Biases are kept. Code that reads the weight of a layer without calling the
    layer is not affected. A later call replaces the earlier one: it changes `p`, without recompiling a compiled model,
    or with `p=0.0` restores the plain layers.

    Args:
        model (`torch.nn.Module`): any model, before or after it is wrapped by PEFT, DDP or `torch.compile`.
        p (`float`): probability in [0, 1).
        target_modules (`str` or `Sequence[str]`, *optional*):
            Layers, as in PEFT: a list of names, each the whole name or its last parts, or one regular expression that
            matches whole names. `None` or `"all-linear"` selects every linear layer except the output embeddings and
            layers that share their weight with an embedding. The name of a layer that PEFT adapts selects its base
            weight and its adapters.

    Raises:
        TypeError: If `model` is not a module.
        ValueError:
            If `p` is not in [0, 1), a name matches no linear layer, nothing is selected, or a selected layer is
            quantized, parametrized, or computed in another way than by [`~torch.nn.Linear`].

    Source: Wan et al., Regularization of Neural Networks using DropConnect, ICML 2013.

    Example:

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> model = BertForSequenceClassification(config)
    >>> apply_dropconnect(model, p=0.1)
    >>> model.bert.pooler.dense
    DropConnectLinear(in_features=32, out_features=32, bias=True)
    >>> apply_dropconnect(model, p=0.2, target_modules=["query", "key", "value"])
    >>> dropconnect_of(model)
    0.2
    >>> apply_dropconnect(model, p=0.0)
    >>> dropconnect_of(model) is None
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}: only layers drop weights.")
    if not (is_number(p) and 0 <= p < 1):
        raise ValueError(
            f"`p` must be a number in [0, 1), got {p!r}: it is the probability that a weight is zeroed. Pass a "
            "lower one, or 0.0 to switch DropConnect off."
        )
    selected = _selected_layers(model, target_modules) if p > 0 else {}
    unselected = {name: layer for name, layer in _dropping_layers(model).items() if name not in selected}
    for name, layer in (selected | unselected).items():
        _check_layer(name, layer)
    for layer in unselected.values():
        layer.__class__ = PLAIN[type(layer)]
        del layer.dropconnect_p
    for layer in selected.values():
        if type(layer) in DROPPING:
            layer.__class__ = DROPPING[type(layer)]
            # On the CPU, like any scalar; a tensor, because torch.compile would recompile for another number; not a
            # buffer, which would be saved, and rounded where the model is cast.
            layer.dropconnect_p = torch.zeros((), dtype=torch.float64, device="cpu")
        layer.dropconnect_p.fill_(p)


def dropconnect_of(model: nn.Module) -> float | None:
    """The `p` of [`apply_dropconnect`], or `None` for a model without DropConnect."""
    return next((layer.dropconnect_p.item() for layer in _dropping_layers(model).values()), None)


def dropconnect_card(p: float) -> MethodCard:
    """What a model card says about DropConnect.

    Example:

    >>> print(dropconnect_card(0.1).formula)
    W' = M ⊙ W / (1 - p),   M[i,j] ~ Bernoulli(1 - p)
    """
    return MethodCard(
        name="DropConnect",
        text="In training, each weight of the linear layers is zeroed with probability `p` in each forward pass, and "
        "the others are scaled by 1 / (1 - p). Evaluation uses all weights.",
        formula="W' = M ⊙ W / (1 - p),   M[i,j] ~ Bernoulli(1 - p)",
        tag="dropconnect",
        citation=CITATION,
        settings={"p": p},
    )


def _dropping_layers(model: nn.Module) -> dict[str, DropConnectLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DropConnectLayer)}


def _selected_layers(model: nn.Module, target_modules: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers that `target_modules` selects, by their names in `model`."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, tuple(DROPPING))}
    if target_modules is None or target_modules == ALL_LINEAR:
        return _all_but_embeddings(model, layers)
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"`target_modules` must be a regular expression for whole names, or a list of names, got "
                f"{target_modules!r}: {error}. Pass a list for plain names."
            ) from error
        patterns = {target_modules: target_modules}
    else:
        patterns = {name: rf"(.*\.)?{re.escape(name)}" for name in target_modules}
    names = _names_to_match(model)
    selected: dict[str, nn.Module] = {}
    for target, pattern in patterns.items():
        found = {name for name in layers if any(re.fullmatch(pattern, alias) for alias in names[name])}
        if not found:
            there = sorted({names[name][-1].rpartition(".")[2] for name in layers})
            raise ValueError(
                f"`target_modules`: {target!r} matches no linear layer of {type(model).__name__}, so it would have no "
                f"effect. A string is a regular expression for whole names, a list holds names. Linear layers: "
                f"{', '.join(there) or 'none'}."
            )
        selected |= {name: layers[name] for name in found}
    if not selected:
        raise ValueError("`target_modules` names no layer: pass None for all linear layers, or p=0.0 for none.")
    return selected


def _all_but_embeddings(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    modules = list(model.modules())
    if any(getattr(module, "is_quantized", False) for module in modules):
        raise ValueError(
            f"Expected floating-point weights, {type(model).__name__} is quantized, and single quantized weights "
            "cannot be zeroed. Load it without quantization, or name unquantized layers in `target_modules`."
        )
    heads = [module.get_output_embeddings() for module in modules if isinstance(module, PreTrainedModel)]
    excluded = {layer for head in heads if head is not None for layer in head.modules()}
    tied = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    selected = {
        name: layer for name, layer in layers.items() if layer not in excluded and id(layer.weight) not in tied
    }
    if not selected:
        raise ValueError(
            f"Expected linear layers (nn.Linear or Conv1D) besides the output embeddings, {type(model).__name__} has "
            "none: DropConnect would have no effect."
        )
    return selected


def _names_to_match(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names that select a module, by its name in `model`: its own without those of wrappers around the model, and
    that of the layer that PEFT wraps, if it is inside of one."""
    names: dict[str, tuple[str, ...]] = {"": ("",)}
    wrapped: dict[str, str] = {}
    for name, module in model.named_modules():
        own = WRAPPER_PREFIX.sub("", name.replace("_orig_mod.", ""))
        parent = name.rpartition(".")[0]
        if parent in wrapped:
            wrapped[name] = wrapped[parent]
        elif hasattr(module, "base_layer") or hasattr(module, "original_module"):
            wrapped[name] = own
        names[name] = (own, wrapped[name]) if name in wrapped else (own,)
    return names


def _check_layer(name: str, layer: nn.Module) -> None:
    """Checks that swapping the class of a layer changes its forward pass, and nothing else."""
    if type(layer) not in DROPPING and type(layer) not in PLAIN:
        raise ValueError(
            f"Expected a plain nn.Linear or Conv1D, {name} is a {type(layer).__name__}: DropConnect replaces the "
            "forward pass of a linear layer, which would break one that is quantized, parametrized or computed "
            "differently. Name other layers in `target_modules`."
        )
    if "forward" in vars(layer):
        raise ValueError(
            f"Expected the forward pass of {type(layer).__name__}, that of {name} was replaced (as by the hooks of "
            "device_map): DropConnect would be silently ignored. Load the model without them."
        )
