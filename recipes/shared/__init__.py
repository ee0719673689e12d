"""What the recipes have in common: their arguments, their data, and the record that a run leaves behind."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path


# What every recipe imports sooner or later, as it is imported; the plots are drawn at the end.
ALL_NEED = ("torch", "transformers", "hf_attentiondrop", "accelerate", "datasets", "matplotlib", "yaml")


def check_installed(*modules: str) -> None:
    """Ends the process where packages are missing, with one line that names them and the command that installs them.

    Args:
        modules (`str`): what the recipe imports beyond what all of them do.
    """
    missing = [module for module in (*ALL_NEED, *modules) if find_spec(module) is None]
    if not missing:
        return
    root = Path(__file__).resolve().parents[2]
    place = root if (root / "pyproject.toml").is_file() else "a clone of hf-attentiondrop"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"{Path(sys.argv[0]).name}: error: not installed: {', '.join(missing)}. Run `pip install -e '.[recipes]'` "
            f"in {place}.",
            file=sys.stderr,
        )
    sys.exit(2)
