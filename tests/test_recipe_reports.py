"""Every recipe writes a report (metrics, plots and a model card) and uploads it with `--push_to_hub`."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_attentiondrop import AttentionDropTrainer, AttentionDropTrainingArguments
from hf_attentiondrop.evaluation.calibration import calibration_metrics
from hf_attentiondrop.evaluation.classifier import predict

from .hub_server import TOKEN, Fault, running_hub
from .models import build
from .recipe_runs import GROUPED_NAMES, RECIPES, ROBUSTNESS_SAMPLES, ROOT, SMALL, load


PUSHED = [*SMALL["image_classification"], "--max_steps", "1", "--max_eval_samples", "8", "--push_to_hub"]
PICTURES = {
    "image_classification": {"attention_entropy", "attention_maps", "reliability", "robustness", "training"},
    "text_classification": {"attention_entropy", "attention_maps", "reliability", "robustness", "training"},
    "translation": {
        "attention_maps",
        "cross_attention_entropy",
        "decoder_attention_entropy",
        "encoder_attention_entropy",
        "training",
    },
    "causal_lm": {"attention_entropy", "attention_maps", "training"},
}


@pytest.mark.parametrize("name", GROUPED_NAMES)
def test_every_run_writes_a_report(name: str, short_run: Callable[[str], Path]) -> None:
    folder = short_run(name)
    card = ModelCard.load(folder / "README.md")
    shown = re.findall(r"!\[.*\]\(plots/(.*)\.png\)", card.text)
    assert set(shown) == PICTURES[name]
    for picture in shown:
        with Image.open(folder / "plots" / f"{picture}.png") as image:
            assert image.width == (1200 if picture == "attention_maps" else 600)  # Three panels side by side.
    metrics = json.loads((folder / "metrics.json").read_text())
    assert all(means["entropy"] > 0 for means in metrics["attention"].values())
    assert "### AttentionDrop: hard attention masking" in card.text and "| `consistency_weight` | 0.5 |" in card.text
    assert str(folder) not in str(card)
    if "robustness" in shown:
        assert metrics["robustness"]["samples"] == ROBUSTNESS_SAMPLES[name]
        assert "upper bound" in card.text
    if name == "causal_lm":
        assert 0 < metrics["eval_expected_calibration_error"] < 1


@pytest.mark.xdist_group("image_classification")
def test_reported_calibration_is_that_of_the_saved_model(
    short_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = load("image_classification", monkeypatch), short_run("image_classification")
    metrics = json.loads((folder / "metrics.json").read_text())
    arguments = recipe.ImageDataArguments(max_eval_samples=24)
    rows = list(recipe.load_data(arguments)["validation"])
    processor = recipe.load_image_processor(recipe.ImageModelArguments(image_size=8))
    model = AutoModelForImageClassification.from_pretrained(folder)
    logits, labels = predict(model, [recipe.collate(rows, processor, arguments)])
    for name, value in calibration_metrics(logits, labels).items():
        assert metrics["calibration"][name] == pytest.approx(value, rel=1e-4)


def test_first_measured_samples_have_every_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    from shared.evaluation import held_out_batches

    labels = sorted(range(60), key=lambda number: number % 3)  # like folders of images
    dataset = Dataset.from_dict({"number": labels, "labels": [number % 3 for number in labels]})
    options = {"per_device_eval_batch_size": 10, "use_cpu": True, "remove_unused_columns": False}
    arguments = AttentionDropTrainingArguments(str(tmp_path), **options)
    batches = held_out_batches(AttentionDropTrainer(build("vit"), arguments, eval_dataset=dataset))
    seen = [[batch["number"].tolist() for batch in batches] for _ in range(2)]
    assert seen[0] == seen[1] and sorted(sum(seen[0], [])) == list(range(60))
    assert {number % 3 for number in seen[0][0]} == {0, 1, 2}


def push(endpoint: str, root: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Runs the recipe with `--push_to_hub` in one process, once per name, which is its folder and repository."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(root / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{ROOT}:{RECIPES}",
    }
    runs = [[*PUSHED, "--hub_model_id", f"tester/{name}", "--output_dir", str(root / name)] for name in names]
    program = f"import image_classification\nfor flags in {runs}: image_classification.main(flags)"
    program = f"import sys\nsys.argv = ['image_classification.py']\n{program}"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_push_to_hub_uploads_the_report_or_says_why_not(tmp_path: Path) -> None:
    with running_hub([Fault("POST /api/models/tester/refused/commit", 403)]) as hub:
        result = push(hub.endpoint, tmp_path, "taken", "refused")
        assert "tester/taken" in hub.repositories, result.stderr
        files = hub.repositories["tester/taken"].files
        expected = {"README.md", "config.json", "metrics.json", "model.safetensors", "preprocessor_config.json"}
        assert expected | {"plots/reliability.png", "plots/training.png", "run.yaml"} <= files.keys()
        assert files["README.md"] == (tmp_path / "taken" / "README.md").read_bytes()
        assert TOKEN not in files["run.yaml"].decode()

        line = result.stderr.rstrip("\n").splitlines()[-1]
        assert result.returncode == 2
        assert line.startswith("image_classification.py: error: The upload to 'tester/refused' failed: 403")
        assert "hf upload tester/refused" in line
        assert expected <= {path.name for path in (tmp_path / "refused").iterdir()}
