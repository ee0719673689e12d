"""Trains a translation model with AttentionDrop and, optionally, the consistency term.

Without arguments, it trains a small Marian from scratch on English and German dates, amounts and lists of territories:

    accelerate launch recipes/translation.py

A pretrained model on your own texts, a column per language or two files with a text per line:

    accelerate launch recipes/translation.py --config recipes/configs/translation.yaml \\
        --train_file train.csv --source_column english --target_column german --output_dir runs/mine

    accelerate launch recipes/translation.py --config recipes/configs/translation.yaml \\
        --train_file train.en.txt --train_target_file train.de.txt --output_dir runs/mine

A data set from the Hub, with the settings of the R-Drop paper for translation, on the dropout of the model alone:

    accelerate launch recipes/translation.py --config recipes/configs/translation.yaml \\
        --dataset_name Helsinki-NLP/opus_books --dataset_config_name de-en --source_column en --target_column de \\
        --attn_implementation sdpa --consistency_weight 2.5 --label_smoothing_factor 0.1 --output_dir runs/books

`--consistency_weight 0.5` adds the consistency term, which takes two passes. `--help` lists all arguments.
"""

import sys


try:
    import shared

    shared.check_installed("babel", "sacrebleu", "tokenizers")
except ModuleNotFoundError:
    print(f"{__file__}: error: the folder `shared` must be next to this file: copy it too.", file=sys.stderr)
    sys.exit(2)

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import sacrebleu
from datasets import Dataset, DatasetDict
from shared.arguments import ModelArguments, RunArguments, check_at_least_one
from shared.checkpoints import accept_saved_weights
from shared.cldr import CLDR, cldr_pairs
from shared.data import draw_training_rows, sample_counts
from shared.evaluation import LastEvaluation, evaluate_on_test, final_evaluation, measure_attention
from shared.model import from_scratch, load_pretrained, load_processor
from shared.output import check_output_dir, finish
from shared.parser import RecipeParser
from shared.running import owning_output_dir
from shared.text import check_tokens, texts_at_limit
from shared.training import train
from shared.translations import TranslationDataArguments, load_pairs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    MarianConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_attentiondrop import apply_dropconnect
from hf_attentiondrop.evaluation.pretrained import longest_text
from hf_attentiondrop.training.arguments import AttentionDropSeq2SeqTrainingArguments
from hf_attentiondrop.training.trainer import AttentionDropSeq2SeqTrainer


PAD, EOS = "<pad>", "</s>"
SCORES = {"bleu": "BLEU", "chrf": "chrF"}
# Ignored by the loss.
IGNORED_LABEL = -100


@dataclass
class TranslationModelArguments(ModelArguments):
    source_prefix: str = field(
        default="", metadata={"help": "Prefix of each source, such as '>>fra<< ' for a multilingual Marian."}
    )
    max_length: int = field(
        default=128,
        metadata={
            "help": "Maximum tokens per text; longer ones are truncated. The default is capped at the model's limit."
        },
    )
    vocab_size: int = field(default=2000, metadata={"help": "From scratch: size of the vocabulary of both languages."})
    d_model: int = field(default=64, metadata={"help": "From scratch: width of the model."})
    num_layers: int = field(default=2, metadata={"help": "From scratch: layers of the encoder and of the decoder."})
    num_attention_heads: int = field(default=4, metadata={"help": "From scratch: number of attention heads."})


@dataclass
class TranslationTrainingArguments(RunArguments, AttentionDropSeq2SeqTrainingArguments):
    output_dir: str = field(default="runs/translation", metadata={"help": "Output folder."})
    predict_with_generate: bool = field(
        default=True, metadata={"help": "Evaluate by translating; false evaluates the loss only."}
    )
    eval_strategy: str = field(default="no", metadata={"help": "When to evaluate during training, which is slow."})

    def __post_init__(self) -> None:
        check_at_least_one(self, "generation_num_beams", "generation_max_length")
        super().__post_init__()


def defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Defaults that depend on other arguments: training from scratch needs others than fine-tuning."""
    if values["model_name_or_path"]:
        return {}
    is_cldr = not values["dataset_name"] and not values["train_file"]
    return {
        "dropout": 0.0,
        "learning_rate": 4e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 128,
        **({"validation_fraction": 0.1, "max_length": 40} if is_cldr else {}),
    }


def load_tokenizer(
    arguments: TranslationModelArguments, dataset: Dataset, columns: tuple[str, str]
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of the model, or trains one on the texts of both languages."""
    if arguments.model_name_or_path:
        return load_processor(AutoTokenizer, arguments)
    tokenizer = Tokenizer(models.BPE())
    # Digit by digit, so that unseen numbers consist of known tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain.from_iterable(dataset[column] for column in columns), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, model_max_length=arguments.max_length
    )


def load_model(
    arguments: TranslationModelArguments, attention: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Builds the model, from a checkpoint or from scratch."""
    if arguments.model_name_or_path:
        return load_pretrained(AutoModelForSeq2SeqLM, arguments, **attention)
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=arguments.d_model,
        encoder_layers=arguments.num_layers,
        decoder_layers=arguments.num_layers,
        encoder_attention_heads=arguments.num_attention_heads,
        decoder_attention_heads=arguments.num_attention_heads,
        encoder_ffn_dim=4 * arguments.d_model,
        decoder_ffn_dim=4 * arguments.d_model,
        # Positions are sinusoidal, so more of them add no parameters.
        max_position_embeddings=max(512, arguments.max_length),
        scale_embedding=True,
        # Marian's 0.02 is for a width of 512 or more; a narrow model learns slowly from weights that small.
        init_std=arguments.d_model**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        # Every Marian starts decoding from the padding token.
        decoder_start_token_id=tokenizer.pad_token_id,
        **attention,
    )
    return from_scratch(AutoModelForSeq2SeqLM, arguments, config)


def tokenize(
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    model_arguments: TranslationModelArguments,
    data_arguments: TranslationDataArguments,
) -> DatasetDict:
    """Tokenizes sources to `input_ids` and targets to `labels`; batches are padded later."""
    options = {"truncation": True, "max_length": model_arguments.max_length}

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        sources = [model_arguments.source_prefix + text for text in rows[data_arguments.source_column]]
        labels = tokenizer(text_target=rows[data_arguments.target_column], **options)["input_ids"]
        return {**tokenizer(sources, **options), "labels": labels}

    return data.map(encode, batched=True, remove_columns=data["train"].column_names, desc="Tokenizing")


def decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decodes token ids `(B, length)`, which the Trainer pads with the ignored label."""
    ids = np.where(ids == IGNORED_LABEL, tokenizer.pad_token_id, ids)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def scores(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU and chrF of sacrebleu, 0 to 100."""
    return {
        "bleu": sacrebleu.corpus_bleu(list(translations), [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(list(translations), [list(references)]).score,
    }


def scores_of_prediction(prediction: EvalPrediction, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    return scores(decode(prediction.predictions, tokenizer), decode(prediction.label_ids, tokenizer))


def main(argv: Sequence[str] | None = None) -> None:
    parser = RecipeParser(__doc__, (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments))
    model_args, data_args, training_args, attention = parser.parse(argv, defaults)

    last_evaluation = LastEvaluation()
    # Nothing is written before all checks have passed.
    with parser.preparing():
        check_output_dir(training_args)
        set_seed(training_args.seed)
        with training_args.main_process_first():
            data = draw_training_rows(load_pairs(data_args, cldr_pairs), data_args, training_args.seed)
            tokenizer = load_tokenizer(model_args, data["train"], (data_args.source_column, data_args.target_column))
        model = load_model(model_args, attention, tokenizer)
        parser.cap(model_args, "max_length", longest_text(model))
        training_args.generation_max_length = training_args.generation_max_length or model_args.max_length
        with training_args.main_process_first():
            tokenized = tokenize(data, tokenizer, model_args, data_args)
        check_tokens(tokenized, model, ("input_ids", "labels"))
        # BLEU and chrF compare with targets that are cut, too.
        parser.note(texts_at_limit(tokenized, model_args.max_length, ("input_ids", "labels")))
        accept_saved_weights(model)
        apply_dropconnect(model, model_args.dropconnect)
        trainer = AttentionDropSeq2SeqTrainer(
            model=model,
            args=training_args,
            train_dataset=tokenized["train"],
            eval_dataset=tokenized["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            callbacks=[last_evaluation],
            compute_metrics=partial(scores_of_prediction, tokenizer=tokenizer)
            if training_args.predict_with_generate
            else None,
        )

    baseline = scores(data["validation"][data_args.source_column], data["validation"][data_args.target_column])
    metrics: dict[str, Any] = sample_counts(data) | {f"copy_{name}": value for name, value in baseline.items()}
    results = {"data": data_args.dataset_name or data_args.train_file or CLDR}
    attention_weights = None
    with owning_output_dir(parser, training_args) as checkpoint:
        if training_args.do_train:
            train_metrics, train_results = train(trainer, checkpoint)
            metrics |= train_metrics
            results |= train_results
        if training_args.do_eval:
            metrics |= final_evaluation(trainer, last_evaluation)
            attention_weights = measure_attention(trainer)
            if training_args.predict_with_generate:
                for name, title in SCORES.items():
                    results[title] = f"{metrics[f'eval_{name}']:.1f} (copying the source: {baseline[name]:.1f})"
            results["evaluated on"] = f"{len(data['validation'])} held-out texts"
        if "test" in data and training_args.do_predict:
            metrics |= evaluate_on_test(trainer, tokenized["test"])

        finish(trainer, parser, "Translation", CLDR, metrics, results, attention=attention_weights)


if __name__ == "__main__":
    main()
