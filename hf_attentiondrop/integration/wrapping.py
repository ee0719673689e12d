"""Wrapping a function of Transformers exactly once."""

import functools
from collections.abc import Callable
from typing import Any


def wrapped(original: Any, around: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method that calls `around(self, original, *args, **kwargs)`; a wrapped original is returned as is."""
    if getattr(original, "_wrapped_by_attentiondrop", False):
        return original

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(self, original, *args, **kwargs)

    vars(method)["_wrapped_by_attentiondrop"] = True
    return method
