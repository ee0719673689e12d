"""Cards state only known facts, and a pushed model comes back from the Hub unchanged."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, constants, parse_eval_result_entries
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification, TrainerCallback, TrainerControl, TrainerState

from hf_attentiondrop import (
    AffineScaledConfig,
    AttentionDropConfig,
    AttentionDropTrainer,
    AttentionDropTrainingArguments,
    AttentionSinkConfig,
    GatedAttentionConfig,
)
from hf_attentiondrop.hub import CardContent, Data, UploadError, build_card, write_card
from hf_attentiondrop.methods.method import Perturbation

from .hub_push import METRICS
from .hub_server import TOKEN, Fault, HubServer, running_hub
from .models import build, inputs


# Most tests read the folder of the one process that pushes.
pytestmark = pytest.mark.xdist_group("hub")
ROOT = Path(__file__).parents[1]
FAULTS = [
    Fault("POST /api/models/tester/forbidden/commit", 403),
    Fault("POST /api/models/tester/broken/commit", 500),
    Fault("POST /api/models/tester/cut-off/commit"),
]
ATTACKED = {
    "samples": 200,
    "attacks": [{"name": "PGD-20", "epsilon": 8 / 255, "accuracy": 0.41}, {"name": "FGSM", "epsilon": 0.1}],
}
MEASURED = {
    "eval_accuracy": 0.97125,
    "eval_macro_f1": 0.9,
    "eval_loss": float("nan"),
    "eval_expected_calibration_error": 0.031,
    "eval_samples": 360,
    "eval_runtime": 1.0,
    "eval_samples_per_second": 360.0,
    "train_samples": 1437,
    "majority_accuracy": 0.1,
    "calibration": {
        "expected_calibration_error": 0.031,
        "negative_log_likelihood": 0.2,
        "temperature": 1.25,
        "after_temperature": {"expected_calibration_error": 0.0124},
    },
    "robustness": {
        "norm": "linf",
        "space": "pixels",
        **ATTACKED,
    },
    "attention": {"encoder_attentions": {"entropy": 0.75, "first_token_mass": 0.25}},
}


class StopAtStep3(TrainerCallback):
    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3


def trainer_of(model: torch.nn.Module, folder: Path, family: str = "bert", **arguments: Any) -> AttentionDropTrainer:
    batch = inputs(family)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    arguments = {"max_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True} | arguments
    arguments = AttentionDropTrainingArguments(output_dir=str(folder), use_cpu=True, **arguments)
    return AttentionDropTrainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])


def card_of(trainer: AttentionDropTrainer, **options: Any) -> ModelCard:
    trainer.create_model_card(**options)
    return ModelCard.load(Path(trainer.args.output_dir, "README.md"))


def content(**values: Any) -> CardContent:
    return CardContent(**{"name": "n", "model_class": "BertModel", "origin": "trained from scratch"} | values)


def tables(text: str) -> dict[str, list[str]]:
    """The rows of all tables, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    return {cells[0]: cells[1:] for cells in rows}


# The content of the card


@pytest.mark.parametrize(
    ("config", "formula", "settings", "papers"),
    [
        (AttentionDropConfig(p=0.2, k=3), "L'[i,j] = -∞ with", {"p": "0.2", "k": "3", "fill": "mask"}, ["2504.12088"]),
        (AttentionDropConfig(fill="zero", layers=[0, -1]), "L'[i,j] = 0 with", {"layers": "0, -1"}, ["2504.12088"]),
        (AttentionDropConfig(variant="blur", width=3), "Σ_t g_t", {"width": "3", "sigma_max": "1.0"}, ["2504.12088"]),
        (AffineScaledConfig(), "α = 1 + φ(W_a x) - φ(0),   φ(z) = clamp", {"momentum": "0.9"}, ["2602.23057"]),
        (AffineScaledConfig(init="paper", activation="sigmoid"), "α = φ(W_a x),   φ(z) = 1", {}, ["2602.23057"]),
        (AffineScaledConfig(gate=True), "output · 2 · sigmoid(W_g x)", {}, ["2602.23057", "2505.06708"]),
        (AttentionSinkConfig(init=-2.0), "exp(s) + Σ_t", {"init": "-2.0"}, ["2602.23057"]),
        (GatedAttentionConfig(init="paper"), "output · sigmoid(W_g x)", {"init": "paper"}, ["2505.06708"]),
    ],
)
def test_card_shows_the_methods_that_were_used_and_no_other(
    tmp_path: Path, config: Any, formula: str, settings: dict[str, str], papers: list[str]
) -> None:
    is_drop = isinstance(config, Perturbation)
    options = {"attention_drop": config} if is_drop else {"attention_reweighting": config}
    model = build("bert", attn_implementation="attentiondrop" if is_drop else config.method, **options)
    card = card_of(trainer_of(model, tmp_path, consistency_weight=0.0))
    assert formula in card.text
    assert {name: tables(card.text)[f"`{name}`"] for name in settings} == {k: [v] for k, v in settings.items()}
    assert re.findall(r"arXiv[: ](?:preprint arXiv:)?(\d{4}\.\d{5})", card.text) == papers
    assert "Consistency" not in card.text
    assert ("import hf_attentiondrop" in card.text) is not is_drop


def test_consistency_is_shown_after_training_with_it(tmp_path: Path) -> None:
    trainer = trainer_of(
        build("bert"), tmp_path, consistency_weight=0.5, consistency_divergence="js", learning_rate=1e-4
    )
    assert "loss = task" not in card_of(trainer).text
    trainer.train()
    card = card_of(trainer)
    assert "loss = task + λ · D(P1, P2)" in card.text and "M = (P1 + P2) / 2" in card.text
    rows = tables(card.text)
    assert rows["`consistency_weight`"] == ["0.5"]
    assert rows["Optimizer steps"] == ["2 (2 epochs)"]
    assert rows["Learning rate"] == ["0.0001, linear"]
    assert "liang2021rdrop" in card.text and "trained from scratch" in card.text


def test_consistency_without_effect_is_not_shown(tmp_path: Path) -> None:
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = build("bert", attn_implementation="sdpa", **dropouts)
    trainer = trainer_of(model, tmp_path, consistency_weight=1.0, logging_steps=1)
    trainer.train()
    assert "loss = task" not in card_of(trainer).text


def test_model_without_methods_has_none(tmp_path: Path) -> None:
    card = card_of(trainer_of(build("bert", attn_implementation="sdpa"), tmp_path))
    assert "Method" not in card.text and "Citation" not in card.text
    assert card.data.tags == ["hf-attentiondrop"]


def test_metadata_states_only_known_facts(tmp_path: Path) -> None:
    card = card_of(trainer_of(build("vit"), tmp_path, "vit"))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["hf-attentiondrop"],  # nothing was trained yet
    }
    card = card_of(trainer_of(build("vit"), tmp_path, "vit"), language="en", license="mit", tags="digits")
    assert (card.data.language, card.data.license, card.data.tags[-1]) == ("en", "mit", "digits")


def test_metrics_become_tables() -> None:
    text = build_card(content(metrics=MEASURED)).text
    rows = tables(text)
    scaled = "After temperature scaling, cross-fitted (T = 1.25 on all samples)"
    assert rows["Metric"] == ["Before", scaled]  # the last table of that name
    assert rows["Accuracy"] == ["0.9712", "0.1"] and rows["F1 (macro)"] == ["0.9", "-"]
    assert rows["Expected calibration error"] == ["0.031", "0.0124"]
    assert text.count("| Expected calibration error |") == 1
    assert rows["Negative log-likelihood (nats)"] == ["0.2", "-"]
    assert rows["PGD-20"] == ["8/255", "0.41"] and "upper bound" in text and "200 samples" in text
    assert "perturbations of the pixels with L∞ norm at most ε, on 200 samples" in text
    assert (rows["Attention"], rows["Encoder"]) == (["Entropy (nats)", "Share of the first key"], ["0.75", "0.25"])
    assert rows["Training"] == ["1437"] and rows["Evaluation"] == ["360"]
    assert not {"Loss", "Runtime", "Samples per second", "FGSM"} & rows.keys()


def test_the_deviation_of_embeddings_is_shown_with_their_perturbation() -> None:
    robustness = {"norm": "linf", "space": "embeddings", "embedding_deviation": 0.02, **ATTACKED}
    text = build_card(content(metrics={"robustness": robustness})).text
    assert "perturbations of the embeddings (standard deviation 0.02) with L∞ norm at most ε" in text


@pytest.mark.parametrize("metrics", [{}, {"calibration": {}, "robustness": None}, {"robustness": {"attacks": []}}])
def test_sections_without_metrics_are_omitted(metrics: dict[str, Any]) -> None:
    text = build_card(content(metrics=metrics)).text
    assert not any(heading in text for heading in ("Results", "Calibration", "Robustness", "## Data", "## Training"))


def test_every_table_and_fence_is_complete(tmp_path: Path) -> None:
    trainer = trainer_of(build("bert"), tmp_path)
    trainer.train()
    text = card_of(trainer, dataset="a | b\nc", metrics=MEASURED).text
    assert "a \\| b c" in text
    assert text.count("```") % 2 == 0
    assert not re.search(r"\{\{|\{%|None|\n{3}", text)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = block.splitlines()
        assert re.fullmatch(r"\|(---\|)+", lines[1])
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, block
    # Markdown needs an empty line before a table or a heading.
    assert not re.search(r"^[^|\n].*\n\|", text, re.MULTILINE) and not re.search(r"[^\n]\n#+ ", text)


def test_model_index_needs_a_data_set_of_the_hub(tmp_path: Path) -> None:
    known = content(metrics=MEASURED, task="text-classification", data=Data("Mine", "me/mine", "small", "test"))
    card = ModelCard.load(write_card(known, tmp_path))
    assert card.data.datasets == ["me/mine"] and card.data.metrics == ["accuracy", "f1"]
    found = [(result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert found == [("accuracy", 0.97125), ("f1", 0.9)]
    result = card.data.eval_results[0]
    assert result.unique_identifier == ("text-classification", "me/mine", "small", "test", None)
    assert "https://huggingface.co/datasets/me/mine" in card.text
    assert not (tmp_path / ".eval_results").exists()

    # Neither may read as if all of the split had been evaluated.
    part = replace(known, data=replace(known.data, subset=50, benchmark_task="easy"))
    card = ModelCard.load(write_card(part, tmp_path))
    assert card.data.eval_results[0].dataset_args == {"random_subset": 50}
    assert "evaluated on the split `test`, a random subset of 50 samples" in card.text
    assert not (tmp_path / ".eval_results").exists()

    unknown = build_card(content(metrics=MEASURED, task="text-classification", data=Data("Mine")))
    assert unknown.data.eval_results is None and unknown.data.datasets is None and "model_name" not in str(unknown)


def test_results_of_a_benchmark_are_structured(tmp_path: Path) -> None:
    write_card(content(metrics=MEASURED, data=Data(repo_id="me/mine", split="test", benchmark_task="easy")), tmp_path)
    [entry] = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results" / "mine.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("me/mine", "easy", 0.97125)
    assert entry.notes == "Accuracy, split test"


def test_the_card_shows_the_given_plots(tmp_path: Path) -> None:
    for path in (tmp_path / "robust_accuracy.png", tmp_path / "plots" / "entropy.png", tmp_path / "older.png"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    given = [tmp_path / "plots" / "entropy.png", "robust_accuracy.png"]
    text = card_of(trainer_of(build("bert"), tmp_path), plots=given).text
    assert re.findall(r"!\[(.*)\]\((.*)\)", text) == [
        ("Entropy", "plots/entropy.png"),
        ("Robust accuracy", "robust_accuracy.png"),
    ]
    with pytest.raises(ValueError, match=r"'gone\.png', and there is no such file"):
        write_card(content(plots=("gone.png",)), tmp_path)


def test_ids_that_cannot_be_on_the_hub_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`base_model` of a card must be an id on the Hub, got '/data/base'"):
        write_card(content(base_model="/data/base"), tmp_path)
    with pytest.raises(ValueError, match=r"`datasets` of a card"):
        write_card(content(data=Data(repo_id="my data")), tmp_path)
    assert not list(tmp_path.iterdir())


def test_base_model_is_named_only_if_it_came_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("bert").save_pretrained(tmp_path / "secret" / "base")
    local = BertForSequenceClassification.from_pretrained(tmp_path / "secret" / "base")
    trainer = trainer_of(local, tmp_path / "out", consistency_weight=0.0)
    trainer.train()
    card = card_of(trainer)
    assert card.data.base_model is None
    assert "fine-tuned from a local checkpoint, `base`." in card.text and "secret" not in str(card)

    # A name alone proves nothing unless a model of that name was downloaded.
    local.config._name_or_path = "me/base"
    assert card_of(trainer).data.base_model is None
    snapshot = tmp_path / "cache" / "models--me--base" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()  # Of any revision.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    card = card_of(trainer)
    assert card.data.base_model == "me/base" and "fine-tuned from [me/base]" in card.text
    assert card_of(trainer, finetuned_from="you/base").data.base_model == "you/base"


def test_metrics_are_those_of_the_saved_weights(tmp_path: Path) -> None:
    # The only evaluation was before the last step, of other weights.
    trainer = trainer_of(build("bert"), tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer.add_callback(StopAtStep3())
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2]
    assert "Loss" not in tables(card_of(trainer).text)
    loss = trainer.evaluate()["eval_loss"]
    rows = tables(card_of(trainer).text)
    assert rows["Loss"] == [f"{loss:.4g}"] and rows["Evaluation"] == ["3"] and rows["Training"] == ["4"]
    # Given metrics take precedence over the log.
    assert tables(card_of(trainer, metrics={"eval_loss": 0.125}).text)["Loss"] == ["0.125"]


def test_metrics_of_the_best_checkpoint_go_with_its_weights(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # With this metric the model gets worse at every step.
    options |= {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = trainer_of(build("bert"), tmp_path, **options, learning_rate=1e-2)
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert tables(card_of(trainer).text)["Loss"] == [f"{trainer.state.best_metric:.4g}"]


def test_card_of_an_adapter(tmp_path: Path) -> None:
    base = build("bert", attn_implementation="affine_scaled")
    model = get_peft_model(base, LoraConfig(target_modules=["query"], modules_to_save=["reweighting"]))
    trainer = trainer_of(model, tmp_path, hub_model_id="me/adapter")
    trainer.save_model()  # PEFT writes a card of its own
    card = card_of(trainer)
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    for line in (
        "import hf_attentiondrop  # registers the attention that config.json names",
        'checkpoint = "me/adapter"',
        'model = BertForSequenceClassification.from_pretrained("path/to/the/base/model", num_labels=2, '
        "ignore_mismatched_sizes=True)",
        "model = PeftModel.from_pretrained(model, checkpoint)",
    ):
        assert line in card.text.splitlines()
    assert "Affine-Scaled Attention" in card.text and "PEFT and the base model" in card.text


# Upload and download


def run(hub: HubServer, home: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a program with the server as its Hub and an empty cache."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with running_hub(FAULTS) as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a process that trained models and pushed them."""
    folder = tmp_path_factory.mktemp("runs")
    run(hub, folder / "home", sys.executable, "-m", "tests.hub_push", folder)
    return folder


def test_push_uploads_all_of_the_run_and_no_checkpoint(hub: HubServer, pushed: Path) -> None:
    common = {"README.md", "config.json", "metrics.json", "model.safetensors", "reliability_diagram.png"}
    files = {name: repository.files for name, repository in hub.repositories.items()}
    assert common | {"tokenizer.json", "tokenizer_config.json"} <= files["tester/dropped"].keys()
    assert common | {"preprocessor_config.json"} <= files["tester/reweighted"].keys()
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= files["tester/adapter"].keys()
    assert (pushed / "dropped" / "checkpoint-3").is_dir()
    assert not [path for path in files["tester/dropped"] if path.startswith("checkpoint")]
    assert json.loads(files["tester/dropped"]["metrics.json"]) == METRICS


def test_the_uploaded_card_is_ours_and_validated(hub: HubServer, pushed: Path) -> None:
    cards = {
        name: hub.repositories[f"tester/{name}"].files["README.md"].decode()
        for name in ("dropped", "reweighted", "adapter")
    }
    assert set(cards.values()) <= set(hub.validated)
    assert "two sentences" in cards["dropped"] and "(reliability_diagram.png)" in cards["dropped"]
    adapter, reweighted = ModelCard(cards["adapter"]).data, ModelCard(cards["reweighted"]).data
    # The download shows that the base model is on the Hub.
    assert (adapter.library_name, adapter.base_model) == ("peft", "tester/dropped")
    assert reweighted.eval_results[0].dataset_type == "tester/colours"
    assert reweighted.eval_results[0].metric_value == METRICS["eval_accuracy"]


@pytest.mark.slow
def test_models_load_from_the_hub_as_their_cards_say(hub: HubServer, pushed: Path, tmp_path: Path) -> None:
    if getattr(transformers.AutoImageProcessor, "is_dummy", False):
        pytest.skip("absent: AutoImageProcessor of this version of Transformers needs torchvision")
    run(hub, tmp_path / "home", sys.executable, "-m", "tests.hub_load", tmp_path / "results.pt")
    results, outputs = torch.load(tmp_path / "results.pt"), torch.load(pushed / "outputs.pt")
    assert "affine_scaled" in results.pop("error")  # without the plugin
    assert results.keys() == outputs.keys()
    for name, output in outputs.items():
        assert output.std() > 1e-3
        assert torch.equal(results[name], output), name


@pytest.mark.parametrize(
    ("name", "reason", "hint"),
    [
        ("forbidden", "403", "with write access"),
        ("broken", "500", ""),
        ("cut-off", "disconnected", ""),
        ("anonymous", "401", "`hf auth login`"),
        ("invalid", 'README.md: "license" must be a string', ""),
    ],
)
def test_a_failed_upload_says_why_and_how_to_retry(
    hub: HubServer, pushed: Path, name: str, reason: str, hint: str
) -> None:
    message = json.loads((pushed / "errors.json").read_text())[name]
    assert message.startswith(f"The upload to 'tester/{name}' failed: ")
    assert reason in message and hint in message and "\n" not in message
    assert f"unchanged in {pushed / 'failing'}" in message
    repository = hub.repositories.get(f"tester/{name}")
    # Invalid cards and anonymous users get no repository.
    assert (repository is None) is (name in ("anonymous", "invalid"))
    assert repository is None or not repository.files


def test_an_unreachable_hub_is_an_error_before_training(tmp_path: Path) -> None:
    # The tests are offline, and the repository is created first.
    with pytest.raises(UploadError, match="The upload to 'me/x' failed: .*offline.* Nothing was written yet: fix"):
        trainer_of(build("bert"), tmp_path / "out", push_to_hub=True, hub_model_id="me/x")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_command_of_the_error_uploads_the_run(
    hub: HubServer, pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "faults", [])
    message = json.loads((pushed / "errors.json").read_text())["broken"]
    program, *arguments = shlex.split(re.search("`(hf upload .*?)`", message)[1])
    run(hub, tmp_path / "home", Path(sys.executable).with_name(program), *arguments)
    files = hub.repositories["tester/broken"].files
    assert files.keys() == hub.repositories["tester/dropped"].files.keys()
    assert files["model.safetensors"] == (pushed / "failing" / "model.safetensors").read_bytes()
