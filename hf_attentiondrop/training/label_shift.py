"""Whether a language-model head compares its logits with the label of the next position, read off its source.

The name of a class does not tell: `BartForCausalLM` compares logits and labels of the same position, and
`LlamaForCausalLM` does not. Nor does its loss alone: InstructBLIP calls the causal loss itself or leaves it to its T5,
depending on its config.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss


# The causal loss, given labels under the name of labels that are shifted already.
_DECLARES_SHIFTED = re.compile(r"shift_labels=([^,]* else )?labels\b(?!\[)|pop\('shift_labels', labels\)")
_CUTS_FIRST_LABEL = re.compile(r"labels\[(\.\.\.|:), 1:")
_IS_A_LOSS = re.compile(r"(^|\.)(cross_entropy|nll_loss|\w*(loss|criterion)\w*)$", re.IGNORECASE)
# A value in another shape or type at most.
_AS_IT_IS = re.compile(r"(\w+)(\.(view|reshape|flatten|squeeze|contiguous|to|long|type)\([^()]*\))*")


def shifts_labels(model: nn.Module) -> bool | None:
    """Whether the loss of a model compares the logits of a position with the label of the next one.

    Args:
        model: the model, without the wrappers of PEFT and of a launcher.

    Returns:
        `bool` or `None`: `None` if the source of the model does not tell.

    Example:

    >>> from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel
    >>> config = BertConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=1, intermediate_size=4)
    >>> shifts_labels(BertForMaskedLM(config)), shifts_labels(BertLMHeadModel(config))
    (False, True)
    """
    # Launchers and TRL replace the forward of the instance. That of the class computes the loss.
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
    labels = _unmoved(tree, nodes)
    if any(_compares_labels(node, labels) for node in nodes if isinstance(node, ast.Call)):
        return False
    shifts = (_shift_behind(model, node, owner) for node in nodes if isinstance(node, ast.Call))
    return next((shift for shift in shifts if shift is not None), None)


def _compares_labels(call: ast.Call, labels: set[str]) -> bool:
    """Whether a call is that of a loss, whose targets are labels that nothing has moved."""
    targets = [*call.args[1:2], *(word.value for word in call.keywords if word.arg in ("target", "labels"))]
    found = [_AS_IT_IS.fullmatch(ast.unparse(target)) for target in targets]
    is_loss = _IS_A_LOSS.search(ast.unparse(call.func))
    return bool(is_loss) and any(match is not None and match[1] in labels for match in found)


def _unmoved(tree: ast.Module, nodes: list[ast.AST]) -> set[str]:
    """The parameters of a function, but for those that it replaces by something else."""
    function = tree.body[0]
    parameters = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, _AS_IT_IS.fullmatch(ast.unparse(node.value))
            if value is None or value[1] != name:
                parameters.discard(name)
    return parameters


def _shift_behind(model: nn.Module, call: ast.Call, owner: type) -> bool | None:
    """The shift in what a call hands the labels to: a submodule, another method, or the method of a base class."""
    if not isinstance(call.func, ast.Attribute):
        return None
    if ast.unparse(call.func).startswith("super("):
        base = next((base for base in owner.__mro__[1:] if call.func.attr in vars(base)), None)
        return None if base is None else _shift_in(model, vars(base)[call.func.attr], base)
    if not any(ast.unparse(value) == "labels" for value in (*call.args, *(word.value for word in call.keywords))):
        return None
    target = _value(model, call.func)
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
    """The nodes below a node, without the branches that the model's own attributes rule out."""
    taken = _value(model, node.test) if isinstance(node, ast.If) else None
    if isinstance(taken, bool):
        children = node.body if taken else node.orelse
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        yield child
        yield from _reachable(child, model)


def _is_simple_statement(node: ast.AST) -> bool:
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return isinstance(node, ast.stmt) and not hasattr(node, "body") and not is_docstring


def _value(model: nn.Module, expression: ast.expr) -> Any:
    """The value of `self.a.b`; `None` for any other expression and for what changes with the mode."""
    path = ast.unparse(expression)
    if path == "self.training" or not re.fullmatch(r"self(\.\w+)+", path):
        return None
    value = model
    for name in path.split(".")[1:]:
        value = getattr(value, name, None)
    return value
