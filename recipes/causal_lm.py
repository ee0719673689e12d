"""Trains a language model with AttentionDrop and, optionally, the consistency term.

Without arguments, it trains a small LLaMA from scratch on Python's documentation:

    accelerate launch recipes/causal_lm.py

LoRA on a pretrained model with your own texts (csv, tsv, json, jsonl, parquet, or txt with empty lines between texts):

    accelerate launch recipes/causal_lm.py --config recipes/configs/causal_lm_lora.yaml \\
        --train_file notes.txt --output_dir runs/notes

All weights of a pretrained model, on a data set from the Hub:

    accelerate launch recipes/causal_lm.py --config recipes/configs/causal_lm.yaml \\
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --output_dir runs/wikitext

Attention with a learned scale, sink or gate, from scratch as in its paper, without AttentionDrop:

    accelerate launch recipes/causal_lm.py --attn_implementation affine_scaled \\
        --attention_reweighting '{init: paper}' --output_dir runs/affine_scaled

`--consistency_weight 0.5` adds the consistency term, which takes two passes. `--help` lists all arguments.
"""

import sys


try:
    import shared

    shared.check_installed("peft")
except ModuleNotFoundError:
    print(f"{__file__}: error: the folder `shared` must be next to this file: copy it too.", file=sys.stderr)
    sys.exit(2)

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from shared.arguments import ModelArguments, RunArguments
from shared.checkpoints import accept_saved_weights
from shared.data import check_columns, draw_training_rows, hold_out, sample_counts
from shared.documentation import DOCUMENTATION, documentation_text
from shared.evaluation import LastEvaluation, evaluate_on_test, final_evaluation, measure_attention
from shared.lora import LoraArguments, add_adapters, check_base
from shared.model import from_scratch, load_pretrained, load_processor
from shared.output import check_output_dir, finish
from shared.parser import RecipeParser
from shared.running import owning_output_dir
from shared.text import FileArguments, check_text, check_tokens, load_text_data
from shared.training import train
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    GPT2Tokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_attentiondrop import AttentionDropTrainer, AttentionDropTrainingArguments, apply_dropconnect
from hf_attentiondrop.evaluation.calibration import calibration_metrics
from hf_attentiondrop.evaluation.items import ItemScores, score_items
from hf_attentiondrop.evaluation.pretrained import longest_text


NO_LABEL = -100


@dataclass
class LanguageModelArguments(ModelArguments):
    vocab_size: int = field(default=2048, metadata={"help": "From scratch: size of the vocabulary."})
    hidden_size: int = field(default=96, metadata={"help": "From scratch: width of the model."})
    num_hidden_layers: int = field(default=3, metadata={"help": "From scratch: number of layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "From scratch: number of attention heads."})
    num_key_value_heads: int = field(default=2, metadata={"help": "From scratch: number of key and value heads."})


@dataclass
class TextDataArguments(FileArguments):
    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    block_size: int = field(
        default=512,
        metadata={
            "help": "Tokens per sample, into which texts are packed; the default is capped at the model's limit."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise ValueError(f"--block_size: expected at least 2, got {self.block_size}: a token predicts the next.")


@dataclass
class LanguageModelTrainingArguments(RunArguments, AttentionDropTrainingArguments):
    output_dir: str = field(default="runs/causal_lm", metadata={"help": "Output folder."})


def defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Defaults that depend on other arguments: training from scratch needs others than fine-tuning."""
    if values["model_name_or_path"]:
        return {"learning_rate": 2e-4} if values["use_peft"] else {}
    return {
        "block_size": 128,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.1,
        "num_train_epochs": 4.0,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 32,
    }


def load_data(arguments: TextDataArguments) -> DatasetDict:
    """Loads and checks the texts, and holds some out for evaluation."""
    data = load_text_data(arguments, documentation_text)
    check_columns(data, {"--text_column": arguments.text_column})
    check_text(data, "--text_column", arguments.text_column)
    return hold_out(data, arguments)


def load_tokenizer(arguments: LanguageModelArguments, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of the model, or trains one on the texts."""
    if not arguments.model_name_or_path:
        return GPT2Tokenizer().train_new_from_iterator(texts, arguments.vocab_size, show_progress=False)
    tokenizer = load_processor(AutoTokenizer, arguments)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"--model_name_or_path: the tokenizer of {arguments.model_name_or_path} has no token for the end of a "
            "text, so packed texts could not be separated. Use a language model, or set its eos_token."
        )
    return tokenizer


def pack(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, arguments: TextDataArguments) -> DatasetDict:
    """Concatenates the texts, with the end-of-text token after each, and cuts them into blocks of `block_size` tokens.

    Attention and positions cross text boundaries within a block. The last block of every thousand texts is shorter.
    """

    def blocks(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(rows[arguments.text_column], verbose=False)["input_ids"]
        tokens = [token for text in encoded for token in (*text, tokenizer.eos_token_id)]
        starts = range(0, len(tokens) - 1, arguments.block_size)  # a block of one token has nothing to predict
        return {"input_ids": [tokens[start : start + arguments.block_size] for start in starts]}

    return data.map(blocks, batched=True, remove_columns=data["train"].column_names, desc="Packing")


def load_model(
    arguments: LanguageModelArguments,
    attention: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
) -> PreTrainedModel:
    """Builds the model, from a checkpoint or from scratch."""
    if arguments.model_name_or_path:
        return load_pretrained(AutoModelForCausalLM, arguments, **attention)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=block_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        num_key_value_heads=arguments.num_key_value_heads,
        intermediate_size=3 * arguments.hidden_size,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **attention,
    )
    return from_scratch(AutoModelForCausalLM, arguments, config)


def collate(examples: list[dict[str, list[int]]], padding: int) -> dict[str, Tensor]:
    """Builds a batch: `input_ids`, `attention_mask` and `labels`, each `(B, L)`; padding has no label."""
    blocks = [torch.tensor(example["input_ids"]) for example in examples]
    return {
        "input_ids": pad_sequence(blocks, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(block) for block in blocks], batch_first=True),
        "labels": pad_sequence(blocks, batch_first=True, padding_value=NO_LABEL),
    }


def token_scores(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> dict[str, Tensor]:
    """Loss and confidence of each token except the first, `(B, L - 1)`, kept instead of the logits `(B, L, V)`."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return vars(score_items(logits[:, :-1], labels[:, 1:]))


def language_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Perplexity (the exponential of the mean loss over all predicted tokens) and calibration."""
    calibration = calibration_metrics(ItemScores(**prediction.predictions))
    return {"perplexity": math.exp(calibration.pop("negative_log_likelihood")), **calibration}


def unigram_perplexity(packed: DatasetDict, vocab_size: int) -> float:
    """The perplexity of a unigram model of the training data, with add-one smoothing, on the held-out tokens."""
    counts = np.bincount(np.concatenate(packed["train"]["input_ids"]), minlength=vocab_size) + 1
    predicted = np.concatenate([block[1:] for block in packed["validation"]["input_ids"]])
    return float(np.exp(-np.log(counts / counts.sum())[predicted].mean()))


def main(argv: Sequence[str] | None = None) -> None:
    types = (LanguageModelArguments, LoraArguments, TextDataArguments, LanguageModelTrainingArguments)
    parser = RecipeParser(__doc__, types)
    model_args, lora_args, data_args, training_args, attention = parser.parse(argv, defaults)

    last_evaluation = LastEvaluation()
    # Nothing is written before all checks have passed.
    with parser.preparing():
        check_output_dir(training_args)
        if lora_args.use_peft:
            check_base(model_args, attention)
        set_seed(training_args.seed)
        with training_args.main_process_first():
            data = draw_training_rows(load_data(data_args), data_args, training_args.seed)
            tokenizer = load_tokenizer(model_args, data["train"][data_args.text_column])
        model = load_model(model_args, attention, tokenizer, data_args.block_size)
        parser.cap(data_args, "block_size", longest_text(model))
        with training_args.main_process_first():
            packed = pack(data, tokenizer, data_args)
        check_tokens(packed, model)
        if lora_args.use_peft:
            model = add_adapters(model, lora_args)
        else:
            accept_saved_weights(model)
        apply_dropconnect(model, model_args.dropconnect)
        trainer = AttentionDropTrainer(
            model=model,
            args=training_args,
            train_dataset=packed["train"],
            eval_dataset=packed["validation"],
            processing_class=tokenizer,
            data_collator=partial(collate, padding=tokenizer.eos_token_id),
            preprocess_logits_for_metrics=token_scores,
            callbacks=[last_evaluation],
            compute_metrics=language_metrics,
        )

    baseline = unigram_perplexity(packed, len(tokenizer))
    eval_tokens = sum(map(len, packed["validation"]["input_ids"])) - len(packed["validation"])
    metrics: dict[str, Any] = {
        **sample_counts(packed),
        "eval_tokens": eval_tokens,
        "unigram_perplexity": baseline,
    }
    results = {"data": data_args.dataset_name or data_args.train_file or DOCUMENTATION}
    attention_weights = None
    with owning_output_dir(parser, training_args) as checkpoint:
        if training_args.do_train:
            train_metrics, train_results = train(trainer, checkpoint)
            metrics |= train_metrics
            results |= train_results
        if training_args.do_eval:
            metrics |= final_evaluation(trainer, last_evaluation)
            attention_weights = measure_attention(trainer)
            results["perplexity"] = (
                f"{metrics['eval_perplexity']:.2f} (frequencies of the tokens alone: {baseline:.2f})"
            )
            results["evaluated on"] = f"{eval_tokens} held-out tokens"
        if "test" in data and training_args.do_predict:
            metrics |= evaluate_on_test(trainer, packed["test"])

        finish(trainer, parser, "Language modeling", DOCUMENTATION, metrics, results, attention=attention_weights)


if __name__ == "__main__":
    main()
