"""Hook of mkdocs: adds notebooks and documents from outside of docs/, and makes links between all of them work.

Links are written for the repository, so that they work on GitHub. The site has docs/ as its root and the other
documents in folders named as in the repository, so links that leave docs/ or lead into it change. Notebooks become
Markdown, with the outputs that are stored in them.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "benchmarks/results/*.md",
    "model_cards/*/README.md",
    "model_cards/*/plots/*.png",
    "studies/README.md",
    "studies/*.yaml",
    "studies/results/*/report.md",
    "studies/results/*/plots/*.png",
)
# Inline links, except to other hosts and within the page.
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
# What would request something from another host when a page is opened.
REQUEST = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        content = notebook_as_markdown(json.loads(path.read_text(encoding="utf-8")))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    return files


def notebook_as_markdown(notebook: dict[str, Any]) -> str:
    """Returns the text, code and outputs of a notebook, with its images inline."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                image = "".join(data["image/png"]).strip()
                parts.append(f"![Output of the code above](data:image/png;base64,{image})")
            elif text := "".join(output.get("text") or data["text/plain"]).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = posixpath.dirname(page.file.src_uri)
    source = page.file.abs_src_path  # None for notebooks.
    is_outside = source is not None and not Path(source).is_relative_to(ROOT / "docs")

    def to_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("" if is_outside else "docs", folder, match[1]))
        name = re.sub(r"\.ipynb$", ".md", target.removeprefix("docs/"))
        return posixpath.relpath(name, folder or ".") if files.get_file_from_path(name) else match[1]

    return LINK.sub(to_site, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    if request := REQUEST.search(output):
        raise PluginError(f"{page.file.src_uri}: the page would request {request[1]}. It must work offline.")
    return output
