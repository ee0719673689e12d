"""The language modeling recipe on files of every type, with LoRA, and without arguments."""

import csv
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer, PreTrainedModel

from hf_attentiondrop import AttentionDropConfig
from hf_attentiondrop.methods import LEARNED_METHODS

from .recipe_runs import NO_EVALUATION, RECIPES, error_line, load, run_program


pytestmark = pytest.mark.xdist_group("causal_lm")
# Without the consistency term, which most tests do not need, steps are cheaper.
FINE_TUNING = ["--max_steps", "2", "--max_eval_samples", "8", "--consistency_weight", "0"]
QUICK = ["--num_hidden_layers", "1", *FINE_TUNING]
TEXTS = [f"The {adjective} {noun},\nso they say." for adjective in ("red", "old", "new") for noun in "abcdefgh"]
SUFFIXES = ["csv", "tsv", "json", "jsonl", "parquet", "txt"]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return load("causal_lm", monkeypatch)


@pytest.fixture
def checkpoint(short_run: Callable[[str], Path]) -> Path:
    """A small LLaMA with its tokenizer, saved by the recipe."""
    return short_run("causal_lm")


def write(path: Path, texts: list[str]) -> Path:
    """Writes texts, in the column `body` if the format has columns."""
    rows = [{"body": text, "number": number} for number, text in enumerate(texts)]
    if path.suffix == ".txt":
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def perplexity_by_hand(model: PreTrainedModel, blocks: list[list[int]]) -> float:
    """Computed block by block, without padding."""
    losses = []
    for block in blocks:
        ids = torch.tensor([block])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        losses += cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").tolist()
    return math.exp(sum(losses) / len(losses))


@pytest.mark.slow
def test_shortened_run_without_data_learns(tmp_path: Path) -> None:
    """A quarter of the run without arguments is already below its baseline, even with a single pass."""
    flags = ["--num_train_epochs", "1", "--consistency_weight", "0"]
    printed = run_program("causal_lm", tmp_path, *flags)
    folder = tmp_path / "runs" / "causal_lm"
    metrics = read(folder, "metrics.json")
    assert metrics["eval_perplexity"] < 0.8 * metrics["unigram_perplexity"]
    assert (
        f"{metrics['eval_perplexity']:.2f} (frequencies of the tokens alone: {metrics['unigram_perplexity']:.2f})"
        in printed
    )
    config = read(folder, "config.json")
    assert config["model_type"] == "llama" and config["num_key_value_heads"] < config["num_attention_heads"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_local_files(recipe: ModuleType, tmp_path: Path, suffix: str) -> None:
    files = [
        write(tmp_path / f"{name}.{suffix}", TEXTS[part]) for name, part in (("a", slice(20)), ("b", slice(20, 24)))
    ]
    column = "text" if suffix == "txt" else "body"
    arguments = recipe.TextDataArguments(
        train_file=str(files[0]), validation_file=str(files[1]), text_column=column, block_size=32
    )
    data = recipe.load_data(arguments)
    assert [text.strip() for text in data["train"][column]] == TEXTS[:20]
    assert [text.strip() for text in data["validation"][column]] == TEXTS[20:]

    # From here on the formats do not differ.
    if suffix == "txt":
        flags = ["--train_file", str(files[0]), "--text_column", column, "--block_size", "32"]
        recipe.main([*flags, *QUICK, "--output_dir", str(tmp_path / "out")])
        assert read(tmp_path / "out", "metrics.json")["eval_tokens"] > 0


def test_blocks_hold_every_token_in_order(recipe: ModuleType) -> None:
    tokenizer = recipe.load_tokenizer(recipe.LanguageModelArguments(vocab_size=300), TEXTS)
    data = DatasetDict(train=Dataset.from_dict({"text": TEXTS}), validation=Dataset.from_dict({"text": TEXTS[:1]}))
    packed = recipe.pack(data, tokenizer, recipe.TextDataArguments(block_size=16))
    blocks = packed["train"]["input_ids"][:]
    assert {len(block) for block in blocks[:-1]} == {16}
    decoded = tokenizer.decode([token for block in blocks for token in block])
    assert decoded == "".join(text + tokenizer.eos_token for text in TEXTS)


def test_reported_perplexities_are_those_of_the_saved_model(recipe: ModuleType, checkpoint: Path) -> None:
    metrics = read(checkpoint, "metrics.json")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    data = recipe.load_data(recipe.TextDataArguments(max_train_samples=200, max_eval_samples=24))
    packed = recipe.pack(data, tokenizer, recipe.TextDataArguments(block_size=128))
    blocks = packed["validation"]["input_ids"][:]
    # Blocks of unequal length, so that a mean of means would differ.
    assert len({len(block) for block in blocks}) > 1
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert metrics["eval_perplexity"] == pytest.approx(perplexity_by_hand(model, blocks), rel=1e-4)

    counts = Counter(token for block in packed["train"]["input_ids"] for token in block)
    total = counts.total() + len(tokenizer)
    losses = [-math.log((counts[token] + 1) / total) for block in blocks for token in block[1:]]
    assert metrics["eval_tokens"] == len(losses)
    assert metrics["unigram_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)))


def test_padding_is_not_learned(recipe: ModuleType) -> None:
    batch = recipe.collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 2]}], padding=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    # The end of a text is learned, although the same token pads.
    assert batch["labels"].tolist() == [[5, 6, 7], [8, 2, -100]]


def test_lora_trains_adapters_alone_and_loads_again(
    recipe: ModuleType, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "train.txt", TEXTS)
    data = ["--train_file", str(file), "--block_size", "16", "--max_eval_samples", "5"]
    flags = ["--model_name_or_path", str(checkpoint), *data, "--use_peft", "--lora_r", "4", "--learning_rate", "0.05"]
    recipe.main([*flags, "--max_steps", "10", "--output_dir", str(tmp_path / "lora")])
    assert "hard p=0.1 k=5 fill=mask; 1 of 1 modules, 10 passes" in capsys.readouterr().out
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    assert {min(weight.shape) for weight in weights.values()} == {4}
    assert not (tmp_path / "lora" / "model.safetensors").exists()

    metrics = read(tmp_path / "lora", "metrics.json")
    arguments = recipe.TextDataArguments(train_file=str(file), block_size=16, max_eval_samples=5)
    packed = recipe.pack(recipe.load_data(arguments), AutoTokenizer.from_pretrained(tmp_path / "lora"), arguments)
    blocks = packed["validation"]["input_ids"][:]
    adapted, base = (
        perplexity_by_hand(model, blocks)
        for model in (
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora"),
            AutoModelForCausalLM.from_pretrained(checkpoint),
        )
    )
    assert metrics["eval_perplexity"] == pytest.approx(adapted, rel=1e-4)
    assert adapted < 0.9 * base

    # The recipe also loads the folder as a model.
    flags = ["--model_name_or_path", str(tmp_path / "lora"), "--do_train", "false", *data]
    recipe.main([*flags, "--output_dir", str(tmp_path / "evaluation")])
    assert read(tmp_path / "evaluation", "metrics.json")["eval_perplexity"] == pytest.approx(adapted, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("affine_scaled", {"init": "paper", "gate": True}),
        ("affine_scaled", {}),
        ("attention_sink", {"init": -2.0}),
        ("gated_attention", {"init": "paper"}),
    ],
)
def test_learned_attention_is_trained_and_loads_again(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, values: dict[str, Any]
) -> None:
    flags = ["--attn_implementation", method] + (["--attention_reweighting", json.dumps(values)] if values else [])
    recipe.main([*QUICK, *flags, "--max_train_samples", "200", "--output_dir", str(tmp_path)])
    assert f"{method} in 1 of 1 modules\n" in capsys.readouterr().out
    config = read(tmp_path, "config.json")
    assert config["attention_reweighting"] == LEARNED_METHODS[method](**values).to_dict()
    assert "attention_drop" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    started = AutoModelForCausalLM.from_config(model.config)
    learned = {name: weight for name, weight in model.named_parameters() if "reweighting" in name}
    assert learned and not any(torch.equal(weight, started.get_parameter(name)) for name, weight in learned.items())
    arguments = recipe.TextDataArguments(max_train_samples=200, max_eval_samples=8, block_size=128)
    packed = recipe.pack(recipe.load_data(arguments), AutoTokenizer.from_pretrained(tmp_path), arguments)
    perplexity = perplexity_by_hand(model, packed["validation"]["input_ids"][:])
    assert perplexity == pytest.approx(read(tmp_path, "metrics.json")["eval_perplexity"], rel=1e-4)


def test_attentiondrop_flags_combine_with_learned_attention(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--attn_implementation", "affine_scaled", "--variant", "blur", "--width", "3"]
    recipe.main([*QUICK, *flags, *NO_EVALUATION, "--output_dir", str(tmp_path)])
    summary = "affine_scaled in 1 of 1 modules, blur sigma_max=1.0 width=3; 1 of 1 modules, 2 passes"
    assert summary in capsys.readouterr().out
    assert read(tmp_path, "config.json")["attention_drop"] == AttentionDropConfig(variant="blur", width=3).to_dict()


def test_lora_trains_learned_attention(recipe: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="affine_scaled").save_pretrained(base)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(base)
    flags = ["--use_peft", "--attn_implementation", "affine_scaled", "--max_train_samples", "200"]
    flags += ["--model_name_or_path", str(base), "--block_size", "64"]
    recipe.main([*FINE_TUNING, *flags, *NO_EVALUATION, "--output_dir", str(tmp_path / "lora")])
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    trained = {name: weight for name, weight in weights.items() if name.endswith("reweighting.weight")}
    assert len(trained) == 1 and all(weight.any() for weight in trained.values())
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    loaded = [module.weight for name, module in model.named_modules() if name.endswith("modules_to_save.default")]
    assert [weight.tolist() for weight in loaded] == [weight.tolist() for weight in trained.values()]


def test_the_lora_preset_drops_columns_of_keys_and_keeps_two_passes_consistent(
    recipe: ModuleType, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "train.txt", TEXTS)
    flags = ["--config", str(RECIPES / "configs" / "causal_lm_lora.yaml"), "--model_name_or_path", str(checkpoint)]
    flags += ["--train_file", str(file), *"--block_size 16 --max_steps 2 --gradient_accumulation_steps 1".split()]
    recipe.main([*flags, "--output_dir", str(tmp_path / "lora")])
    assert "dropkey p=0.1 axis=column; 1 of 1 modules, 2 passes" in capsys.readouterr().out
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in weights} == {"q_proj", "v_proj"}
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "### DropKey" in card and "### Consistency between two passes" in card and "library_name: peft" in card
    # The settings of the adapter in the file do not stand in the way of training without it.
    recipe.main([*flags, "--use_peft", "false", "--output_dir", str(tmp_path / "whole")])
    assert (tmp_path / "whole" / "model.safetensors").exists()


def test_adapters_of_all_linear_layers(recipe: ModuleType, checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted = recipe.add_adapters(model, recipe.LoraArguments(use_peft=True, lora_target_modules=["all-linear"]))
    names = {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert names == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def test_resumed_lora_run_equals_uninterrupted_run(recipe: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "train.txt", TEXTS)
    flags = ["--model_name_or_path", checkpoint, "--train_file", file, "--block_size", "16", "--use_peft"]
    # Four steps are one epoch, so the run resumes within it.
    flags += "--per_device_train_batch_size 4 --max_steps 4 --save_strategy steps --save_steps 2".split()
    flags += ["--save_total_limit", "9", "--dropconnect", "0.1", *NO_EVALUATION]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    recipe.main([*map(str, flags), "--output_dir", str(whole)])
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    recipe.main([*map(str, flags), "--output_dir", str(resumed), "--resume_from_checkpoint"])
    expected, actual = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert read(whole, "metrics.json")["dropconnect"] == 0.1
    assert any(weight.any() for name, weight in expected.items() if "lora_B" in name)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_bad_input_ends_in_one_line(
    recipe: ModuleType, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.csv", TEXTS)
    single = write(tmp_path / "single.txt", TEXTS[:1])
    no_end = shutil.copytree(checkpoint, tmp_path / "no_end")
    BertTokenizer().train_new_from_iterator(TEXTS, 100, show_progress=False).save_pretrained(no_end)
    model = ["--model_name_or_path", checkpoint]
    cases = [
        (["--use_peft"], "add --model_name_or_path"),
        ([*model, "--lora_r", "4"], "--lora_r would have no effect without --use_peft"),
        ([*model, "--use_peft", "--lora_target_modules", "query", "--block_size", "64"], "query"),
        (
            [*model, "--use_peft", "--attn_implementation", "affine_scaled", "--block_size", "64"],
            "Save a base that has them first",
        ),
        (["--attention_reweighting", "{gate: true}"], "attentiondrop, which has no learned parameters"),
        (
            ["--attn_implementation", "attention_sink", "--attention_reweighting", "{gate: true}"],
            "Unknown key 'gate' in `attention_reweighting`",
        ),
        (["--attn_implementation", "affine_scaled", "--attention_reweighting", "paper"], "must be a YAML mapping"),
        (["--attn_implementation", "affine_scaled", "--attention_reweighting", "{init: papr}"], "must be one of"),
        ([*model, "--use_peft", "--lora_r", "0", "--block_size", "64"], "`r` should be a positive integer"),
        ([*model, "--block_size", "129"], "--block_size: the model takes 128 tokens, got 129"),
        (["--model_name_or_path", no_end], "has no token for the end of a text"),
        (["--train_file", train], "--text_column: the train data has no column 'text'; its columns are body"),
        (["--train_file", train, "--text_column", "number"], "--text_column: expected text in 'number'"),
        (["--train_file", single], "train"),
    ]
    for flags, message in cases:
        assert message in error_line(recipe, capfd, *flags, "--output_dir", tmp_path / "out"), flags
        assert not (tmp_path / "out").exists()
