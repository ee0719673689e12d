"""How much do the gradients of mini-batches vary under a perturbation, compared with none, at the same weights?

A small ViT is trained without perturbation by the recipe for images, and measured with and without one on batches
of the images that it was trained on. A script for `hf-attentiondrop compare`:

    hf-attentiondrop compare studies/gradient_noise.yaml --output_dir studies/results/gradient_noise
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from hf_attentiondrop.evaluation.gradients import GradientNoise, gradient_noise


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import image_classification
from shared.data import draw_training_rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_dir", required=True, help="folder of training images, with one subfolder per class")
    parser.add_argument("--train_samples", type=int, default=2000, help="images to train on, and to measure on")
    parser.add_argument("--num_train_epochs", type=float, default=4, help="of the training without perturbation")
    parser.add_argument("--attention_drop", type=json.loads, help="the perturbation, as JSON; none by default")
    parser.add_argument("--dropout", type=float, default=0.0, help="of hidden states and attention weights")
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch")
    parser.add_argument("--seed", type=int, default=0, help="of training, batches and perturbation")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for metrics.json")
    arguments = parser.parse_args(argv)

    folder = arguments.output_dir / "model"
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("train_dir", "num_train_epochs", "seed")]
    flags += ["--train_samples", str(arguments.train_samples), "--output_dir", str(folder), "--report_to", "none"]
    model = ["--attn_implementation", "sdpa", "--hidden_size", "48", "--num_hidden_layers", "3"]
    image_classification.main([*flags, *model, "--save_strategy", "no", "--eval_strategy", "no"])

    attention = {"attn_implementation": "attentiondrop", "attention_drop": arguments.attention_drop}
    dropout = {name: arguments.dropout for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    batches = load_batches(folder, arguments)
    set_seed(arguments.seed)
    perturbed = measure(folder, batches, **dropout, **(attention if arguments.attention_drop else {}))
    plain = measure(folder, batches)
    metrics = {
        "variance": perturbed.variance,
        "variance_ratio": perturbed.variance / plain.variance,
        "mean_norm_ratio": perturbed.mean_norm / plain.mean_norm,
    }
    (arguments.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, batches: list[dict[str, torch.Tensor]], **options: object) -> GradientNoise:
    """The noise of the gradients at the saved weights, with these options of the model."""
    return gradient_noise(AutoModelForImageClassification.from_pretrained(folder, **options), batches)


def load_batches(folder: Path, arguments: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """The images that the saved model was trained on, in random order."""
    processor = AutoImageProcessor.from_pretrained(folder)
    of_data = image_classification.ImageDataArguments(
        train_dir=arguments.train_dir, train_samples=arguments.train_samples
    )
    data = image_classification.load_data(of_data)
    rows = draw_training_rows(data, of_data, arguments.seed, of_data.label_column)["train"].shuffle(arguments.seed)
    starts = range(0, len(rows) - arguments.batch_size + 1, arguments.batch_size)
    batches = [list(rows.select(range(start, start + arguments.batch_size))) for start in starts]
    return [image_classification.collate(batch, processor, of_data) for batch in batches]


if __name__ == "__main__":
    main()
