"""Trains a text classifier with AttentionDrop and, optionally, the consistency term.

Without arguments, it trains a small BERT from scratch to classify passages of Python's documentation by topic:

    accelerate launch recipes/text_classification.py

A pretrained model on your own texts, with a column of texts and one of classes (csv, tsv, json, jsonl or parquet):

    accelerate launch recipes/text_classification.py --config recipes/configs/text_classification.yaml \\
        --train_file reviews.csv --text_column review --label_column rating --output_dir runs/reviews

Pairs of texts from the Hub, with the consistency term:

    accelerate launch recipes/text_classification.py --config recipes/configs/text_classification.yaml \\
        --dataset_name nyu-mll/glue --dataset_config_name mrpc --text_column sentence1 --text_pair_column sentence2 \\
        --consistency_weight 3 --output_dir runs/mrpc

`--consistency_weight 0.5` adds the consistency term, which takes two passes. With `--attn_implementation sdpa` it is
R-Drop, on the dropout of the model. `--help` lists all arguments.
"""

import sys


try:
    import shared

    shared.check_installed("sklearn", "tokenizers")
except ModuleNotFoundError:
    print(f"{__file__}: error: the folder `shared` must be next to this file: copy it too.", file=sys.stderr)
    sys.exit(2)

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import DatasetDict
from shared.arguments import ModelArguments, RunArguments
from shared.checkpoints import accept_saved_weights
from shared.data import check_columns, draw_training_rows, hold_out, sample_counts
from shared.documentation import DOCUMENTATION, documentation_topics
from shared.evaluation import (
    EvaluationArguments,
    LastEvaluation,
    evaluate_classifier_on_test,
    final_evaluation,
    measure_classifier,
)
from shared.labels import LabelledArguments, add_label_noise, encode_labels
from shared.model import from_scratch, load_pretrained, load_processor, saved_config
from shared.output import check_output_dir, finish
from shared.parser import RecipeParser
from shared.running import owning_output_dir
from shared.text import (
    FileArguments,
    check_text,
    check_tokens,
    load_text_data,
    texts_at_limit,
    train_encoder_tokenizer,
)
from shared.training import train
from sklearn.metrics import f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_attentiondrop import AttentionDropTrainer, AttentionDropTrainingArguments, apply_dropconnect
from hf_attentiondrop.cli.flags import naming_flag
from hf_attentiondrop.evaluation.calibration import expected_calibration_error
from hf_attentiondrop.evaluation.perturbation_space import check_attackable
from hf_attentiondrop.evaluation.pretrained import longest_text


@dataclass
class TextModelArguments(ModelArguments):
    vocab_size: int = field(default=2000, metadata={"help": "From scratch: size of the vocabulary."})
    hidden_size: int = field(default=64, metadata={"help": "From scratch: width of the model."})
    num_hidden_layers: int = field(default=2, metadata={"help": "From scratch: number of layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "From scratch: number of attention heads."})


@dataclass
class TextDataArguments(FileArguments, LabelledArguments):
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Column of the second texts, to classify pairs."}
    )
    max_length: int = field(
        default=128,
        metadata={
            "help": "Maximum tokens per text; longer ones are truncated. The default is capped at the model's limit."
        },
    )


@dataclass
class TextTrainingArguments(RunArguments, AttentionDropTrainingArguments):
    output_dir: str = field(default="runs/text_classification", metadata={"help": "Output folder."})


def defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Defaults that depend on other arguments: training from scratch needs others than fine-tuning."""
    if values["model_name_or_path"]:
        return {}
    return {
        "max_length": 64,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.05,
        "num_train_epochs": 15.0,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 128,
    }


def load_data(
    arguments: TextDataArguments, saved: PreTrainedConfig | None = None, is_trained: bool = True
) -> DatasetDict:
    """Loads and checks the texts, and holds some out for evaluation."""
    data = load_text_data(arguments, documentation_topics)
    columns = {"--text_column": arguments.text_column, "--text_pair_column": arguments.text_pair_column}
    columns = {flag: column for flag, column in columns.items() if column}
    check_columns(data, columns | {"--label_column": arguments.label_column})
    for flag, column in columns.items():
        check_text(data, flag, column)
    data = encode_labels(data, arguments.label_column, saved, is_trained)
    return hold_out(data, arguments, stratify_by_column=arguments.label_column)


def load_tokenizer(
    arguments: TextModelArguments, data_arguments: TextDataArguments, data: DatasetDict
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of the model, or trains one on the texts."""
    if arguments.model_name_or_path:
        tokenizer = load_processor(AutoTokenizer, arguments)
    else:
        columns = filter(None, (data_arguments.text_column, data_arguments.text_pair_column))
        texts = [text for column in columns for text in data["train"][column]]
        tokenizer = train_encoder_tokenizer(texts, arguments.vocab_size, data_arguments.max_length)
    if tokenizer.pad_token is None:  # as for most causal language models
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, arguments: TextDataArguments) -> DatasetDict:
    """Tokenizes the texts to `input_ids` and `labels`; batches are padded later."""

    def encode(rows: dict[str, list]) -> dict[str, list]:
        pair = rows[arguments.text_pair_column] if arguments.text_pair_column else None
        encoded = tokenizer(rows[arguments.text_column], pair, truncation=True, max_length=arguments.max_length)
        return {**encoded, "labels": rows[arguments.label_column]}

    return data.map(encode, batched=True, remove_columns=data["train"].column_names, desc="Tokenizing")


def load_model(
    arguments: TextModelArguments,
    attention: dict[str, Any],
    class_names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    has_new_head: bool,
) -> PreTrainedModel:
    """Builds the model, from a checkpoint or from scratch, with a head for these classes."""
    options = {
        **attention,
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
        # For heads that read the last token before the padding.
        "pad_token_id": tokenizer.pad_token_id,
    }
    if arguments.model_name_or_path:
        # A head for other classes has another shape.
        return load_pretrained(AutoModelForSequenceClassification, arguments, has_new_head=has_new_head, **options)
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        intermediate_size=4 * arguments.hidden_size,
        # BERT's 0.02 is for a width of 768; a narrow model learns slowly from weights that small.
        initializer_range=arguments.hidden_size**-0.5,
        **options,
    )
    return from_scratch(AutoModelForSequenceClassification, arguments, config)


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, macro F1 and expected calibration error of the logits `(N, C)`."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return scores(logits.argmax(-1), prediction.label_ids) | {
        "expected_calibration_error": expected_calibration_error(logits, prediction.label_ids)
    }


def scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and macro F1."""
    return {
        "accuracy": float(np.mean(predicted == labels)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }


def majority_baseline(data: DatasetDict, label_column: str) -> dict[str, float]:
    """The scores of always predicting the most frequent class of the training data."""
    majority = Counter(data["train"][label_column]).most_common(1)[0][0]
    labels = np.array(data["validation"][label_column])
    return scores(np.full_like(labels, majority), labels)


def main(argv: Sequence[str] | None = None) -> None:
    types = (TextModelArguments, TextDataArguments, EvaluationArguments, TextTrainingArguments)
    parser = RecipeParser(__doc__, types)
    model_args, data_args, evaluation_args, training_args, attention = parser.parse(argv, defaults)

    last_evaluation = LastEvaluation()
    # Nothing is written before all checks have passed.
    with parser.preparing():
        check_output_dir(training_args)
        set_seed(training_args.seed)
        with training_args.main_process_first():
            data = load_data(data_args, saved_config(model_args), training_args.do_train)
            data = draw_training_rows(data, data_args, training_args.seed, data_args.label_column)
            data, noise = add_label_noise(data, data_args, training_args.seed)
            tokenizer = load_tokenizer(model_args, data_args, data)
        class_names = data["train"].features[data_args.label_column].names
        model = load_model(model_args, attention, class_names, tokenizer, training_args.do_train)
        parser.cap(data_args, "max_length", min(tokenizer.model_max_length, longest_text(model)))
        with training_args.main_process_first():
            tokenized = tokenize(data, tokenizer, data_args)
        check_tokens(tokenized, model)
        parser.note(texts_at_limit(tokenized, data_args.max_length))
        if evaluation_args.evaluate_robustness:
            with naming_flag("--evaluate_robustness"):
                check_attackable(model)
        accept_saved_weights(model)
        apply_dropconnect(model, model_args.dropconnect)
        trainer = AttentionDropTrainer(
            model=model,
            args=training_args,
            train_dataset=tokenized["train"],
            eval_dataset=tokenized["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[last_evaluation],
            compute_metrics=classification_metrics,
        )

    baseline = majority_baseline(data, data_args.label_column)
    metrics: dict[str, Any] = {**sample_counts(data), **noise}
    metrics |= {f"majority_{name}": value for name, value in baseline.items()}
    results = {"data": data_args.dataset_name or data_args.train_file or DOCUMENTATION}
    evaluation = None
    with owning_output_dir(parser, training_args) as checkpoint:
        if training_args.do_train:
            train_metrics, train_results = train(trainer, checkpoint)
            metrics |= train_metrics
            results |= train_results
        if training_args.do_eval:
            metrics |= final_evaluation(trainer, last_evaluation)
            evaluation = measure_classifier(trainer, evaluation_args)
            for name, value in baseline.items():
                results[name] = f"{metrics[f'eval_{name}']:.4f} (always the most frequent class: {value:.4f})"
            results["evaluated on"] = f"{len(data['validation'])} held-out texts"
        if "test" in data and training_args.do_predict:
            metrics |= evaluate_classifier_on_test(trainer, tokenized["test"], evaluation)

        finish(trainer, parser, "Text classification", DOCUMENTATION, metrics, results, evaluation)


if __name__ == "__main__":
    main()
