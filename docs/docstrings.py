"""Extension of griffe: reads docstrings in Hugging Face's style as mkdocstrings expects them.

- [`Name`] becomes a link if the site describes the name, and code otherwise.
- "Example:" and the lines after ">>>" become a block of code.
- "name (`int`, *optional*, defaults to 5):" becomes "name (int):"; the default is in the signature.
"""

import contextlib
import re
from typing import Any

from griffe import Alias, AliasResolutionError, Extension, NameResolutionError, Object


PACKAGE = "hf_attentiondrop"
LINK = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
EXAMPLE = re.compile(r"^Example:\n", re.MULTILINE)
SESSION = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)
PARAMETER = re.compile(r"^( +\w+) \((`.*)\):", re.MULTILINE)
DEFAULT = re.compile(r", (?:\*optional\*|defaults to .*)")


class HuggingFaceDocstrings(Extension):
    """Rewrites every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: Object, **_: Any) -> None:
        if pkg.path == PACKAGE:
            self._rewrite(pkg, pkg)

    def _rewrite(self, item: Object, package: Object) -> None:
        if item.docstring:
            text = PARAMETER.sub(lambda match: f"{match[1]} ({_plain_type(match[2])}):", item.docstring.value)
            text = EXAMPLE.sub("**Example**\n", text)
            text = SESSION.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)
            item.docstring.value = LINK.sub(lambda match: _link(match, item, package), text)
        for member in item.members.values():
            if not isinstance(member, Alias):
                self._rewrite(member, package)


def _plain_type(text: str) -> str:
    return DEFAULT.sub("", text).replace("`", "").replace(", ", " | ").replace(" or ", " | ")


def _link(match: re.Match[str], item: Object, package: Object) -> str:
    name = match[2]
    shown = name.rpartition(".")[2] if match[1] else name
    path = _resolve(name, item, package)
    if path is None:
        return f"`{shown}`"
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


def _resolve(name: str, item: Object, package: Object) -> str | None:
    """Returns the full path of a name of this package, `None` for a name of another one."""
    first, _, rest = name.partition(".")
    candidates = [name]
    with contextlib.suppress(NameResolutionError):
        candidates.insert(0, f"{item.resolve(first)}{rest and '.'}{rest}")
    for candidate in candidates:
        try:
            return package[candidate.removeprefix(f"{PACKAGE}.")].canonical_path
        except (KeyError, AliasResolutionError):
            continue
    return None
