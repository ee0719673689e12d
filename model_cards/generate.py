"""Runs the four recipes on their built-in data, with the consistency term, and saves their cards and plots here.

    python model_cards/generate.py
    python model_cards/generate.py --recipes translation

It takes about ten minutes on two cores. The package renders the cards from template.md.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "image_classification": "vit-digits",
    "text_classification": "bert-python-topics",
    "translation": "marian-cldr-en-de",
    "causal_lm": "llama-python-documentation",
}
CLASSIFIERS = ("image_classification", "text_classification")
KEPT = ("README.md", "metrics.json", "plots")


def generate(recipe: str) -> None:
    """Runs a recipe, and replaces the saved files of its previous run."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, MODELS[recipe])
        flags = ["--evaluate_robustness"] if recipe in CLASSIFIERS else []
        flags += ["--consistency_weight", "0.5"]
        command = [sys.executable, "-m", "accelerate.commands.launch", ROOT / "recipes" / f"{recipe}.py"]
        subprocess.run([*command, "--output_dir", output, "--disable_tqdm", "true", *flags], check=True)
        kept = ROOT / "model_cards" / MODELS[recipe]
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        for name in KEPT:
            copy = shutil.copytree if (output / name).is_dir() else shutil.copy
            copy(output / name, kept / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(MODELS), default=list(MODELS))
    # These runs need nothing from the Hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    for recipe in parser.parse_args().recipes:
        generate(recipe)


if __name__ == "__main__":
    main()
