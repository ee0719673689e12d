"""The command line: its output, its exit codes, and one line for whatever is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Tokenizer,
    MPNetConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_attentiondrop import __version__, report
from hf_attentiondrop.cli import main

from .models import build
from .recipe_runs import run


NAMES = ("zero", "one", "two")
CLI = ("-m", "hf_attentiondrop.cli")
TABLE = """\
BertForSequenceClassification: 2 of 2 attention modules are perturbed in training
module                               kind          layer  implementation  in training               calls
-----------------------------------  ------------  -----  --------------  ------------------------  -----
bert.encoder.layer.0.attention.self  encoder_self  0      attentiondrop   hard p=0.1 k=5 fill=mask  0
bert.encoder.layer.1.attention.self  encoder_self  1      attentiondrop   hard p=0.1 k=5 fill=mask  0
attention dropout in 2 of them: on CUDA these hold all scores at any length, since FlexAttention has no dropout
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BERT's config.json, alone."""
    config = build("bert").config
    config.architectures = ["BertForSequenceClassification"]
    return config_folder(tmp_path / "bert", config.to_dict())


def config_folder(path: Path, contents: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return path


def failure(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str]:
    """The exit code of a command that fails, and its one line."""
    code = main(list(map(str, argv)))
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("\n") == 1 and written.err.startswith("hf-attentiondrop: error: ")
    return code, written.err


def printed(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The output of a command that succeeds."""
    assert main(list(map(str, argv))) == 0
    written = capsys.readouterr()
    assert written.err == ""
    return written.out


def cells(table: str) -> list[list[str]]:
    """The words of a table, line by line, whatever the widths of its columns."""
    return [line.split() for line in table.splitlines() if not line.startswith("-")]


def test_what_would_be_applied_where_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "check", folder) == TABLE


def test_a_program_says_why_a_model_is_refused(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "mpnet", MPNetConfig().to_dict())
    result = run(*CLI, "check", folder)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("hf-attentiondrop: error: MPNetModel does not dispatch its attention through")


def test_a_program_reads_the_config_of_a_model_on_the_hub(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    # As the Hub's client keeps a repository of which it downloaded the config alone.
    repository = tmp_path / "cache" / "models--someone--bert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("a" * 40))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    result = run(*CLI, "check", "someone/bert")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == TABLE


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in ((["--help"], "check"), (["check", "--help"], "--attention_drop")):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 0
        assert expected in capsys.readouterr().out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"hf-attentiondrop {__version__}\n"


def test_a_path_to_the_config_will_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "check", folder / "config.json") == printed(capsys, "check", folder)


def test_a_config_without_architectures_is_that_of_the_base_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, architectures in (("none", None), ("unknown", ["SomeonesOwnModel"]), ("other", ["ViTModel"])):
        config = BertConfig(architectures=architectures, num_hidden_layers=1)
        folder = config_folder(tmp_path / name, config.to_dict())
        assert printed(capsys, "check", folder).startswith("BertModel: 1 of 1 attention modules")


@pytest.mark.parametrize("implementation", ["attentiondrop", "affine_scaled", "attention_sink", "gated_attention"])
def test_weights_are_never_loaded(tmp_path: Path, implementation: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("bert", attn_implementation=implementation, attention_drop={"variant": "blur", "layers": [0]})
    model.save_pretrained(tmp_path)
    # A checkpoint with learned reweighting names its implementation; others are checked for AttentionDrop.
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, **({"attn_implementation": "attentiondrop"} if implementation == "attentiondrop" else {})
    )
    # What the weights alone tell, the average of learned scales, is left out.
    expected = str(report(loaded)).replace(" average=1.0000", "")
    weights = tmp_path / "model.safetensors"
    weights.unlink()  # A model may still be reading from the file itself.
    weights.write_bytes(b"no weights")
    capsys.readouterr()
    assert cells(printed(capsys, "check", tmp_path)) == cells(expected)


def test_the_implementation_can_be_chosen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = printed(capsys, "check", folder, "--attn_implementation", "attention_sink")
    assert "BertForSequenceClassification: 0 of 2 attention modules are perturbed in training, 2 reweighted" in output
    assert "attention_sink  -            0      init=-4.0" in output


def test_an_entry_alone_names_the_implementation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("attn_implementation", None)
    config["attention_reweighting"] = {"method": "gated_attention", "layers": [0]}
    (folder / "config.json").write_text(json.dumps(config))
    assert "training, 1 reweighted" in printed(capsys, "check", folder)
    code, message = failure(capsys, "check", folder, "--attn_implementation", "affine_scaled")
    assert code == 1 and "belongs to attn_implementation='gated_attention'" in message


def test_a_part_with_learned_reweighting_is_known_by_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**tiny, "vocab_size": 64}, vision_config={**tiny, "image_size": 8, "patch_size": 4}
    )
    model = CLIPModel._from_config(config, attn_implementation={"text_config": "attention_sink"})
    model.config.save_pretrained(tmp_path)
    rows = printed(capsys, "check", tmp_path).splitlines()
    assert rows[0].startswith("CLIPModel: 0 of 2") and rows[0].endswith("1 reweighted")


def test_the_configuration_can_be_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.dumps({"variant": "blur", "sigma_max": 0.5, "layers": [-1]})
    output = printed(capsys, "check", folder, "--attention_drop", values).splitlines()
    assert output[0].endswith("1 of 2 attention modules are perturbed in training")
    assert "attentiondrop   -" in output[3] and "blur sigma_max=0.5 width=5" in output[4]
    code, message = failure(capsys, "check", folder, "--attention_drop", '{"layers": [7]}')
    assert (
        code == 1 and "`attention_drop` names layer 7, and BertForSequenceClassification has no such layer" in message
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["inspect"], "invalid choice: 'inspect'"),
        (["check"], "the following arguments are required: MODEL"),
        (["check", "x", "--attn_implementation", "sdpa"], "invalid choice: 'sdpa' (choose from 'attentiondrop'"),
        (["check", "x", "--attention_drop", "{p: 1}"], "expected JSON such as '{\"p\": 0.2}', got '{p: 1}'"),
        (
            ["check", "x", "--attention_drop", '{"q": 1}'],
            "Unknown key 'q' in `attention_drop`: it would have no effect. Th",
        ),
        (["check", "x", "--attention_drop", '{"varient": 1}'], "Did you mean 'variant'? The keys are variant, p, k"),
        (["check", "x", "--attention_drop", '{"p": 2}'], "`p` must be a probability in [0, 1], got 2"),
        (
            ["evaluate", "x", "--data", "y", "--seed", "-1"],
            "expected an integer from 0 to 9223372036854775807, got '-1",
        ),
        (
            ["evaluate", "x", "--data", "y", "--seed", str(2**63)],
            "from 0 to 9223372036854775807, got '92233720368547758",
        ),
        (["check", "x", "--attention_drop", "[1]"], "`attention_drop` must be one of HardMasking"),
    ],
)
def test_bad_arguments_are_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{broken", "is not a valid JSON file"),
        ("[1, 2]", "cannot be read as one"),
        ({"hidden_size": 8}, "Should have a `model_type` key"),
        ({"model_type": "perceptron"}, "has model type `perceptron` but Transformers does not recognize"),
        ({"model_type": "bert", "hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"model_type": "bert", "attention_drop": {"p": 7}}, "`p` must be a probability in [0, 1], got 7"),
        ({"model_type": "bert", "num_hidden_layers": 1, "vocab_size": -5}, "no BertModel can be built"),
        ({"model_type": "timm_wrapper"}, "cannot be read as one"),
    ],
)
def test_bad_configs_are_refused(
    contents: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = failure(capsys, "check", config_folder(tmp_path / "bad", contents))
    assert code == 2 and message in line


def test_a_missing_model_is_said_to_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "MODEL: expected a folder with a config.json, the path of one, or a model on the Hub"
    for name in (tmp_path / "nowhere", "./nowhere", "some/where/else"):
        assert failure(capsys, "check", name) == (
            2,
            f"hf-attentiondrop: error: {expected}; there is nothing at '{name}'.\n",
        )
    code, message = failure(capsys, "check", tmp_path)
    assert code == 2 and f"the folder '{tmp_path}' has no config.json." in message
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "It holds a PEFT adapter: check the model" in failure(capsys, "check", tmp_path)[1]
    code, message = failure(capsys, "check", "nobody/nothing")
    assert code == 2 and "'nobody/nothing' is no folder here, and cannot be read as one: " in message


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as images, in a folder per class, whose names are in another order than the model's numbers."""
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
    flags = ["--evaluate_robustness", "--robustness_samples", 5, "--batch_size", 7]
    output = printed(capsys, "evaluate", classifier, "--data", digits, "--output_dir", tmp_path / "report", *flags)
    card = (tmp_path / "report" / "README.md").read_text()
    assert f"\n{digits.name}\n" in card
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert f"accuracy           {metrics['eval_accuracy']:.4f}\n" in output and "under PGD-20" in output

    model = ViTForImageClassification.from_pretrained(classifier).eval()
    processor = ViTImageProcessorPil.from_pretrained(classifier)
    right = 0
    for path in digits.glob("*/*.png"):
        inputs = processor(Image.open(path).convert("RGB"), return_tensors="pt")
        right += model.config.id2label[model(**inputs).logits.argmax().item()] == path.parent.name
    assert (metrics["eval_accuracy"], metrics["eval_samples"]) == (right / 24, 24)
    assert metrics["robustness"]["samples"] == 5

    for picture in ("reliability", "robustness", "attention_entropy"):
        assert f"(plots/{picture}.png)" in card and (tmp_path / "report" / "plots" / f"{picture}.png").exists()
    assert "| `p` | 0.2 |" in card
    assert str(tmp_path) not in card and f'"path/to/{classifier.name}"' in card


def test_a_report_says_what_it_is_about(
    classifier: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max_samples", 20, "--output_dir", tmp_path]
    printed(capsys, "evaluate", classifier, "--data", digits, *flags)
    card = (tmp_path / "README.md").read_text()
    assert f"\n{digits.name}, 20 samples drawn at random\n" in card
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


def test_evaluate_does_not_attack_what_has_to_see_the_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = BartConfig(**layers, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=60)
    BartForSequenceClassification(config).save_pretrained(tmp_path / "model")
    texts = ["a red house", "an old tree"]
    BertTokenizer(eos_token="[SEP]").train_new_from_iterator(texts, 60, show_progress=False).save_pretrained(
        tmp_path / "model"
    )
    capsys.readouterr()  # the progress bar of that
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
    capsys.readouterr()  # the progress bar of that
    report, good = ["--output_dir", tmp_path / "report"], ["--data", digits]
    cases = [
        ([classifier, *good, "--output_dir", tmp_path / "full"], "--output_dir: expected an empty folder"),
        ([base, *good, *report], "expected a classifier of images or texts"),
        ([tmp_path / "nothing", *good, *report], f"there is nothing at '{tmp_path}/nothing'"),
        (["nobody/nothing", *good, *report], "MODEL: expected a folder with a saved classifier, or a classifier on"),
        ([classifier / "config.json", *good, *report], "Name the folder that it lies in"),
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
        ([classifier, *good, "--output_dir", ""], "--output_dir: expected a folder for the report, got nothing"),
        ([classifier, *good, "--output_dir", tmp_path / ("a" * 300)], "nothing can be made there: [Errno 36] File na"),
        ([classifier, *good, *report, "--split", "test"], "has no split 'test'; it has train"),
        ([classifier, *good, *report, "--label_column", "class"], "has no column 'class'; its columns are image"),
        ([classifier, *good, *report, "--image_column", "picture"], "has no column 'picture'"),
        ([classifier, "--data", tmp_path / "others", *report], "classes that the model does not know, nine"),
        ([classifier, *good, *report, "--device", "abacus"], "--device: expected one that this machine"),
        ([classifier, *good, *report, "--device", "cuda:99"], "--device: expected one that this machine"),
        (
            [classifier, *good, "--output_dir", tmp_path / "data.xlsx" / "report"],
            "--output_dir: expected a folder that",
        ),
        ([classifier, "--data", tmp_path / "broken", *report], f"{tmp_path}/broken/two/1.png: cannot identify image"),
        ([classifier, "--data", unlabelled, *report], "samples without a label"),
    ]
    for argv, message in cases:
        code, line = failure(capsys, "evaluate", *argv)
        assert code == 2 and message in line, line
        assert not (tmp_path / "report").exists()
