"""What a model card says about a method."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MethodCard:
    """One method on a model card.

    Args:
        name (`str`): heading.
        text (`str`): what the method does, in sentences.
        formula (`str`): plain text, rendered verbatim.
        tag (`str`, *optional*): tag on the Hub; `None` for no tag.
        citation (`str`): BibTeX entry of the paper.
        settings (`dict[str, Any]`): hyperparameters.
    """

    name: str
    text: str
    formula: str
    tag: str | None
    citation: str
    settings: dict[str, Any] = field(default_factory=dict)
