"""A process of `test_hub.py` that knows only the ids of models: loads each as its card says.

python -m tests.hub_load outputs.pt
"""

import re
import sys
from typing import Any

import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from transformers import AutoModelForImageClassification


TEXTS = ["the cat sat on the mat", "on the mat"]
IMAGES = [Image.new("RGB", (8, 8), color) for color in ("red", "navy")]


def load(repo_id: str) -> dict[str, Any]:
    """The variables that the code in the card of a repository defines."""
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", ModelCard.load(repo_id).text, re.DOTALL)[1], names)
    return names


@torch.no_grad()
def main(path: str) -> None:
    dropped = load("tester/dropped")
    texts = dropped["tokenizer"](TEXTS, padding=True, return_tensors="pt")
    results = {"dropped": dropped["model"].eval()(**texts).logits}
    assert "hf_attentiondrop" not in sys.modules
    try:
        AutoModelForImageClassification.from_pretrained("tester/reweighted")
    except ValueError as error:
        results["error"] = str(error)

    adapter = load("tester/adapter")
    results["adapter"] = (
        adapter["model"].eval()(**adapter["tokenizer"](TEXTS, padding=True, return_tensors="pt")).logits
    )
    assert "hf_attentiondrop" not in sys.modules

    reweighted = load("tester/reweighted")
    images = reweighted["image_processor"](IMAGES, return_tensors="pt")
    results["reweighted"] = reweighted["model"].eval()(**images).logits
    torch.save(results, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert constants.ENDPOINT.startswith("http://127.0.0.1:")
    main(sys.argv[1])
