"""`evaluate` writes a report, or one line about invalid input and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Tokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from .commands import config_folder, failure, printed


NAMES = ("zero", "one", "two")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of digits in one folder per class; alphabetical order differs from the class numbers of the model."""
    folder, bunch = tmp_path_factory.mktemp("digits"), load_digits(n_class=3)
    for number in range(24):
        path = folder / NAMES[bunch.target[number]] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((bunch.images[number] * (255 / 16)).astype("uint8")).save(path)
    return folder


@pytest.fixture(scope="module", params=["attentiondrop", "affine_scaled"])
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT for these digits, with its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=32,
        initializer_range=0.5,
        id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
    )
    config.attention_drop = {"p": 0.2}
    model = ViTForImageClassification._from_config(config, attn_implementation=request.param)
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def test_evaluate_writes_a_report(
    classifier: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--evaluate_robustness", "--robustness_samples", 5, "--robustness_epsilon", 4 / 255, "--batch_size", 7]
    output = printed(capsys, "evaluate", classifier, "--data", digits, "--output_dir", tmp_path / "report", *flags)
    card = (tmp_path / "report" / "README.md").read_text()
    assert f"\n{digits.name}\n" in card
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    baseline = max(len(list(folder.iterdir())) for folder in digits.iterdir()) / 24
    assert f" {metrics['eval_accuracy']:.4f} (always the most frequent class: {baseline:.4f})\n" in output
    assert "under PGD-20" in output and "Most frequent class" in card
    assert metrics["robustness"]["attacks"][-1]["epsilon"] == pytest.approx(4 / 255)

    model = ViTForImageClassification.from_pretrained(classifier).eval()
    processor = ViTImageProcessorPil.from_pretrained(classifier)
    right = 0
    for path in digits.glob("*/*.png"):
        inputs = processor(Image.open(path).convert("RGB"), return_tensors="pt")
        right += model.config.id2label[model(**inputs).logits.argmax().item()] == path.parent.name
    assert (metrics["eval_accuracy"], metrics["eval_samples"]) == (right / 24, 24)
    assert metrics["robustness"]["samples"] == 5

    for picture in ("reliability", "robustness", "attention_entropy", "attention_maps"):
        assert f"(plots/{picture}.png)" in card and (tmp_path / "report" / "plots" / f"{picture}.png").exists()
    assert "| `p` | 0.2 |" in card
    assert str(tmp_path) not in card and f'"path/to/{classifier.name}"' in card


def test_the_card_names_data_and_sample_counts(
    classifier: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max_samples", 20, "--output_dir", tmp_path]
    printed(capsys, "evaluate", classifier, "--data", digits, *flags)
    card = (tmp_path / "README.md").read_text()
    assert f"\n{digits.name}, a random subset of 20 samples\n" in card
    assert "Means over queries, heads and layers, on 20 samples.\n" in card


def test_evaluate_takes_pairs_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["a red house", "an old tree", "a new red tree", "an old house"]
    tokenizer = BertTokenizer().train_new_from_iterator(texts, 60, show_progress=False)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=64,
        max_position_embeddings=6,  # shorter than the longest pair
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = ["first,second,class", *(f"{text},{text},{number % 2}" for number, text in enumerate(texts))]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    flags = ["--text_column", "first", "--text_pair_column", "second", "--label_column", "class"]
    data = ["--data", tmp_path / "pairs.csv", "--output_dir", tmp_path / "report"]
    assert "samples            4\n" in printed(capsys, "evaluate", tmp_path / "model", *data, *flags)

    for contents, message in (
        ("first,class\n,1\na,0\n", "--text_column: row 0 of 'first', counted from 0: expected a text, got None"),
        (
            "first,class\nNone,1\na,\n",
            "--label_column: 'class' has samples without a label, as test splits often do, ",
        ),
        ("", "pairs.csv' cannot be loaded: it has no rows"),
    ):
        (tmp_path / "pairs.csv").write_text(contents)
        arguments = ["--data", tmp_path / "pairs.csv", "--output_dir", tmp_path / "none", *flags[:2], *flags[4:]]
        code, line = failure(capsys, "evaluate", tmp_path / "model", *arguments)
        assert code == 2 and message in line and not (tmp_path / "none").exists()
    code, line = failure(capsys, "evaluate", tmp_path / "model", *arguments, "--image_column", "picture")
    assert code == 2 and "--image_column: the model classifies texts, and would ignore 'picture'." in line


def test_evaluate_takes_a_decoder_without_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["a red house", "an old tree", "a new red tree", "tree"]
    config = GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=300, n_positions=3)  # shorter than the texts
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, 300, show_progress=False)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts)))
    data = ["--data", tmp_path / "texts.csv", "--output_dir", tmp_path / "report", "--max_samples", 3]
    output = printed(capsys, "evaluate", tmp_path / "model", *data, "--evaluate_robustness")
    assert "samples            3\n" in output and "under PGD-20" in output


def test_evaluate_refuses_to_attack_an_encoder_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = BartConfig(**layers, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=60)
    BartForSequenceClassification(config).save_pretrained(tmp_path / "model")
    texts = ["a red house", "an old tree"]
    BertTokenizer(eos_token="[SEP]").train_new_from_iterator(texts, 60, show_progress=False).save_pretrained(
        tmp_path / "model"
    )
    capsys.readouterr()  # discards the progress bar
    arguments = [tmp_path / "model", "--data", tmp_path / "none.csv", "--output_dir", tmp_path / "report"]
    code, line = failure(capsys, "evaluate", *arguments, "--evaluate_robustness")
    assert code == 2 and "--evaluate_robustness: expected a classifier that takes embeddings" in line
    assert "--data" in failure(capsys, "evaluate", *arguments)[1]
    assert not (tmp_path / "report").exists()


def test_evaluate_refuses_bad_input(
    classifier: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "data.xlsx").touch()
    (tmp_path / "others" / "nine").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "others" / "nine" / "0.png")
    for name in NAMES:
        (tmp_path / "broken" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "broken" / name / "0.png")
    (tmp_path / "broken" / "two" / "1.png").write_bytes(b"no image")
    base = config_folder(tmp_path / "base", BertConfig().to_dict())
    unlabelled = tmp_path / "unlabelled.parquet"
    features = Features({"image": Value("string"), "label": ClassLabel(names=list(NAMES))})
    Dataset.from_dict({"image": ["a"], "label": [-1]}, features=features).to_parquet(unlabelled)
    capsys.readouterr()  # discards the progress bar
    report, good = ["--output_dir", tmp_path / "report"], ["--data", digits]
    cases = [
        ([classifier, *good, "--output_dir", tmp_path / "full"], "--output_dir: expected an empty folder"),
        ([base, *good, *report], "expected a classifier of images or texts"),
        ([tmp_path / "nothing", *good, *report], f"there is nothing at '{tmp_path}/nothing'"),
        (["nobody/nothing", *good, *report], "MODEL: expected a folder with a saved classifier, or a classifier on"),
        ([classifier / "config.json", *good, *report], "Name its folder"),
        ([classifier, "--data", tmp_path / "data.xlsx", *report], "--data: expected a file of one of csv"),
        (
            [classifier, "--data", tmp_path / "none", *report],
            "--data: expected a folder, a file, or a data set on the",
        ),
        ([classifier, "--data", "", *report], "--data: expected a folder, a file, or a data set on the Hub, got noth"),
        ([classifier, *good, *report, "--config", "small"], "'small' would be ignored"),
        ([classifier, *good, *report, "--text_column", "text"], "--text_column: the model classifies images, and wou"),
        ([classifier, *good, *report, "--text_pair_column", "b"], "--text_pair_column: the model classifies images"),
        ([classifier, *good, *report, "--robustness_samples", 9], "nothing is attacked without --evaluate_robustness"),
        ([classifier, *good, *report, "--robustness_epsilon", 1], "nothing is attacked without --evaluate_robustness"),
        ([classifier, *good, "--output_dir", ""], "--output_dir: expected a folder for the report, got nothing"),
        (
            [classifier, *good, "--output_dir", tmp_path / ("a" * 300)],
            "expected a writable folder for the report, got ",
        ),
        ([classifier, *good, *report, "--split", "test"], "has no split 'test'; it has train"),
        ([classifier, *good, *report, "--label_column", "class"], "has no column 'class'; its columns are image"),
        ([classifier, *good, *report, "--image_column", "picture"], "has no column 'picture'"),
        ([classifier, "--data", tmp_path / "others", *report], "classes that the model does not know, nine"),
        ([classifier, *good, *report, "--device", "abacus"], "--device: expected a device of this machine"),
        ([classifier, *good, *report, "--device", "cuda:99"], "--device: expected a device of this machine"),
        (
            [classifier, *good, "--output_dir", tmp_path / "data.xlsx" / "report"],
            "--output_dir: expected a writable folder",
        ),
        ([classifier, "--data", tmp_path / "broken", *report], f"{tmp_path}/broken/two/1.png: cannot identify image"),
        ([classifier, "--data", unlabelled, *report], "samples without a label"),
    ]
    for argv, message in cases:
        code, line = failure(capsys, "evaluate", *argv)
        assert code == 2 and message in line, line
        assert not (tmp_path / "report").exists()
