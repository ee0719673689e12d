"""`check` says which modules would be perturbed, or in one line why the model is not supported."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, BertConfig, CLIPConfig, CLIPModel, MPNetConfig

from hf_attentiondrop import report

from ..models import build
from ..recipe_runs import run
from .commands import config_folder, failure, printed


CLI = ("-m", "hf_attentiondrop.cli")
TABLE = """\
BertForSequenceClassification: 2 of 2 attention modules are perturbed in training
module                               kind          layer  implementation  in training               calls
-----------------------------------  ------------  -----  --------------  ------------------------  -----
bert.encoder.layer.0.attention.self  encoder_self  0      attentiondrop   hard p=0.1 k=5 fill=mask  0
bert.encoder.layer.1.attention.self  encoder_self  1      attentiondrop   hard p=0.1 k=5 fill=mask  0
on CUDA, the model's attention dropout makes 2 of them hold the full score matrix; set it to 0 to save memory
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with only the config.json of a BERT."""
    config = build("bert").config
    config.architectures = ["BertForSequenceClassification"]
    return config_folder(tmp_path / "bert", config.to_dict())


def cells(table: str) -> list[list[str]]:
    """The words of each row of a table, regardless of the column widths."""
    return [line.split() for line in table.splitlines() if not line.startswith("-")]


def test_the_table_lists_every_attention_module(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "check", folder) == TABLE


def test_an_unsupported_model_ends_the_program_with_code_1(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "mpnet", MPNetConfig().to_dict())
    result = run(*CLI, "check", folder)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("hf-attentiondrop: error: MPNetModel does not dispatch its attention through")


def test_a_program_reads_the_config_of_a_model_on_the_hub(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    # The cache layout of huggingface_hub for a repository with only its config downloaded.
    repository = tmp_path / "cache" / "models--someone--bert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("a" * 40))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    result = run(*CLI, "check", "someone/bert")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == TABLE


def test_a_path_to_the_config_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    # Without the average of learned scales, which needs the weights.
    expected = str(report(loaded)).replace(" average=1.0000", "")
    weights = tmp_path / "model.safetensors"
    weights.unlink()  # A model may still read from the file.
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


def test_learned_reweighting_of_a_sub_config_is_recognized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
