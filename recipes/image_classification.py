"""Trains an image classifier with AttentionDrop and, optionally, the consistency term.

Without arguments, it trains a small ViT from scratch on the handwritten digits of scikit-learn:

    accelerate launch recipes/image_classification.py

A pretrained model on your own images, one folder per class:

    accelerate launch recipes/image_classification.py --config recipes/configs/image_classification.yaml \\
        --train_dir images/train --validation_dir images/validation --output_dir runs/images

A data set from the Hub, with another perturbation:

    accelerate launch recipes/image_classification.py --config recipes/configs/image_classification.yaml \\
        --dataset_name uoft-cs/cifar10 --validation_split test --image_column img --variant blur \\
        --output_dir runs/cifar10

Two perturbations at once, and DropConnect:

    accelerate launch recipes/image_classification.py --output_dir runs/both --dropconnect 0.05 \\
        --attention_drop '[{variant: hard, p: 0.1}, {variant: blur, sigma_max: 0.5}]'

`--consistency_weight 0.5` adds the consistency term, which takes two passes. `--help` lists all arguments.
"""

import sys


try:
    import shared

    shared.check_installed("PIL", "sklearn")
except ModuleNotFoundError:
    print(f"{__file__}: error: the folder `shared` must be next to this file: copy it too.", file=sys.stderr)
    sys.exit(2)

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from shared.arguments import ModelArguments, RunArguments
from shared.checkpoints import accept_saved_weights
from shared.data import (
    check_columns,
    draw_training_rows,
    hold_out,
    load_from_hub,
    sample_counts,
)
from shared.evaluation import (
    EvaluationArguments,
    LastEvaluation,
    evaluate_classifier_on_test,
    final_evaluation,
    measure_classifier,
)
from shared.images import check_images, load_image_folders
from shared.labels import LabelledArguments, add_label_noise, encode_labels
from shared.model import from_scratch, load_pretrained, load_processor, saved_config
from shared.output import check_output_dir, finish
from shared.parser import RecipeParser
from shared.running import owning_output_dir
from shared.training import train
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.image_processing_utils import BaseImageProcessor

from hf_attentiondrop import AttentionDropTrainer, AttentionDropTrainingArguments, apply_dropconnect
from hf_attentiondrop.cli.flags import naming_flag
from hf_attentiondrop.evaluation.images import encoded_images, read_image
from hf_attentiondrop.evaluation.perturbation_space import Normalization
from hf_attentiondrop.evaluation.pretrained import AutoImageProcessor, channels_of, check_channels


DIGITS = "the digits of scikit-learn"


@dataclass
class ImageModelArguments(ModelArguments):
    image_size: int = field(default=32, metadata={"help": "From scratch: side of the images in pixels."})
    patch_size: int = field(default=4, metadata={"help": "From scratch: side of a patch in pixels."})
    hidden_size: int = field(default=64, metadata={"help": "From scratch: width of the model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "From scratch: number of layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "From scratch: number of attention heads."})


@dataclass
class ImageDataArguments(LabelledArguments):
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of training images, with one subfolder per class."}
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Folder of evaluation images; by default a share of --train_dir is held out."}
    )
    test_dir: str | None = field(
        default=None, metadata={"help": "Folder to test the trained model on, once; by default it is not tested."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})


@dataclass
class ImageTrainingArguments(RunArguments, AttentionDropTrainingArguments):
    output_dir: str = field(default="runs/image_classification", metadata={"help": "Output folder."})
    # The collator turns images into pixel values, so it needs their column, which no model takes.
    remove_unused_columns: bool = field(default=False, init=False)


def defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Defaults that depend on other arguments: training from scratch needs others than fine-tuning."""
    if values["model_name_or_path"]:
        return {}
    from_scratch = {
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.05,
        "num_train_epochs": 20.0,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 128,
    }
    is_digits = not values["dataset_name"] and not values["train_dir"]
    return from_scratch | ({"image_size": 8, "patch_size": 2} if is_digits else {})


def load_data(
    arguments: ImageDataArguments, saved: PreTrainedConfig | None = None, is_trained: bool = True
) -> DatasetDict:
    """Loads and checks the images, and holds some out for evaluation."""
    if arguments.dataset_name and arguments.train_dir:
        raise ValueError("--dataset_name and --train_dir both name the data to train on: give one of them.")
    for flag in ("validation_dir", "test_dir"):
        if getattr(arguments, flag) and not arguments.train_dir:
            raise ValueError(f"--{flag} needs --train_dir, which is missing.")
    if arguments.dataset_name:
        data = load_from_hub(arguments)
    elif arguments.train_dir:
        data = load_image_folders(arguments.train_dir, arguments.validation_dir, arguments.test_dir)
    else:
        data = DatasetDict(train=digits())
    check_columns(data, {"--image_column": arguments.image_column, "--label_column": arguments.label_column})
    with naming_flag("--image_column"):
        data = DatasetDict({split: encoded_images(rows, arguments.image_column) for split, rows in data.items()})
    data = encode_labels(data, arguments.label_column, saved, is_trained)
    return hold_out(data, arguments, stratify_by_column=arguments.label_column)


def digits() -> Dataset:
    """The 1797 handwritten digits of scikit-learn, 8x8 pixels each."""
    bunch = load_digits()
    images = [PILImage.fromarray(np.uint8(image * (255 / 16))) for image in bunch.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in bunch.target_names])})
    return Dataset.from_dict({"image": images, "label": bunch.target}, features=features)


def load_image_processor(arguments: ImageModelArguments) -> BaseImageProcessor:
    """Loads the image processor of the model, or builds one that only resizes and normalizes."""
    if not arguments.model_name_or_path:
        return ViTImageProcessorPil(size={"height": arguments.image_size, "width": arguments.image_size})
    return load_processor(AutoImageProcessor, arguments)


def load_model(
    arguments: ImageModelArguments, attention: dict[str, Any], class_names: list[str], has_new_head: bool
) -> PreTrainedModel:
    """Builds the model, from a checkpoint or from scratch, with a head for these classes."""
    classes = {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}
    if arguments.model_name_or_path:
        # A head for other classes has another shape.
        options = {**classes, **attention, "has_new_head": has_new_head}
        return load_pretrained(AutoModelForImageClassification, arguments, **options)
    config = ViTConfig(
        image_size=arguments.image_size,
        patch_size=arguments.patch_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        intermediate_size=4 * arguments.hidden_size,
        # ViT's 0.02 is for a width of 768; a narrow model learns slowly from weights that small.
        initializer_range=arguments.hidden_size**-0.5,
        **classes,
        **attention,
    )
    return from_scratch(AutoModelForImageClassification, arguments, config)


def collate(
    examples: list[dict[str, Any]], processor: BaseImageProcessor, arguments: ImageDataArguments, channels: int = 3
) -> dict[str, torch.Tensor]:
    """Builds a batch: `pixel_values` `(B, C, height, width)` and `labels` `(B,)`."""
    images = [read_image(example[arguments.image_column], channels) for example in examples]
    labels = torch.tensor([example[arguments.label_column] for example in examples])
    return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": labels}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy of the logits `(N, C)`."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def majority_accuracy(data: DatasetDict, label_column: str) -> float:
    """The accuracy of always predicting the most frequent class of the training data."""
    majority = Counter(data["train"][label_column]).most_common(1)[0][0]
    return float(np.mean(np.array(data["validation"][label_column]) == majority))


def main(argv: Sequence[str] | None = None) -> None:
    types = (ImageModelArguments, ImageDataArguments, EvaluationArguments, ImageTrainingArguments)
    parser = RecipeParser(__doc__, types)
    model_args, data_args, evaluation_args, training_args, attention = parser.parse(argv, defaults)

    last_evaluation = LastEvaluation()
    # Nothing is written before all checks have passed.
    with parser.preparing():
        check_output_dir(training_args)
        if (evaluation_args.robustness_epsilon or 0) > 1:
            raise ValueError(
                "--robustness_epsilon: expected a share of the pixel range, at most 1, got "
                f"{evaluation_args.robustness_epsilon}: no image has larger changes. Divide steps of 8 bits by 255."
            )
        set_seed(training_args.seed)
        with training_args.main_process_first():
            data = load_data(data_args, saved_config(model_args), training_args.do_train)
            data = draw_training_rows(data, data_args, training_args.seed, data_args.label_column)
            data, noise = add_label_noise(data, data_args, training_args.seed)
        processor = load_image_processor(model_args)
        class_names = data["train"].features[data_args.label_column].names
        model = load_model(model_args, attention, class_names, training_args.do_train)
        with naming_flag("--model_name_or_path"):
            check_channels(processor, model.config)
        channels = channels_of(model.config)
        check_images(data, data_args.image_column, channels)
        accept_saved_weights(model)
        apply_dropconnect(model, model_args.dropconnect)
        trainer = AttentionDropTrainer(
            model=model,
            args=training_args,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            processing_class=processor,
            data_collator=partial(collate, processor=processor, arguments=data_args, channels=channels),
            callbacks=[last_evaluation],
            compute_metrics=accuracy,
        )

    baseline = majority_accuracy(data, data_args.label_column)
    metrics: dict[str, Any] = {**sample_counts(data), **noise, "majority_accuracy": baseline}
    results = {"data": data_args.dataset_name or data_args.train_dir or DIGITS}
    evaluation = None
    with owning_output_dir(parser, training_args) as checkpoint:
        if training_args.do_train:
            train_metrics, train_results = train(trainer, checkpoint)
            metrics |= train_metrics
            results |= train_results
        if training_args.do_eval:
            metrics |= final_evaluation(trainer, last_evaluation)
            normalization = Normalization.from_processor(processor) if evaluation_args.evaluate_robustness else None
            evaluation = measure_classifier(trainer, evaluation_args, normalization)
            results["accuracy"] = f"{metrics['eval_accuracy']:.4f} (always the most frequent class: {baseline:.4f})"
            results["evaluated on"] = f"{len(data['validation'])} held-out images"
        if "test" in data and training_args.do_predict:
            metrics |= evaluate_classifier_on_test(trainer, data["test"], evaluation)

        finish(trainer, parser, "Image classification", DIGITS, metrics, results, evaluation)


if __name__ == "__main__":
    main()
