"""Reports as Markdown, HTML and plain text. Names and logs can hold anything, so all are escaped."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..evaluation.style import BLUE, GRAY
from .runs import LOG_LINES


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colors of a plot that follow the color scheme of the page.
SCHEME = {"#000000": "currentColor", GRAY: "var(--gray)", BLUE.lower(): "var(--blue)"}
ESCAPE_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def render(template: str, **values: Any) -> str:
    """Renders a template of this folder. HTML is escaped automatically, Markdown by the filter `md`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = markdown
    return environment.get_template(template).render(values)


def markdown(text: str) -> str:
    r"""Text as Markdown that shows it, on one line.

    >>> print(markdown("a|b *c* __d__ test_f1\n<script>"))
    a\|b \*c\* \_\_d\_\_ test_f1 \<script\>
    """
    # An underscore between letters is no markup.
    special = r"[\\`*{}\[\]<>#|~$&]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(f"({special})", r"\\\1", " ".join(text.split()))


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text, the header first.

    >>> print(text_table([("method", "p"), ("blur", "0.01")]))
    method  p
    ------  ----
    blur    0.01
    """
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def log_tail(log: str | None) -> list[str]:
    r"""The first line of a log, which is the reason of the failure, and the last ones, as a terminal would show them,
    without colors and earlier states of a progress bar.

    >>> log_tail("10%\r100%\n\x1b[31mValueError\x1b[0m: no\n")
    ['100%', 'ValueError: no']
    """
    lines = ESCAPE_SEQUENCES.sub("", log or "").replace("\r\n", "\n").rstrip().split("\n")
    first, *others = lines
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in [first, *others[-LOG_LINES:]]]
    return ["".join(c for c in line if c.isprintable() or c == "\t") for line in shown]


def svg(figure: "Figure") -> str:
    """A figure as an SVG element for a page that defines `--gray` and `--blue`: real text, no background."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf-attentiondrop"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Nothing refers to groups, and several plots in one page would repeat their ids.
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    for color, scheme in SCHEME.items():
        text = re.sub(rf"(fill|stroke): {color}", rf"\1: {scheme}", text)
    return text
