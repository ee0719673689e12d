"""Detects from the source of a language-model head whether its loss shifts the labels by one position.

The class name is not enough: `BartForCausalLM` compares logits and labels of the same position, `LlamaForCausalLM`
shifts them. The loss function is not enough either: InstructBLIP calls the causal loss itself or delegates to its T5,
depending on its config.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss


# The causal loss with labels passed as `shift_labels`, which it does not shift again.
_DECLARES_SHIFTED = re.compile(r"shift_labels=([^,]* else )?labels\b(?!\[)|pop\('shift_labels', labels\)")
_CUTS_FIRST_LABEL = re.compile(r"labels\[(\.\.\.|:), 1:")
_LOSS_NAME = re.compile(r"(^|\.)(cross_entropy|nll_loss|\w*(loss|criterion)\w*)$", re.IGNORECASE)
# A name, possibly reshaped or converted to another dtype.
_RESHAPED = re.compile(r"(\w+)(\.(view|reshape|flatten|squeeze|contiguous|to|long|type)\([^()]*\))*")


def shifts_labels(model: nn.Module) -> bool | None:
    """Detects whether the loss of a model compares the logits of a position with the label of the next one.

    Args:
        model (`torch.nn.Module`): The model, without the wrappers of PEFT and of a launcher.

    Returns:
        `bool` or `None`: `None` if the source of the model does not show it.

    Example:

    >>> from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel
    >>> config = BertConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=1, intermediate_size=4)
    >>> shifts_labels(BertForMaskedLM(config)), shifts_labels(BertLMHeadModel(config))
    (False, True)
    """
    # Launchers and TRL replace the forward of the instance. The forward of the class computes the loss.
    return _shift_in(model, type(model).forward, type(model))


def _shift_in(model: nn.Module, function: Callable[..., Any], owner: type) -> bool | None:
    tree = _tree(function)
    if tree is None:
        return None
    nodes = list(_reachable(tree, model))
    code = "\n".join(ast.unparse(node) for node in nodes if _is_simple_statement(node))
    if _CUTS_FIRST_LABEL.search(code):
        return True
    if "self.loss_function(" in code:
        if _DECLARES_SHIFTED.search(code):
            return False
        loss = model.loss_function
        return loss is ForCausalLMLoss if loss in LOSS_MAPPING.values() else None
    labels = _unchanged_parameters(tree, nodes)
    if any(_compares_labels(node, labels) for node in nodes if isinstance(node, ast.Call)):
        return False
    shifts = (_shift_of_callee(model, node, owner) for node in nodes if isinstance(node, ast.Call))
    return next((shift for shift in shifts if shift is not None), None)


def _compares_labels(call: ast.Call, labels: set[str]) -> bool:
    """True for a call of a loss function whose targets are unchanged parameters."""
    targets = [*call.args[1:2], *(word.value for word in call.keywords if word.arg in ("target", "labels"))]
    found = [_RESHAPED.fullmatch(ast.unparse(target)) for target in targets]
    is_loss = _LOSS_NAME.search(ast.unparse(call.func))
    return bool(is_loss) and any(match is not None and match[1] in labels for match in found)


def _unchanged_parameters(tree: ast.Module, nodes: list[ast.AST]) -> set[str]:
    """The parameters of a function that it does not reassign, except to reshape them."""
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return set()
    parameters = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, _RESHAPED.fullmatch(ast.unparse(node.value))
            if value is None or value[1] != name:
                parameters.discard(name)
    return parameters


def _shift_of_callee(model: nn.Module, call: ast.Call, owner: type) -> bool | None:
    """The shift in the callee that receives the labels: a submodule, another method, or the method of a base class."""
    if not isinstance(call.func, ast.Attribute):
        return None
    if ast.unparse(call.func).startswith("super("):
        base = next((base for base in owner.__mro__[1:] if call.func.attr in vars(base)), None)
        return None if base is None else _shift_in(model, vars(base)[call.func.attr], base)
    if not any(ast.unparse(value) == "labels" for value in (*call.args, *(word.value for word in call.keywords))):
        return None
    target = _attribute_value(model, call.func)
    if isinstance(target, nn.Module):
        return shifts_labels(target)
    return _shift_in(model, target, owner) if inspect.ismethod(target) else None


@functools.cache
def _tree(function: Callable[..., Any]) -> ast.Module | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _reachable(node: ast.AST, model: nn.Module) -> Iterator[ast.AST]:
    """The nodes below a node, without the branches that attributes of the model rule out."""
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If):
        condition = _attribute_value(model, node.test)
        if isinstance(condition, bool):
            children = node.body if condition else node.orelse
    for child in children:
        yield child
        yield from _reachable(child, model)


def _is_simple_statement(node: ast.AST) -> bool:
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return isinstance(node, ast.stmt) and not hasattr(node, "body") and not is_docstring


def _attribute_value(model: nn.Module, expression: ast.expr) -> Any:
    """The value of `self.a.b`; `None` for any other expression, and for `self.training`, which changes."""
    path = ast.unparse(expression)
    if path == "self.training" or not re.fullmatch(r"self(\.\w+)+", path):
        return None
    value = model
    for name in path.split(".")[1:]:
        value = getattr(value, name, None)
    return value
