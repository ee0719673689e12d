"""Code shared by the recipes: arguments, data, checks, and the record of a run."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path


# Import names of what every recipe needs; matplotlib is used last, for the plots.
ALL_NEED = ("torch", "transformers", "hf_attentiondrop", "accelerate", "datasets", "matplotlib", "yaml")


def check_installed(*modules: str) -> None:
    """Exits with one line that names the missing packages and the command that installs them, if any are missing.

    Args:
        modules (`str`): import names of the packages that only this recipe needs.
    """
    missing = [module for module in (*ALL_NEED, *modules) if find_spec(module) is None]
    if not missing:
        return
    root = Path(__file__).resolve().parents[2]
    location = root if (root / "pyproject.toml").is_file() else "a clone of hf-attentiondrop"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"{Path(sys.argv[0]).name}: error: not installed: {', '.join(missing)}. Run `pip install -e '.[recipes]'` "
            f"in {location}.",
            file=sys.stderr,
        )
    sys.exit(2)
