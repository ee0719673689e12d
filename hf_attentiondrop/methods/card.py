"""The section of a model card about one method."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MethodCard:
    """How a model card presents one method.

    Args:
        name (`str`): Heading of the section.
        text (`str`): What the method does, in one to three sentences.
        formula (`str`): Plain-text formula, shown as a code block.
        tag (`str`, *optional*): Tag on the Hub; `None` adds no tag.
        citation (`str`): BibTeX entry of the paper.
        settings (`dict[str, Any]`): Hyperparameters of the method.

    Example:

    >>> card = MethodCard("Dropout", "Zeroes each activation with probability `p`.", "y = m · x / (1 - p)", None, "")
    >>> card.settings
    {}
    """

    name: str
    text: str
    formula: str
    tag: str | None
    citation: str
    settings: dict[str, Any] = field(default_factory=dict)
