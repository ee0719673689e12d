"""The evaluation of a classifier agrees with its parts, for images and texts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_attentiondrop.evaluation.adversarial import robust_accuracy, robustness_curve
from hf_attentiondrop.evaluation.attack import Attack
from hf_attentiondrop.evaluation.calibration import calibration_metrics, fit_temperature
from hf_attentiondrop.evaluation.classifier import cross_fitted, evaluate_classifier, predict, save_plots
from hf_attentiondrop.evaluation.perturbation_space import Normalization
from hf_attentiondrop.evaluation.running import labelled_samples


NORMALIZATION = Normalization((0.5,), (0.25,))
SCALED = {"temperature", "after_temperature"}


def vit(implementation: str = "attentiondrop") -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=32,
        num_labels=3,
        initializer_range=0.5,
    )
    return ViTForImageClassification._from_config(config, attn_implementation=implementation)


def images(samples: int = 12, size: int = 8) -> list[dict[str, torch.Tensor]]:
    pixels = (torch.rand(samples, 3, size, size) - 0.5) / 0.25
    labels = torch.randint(0, 3, (samples,))
    return [{"pixel_values": p, "labels": y} for p, y in zip(pixels.split(5), labels.split(5), strict=True)]


def texts(samples: int = 12) -> list[dict[str, torch.Tensor]]:
    batches = []
    for length in (7, 4):
        mask = torch.ones(samples // 2, length, dtype=torch.long)
        mask[1, -2:] = 0
        ids, labels = torch.randint(3, 50, mask.shape), torch.randint(0, 2, (samples // 2,))
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return batches


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64, vocab_size=50
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("implementation", ["sdpa", "attentiondrop", "affine_scaled"])
def test_images(implementation: str) -> None:
    model, batches = vit(implementation).train(), images()
    evaluation = evaluate_classifier(model, batches, attacked_samples=7, normalization=NORMALIZATION)
    metrics, (logits, labels) = evaluation.metrics, predict(model, batches)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert metrics["samples"] == 12
    plain = calibration_metrics(logits, labels)
    assert {name: metrics["calibration"][name] for name in plain} == plain
    assert metrics["calibration"]["temperature"] == fit_temperature(logits, labels)
    assert metrics["calibration"]["after_temperature"] == calibration_metrics(cross_fitted(logits, labels), labels)
    robustness = metrics["robustness"]
    assert (robustness["samples"], robustness["space"], robustness["norm"]) == (7, "pixels", "linf")
    rows = {(row["name"], round(row["epsilon"] * 255)): row["accuracy"] for row in robustness["attacks"]}
    assert set(rows) == {("none", 0)} | {(name, e) for name in ("FGSM", "PGD-10", "PGD-20") for e in (2, 4, 8)}
    assert robustness["accuracies"]["PGD-20"] == {
        "0": rows["none", 0],
        "0.25": rows["PGD-20", 2],
        "0.5": rows["PGD-20", 4],
        "1": rows["PGD-20", 8],
    }
    first = [batches[0], {name: value[:2] for name, value in batches[1].items()}]
    assert rows["FGSM", 2] == robust_accuracy(model, first, Attack.fgsm(2 / 255), NORMALIZATION).accuracy
    assert rows["none", 0] == sum((predict(model, first)[0].argmax(-1) == predict(model, first)[1]).tolist()) / 7
    assert set(metrics["attention"]) == {"attentions"}
    assert model.training


@pytest.mark.parametrize("epsilon", [None, 0.5])
def test_texts(epsilon: float | None) -> None:
    model, batches = bert(), texts()
    metrics = evaluate_classifier(model, batches, attacked_samples=12, epsilon=epsilon).metrics
    assert metrics["robustness"]["space"] == "embeddings"
    largest = max(row["epsilon"] for row in metrics["robustness"]["attacks"])
    assert largest == pytest.approx((epsilon or 0.1) * model.get_input_embeddings().weight.std().item())


def test_another_bound_for_images() -> None:
    model, batches = vit(), images()
    attacked = {"attacked_samples": 5, "normalization": NORMALIZATION}
    robustness = evaluate_classifier(model, batches, epsilon=4 / 255, **attacked).metrics["robustness"]
    usual = evaluate_classifier(model, batches, **attacked).metrics["robustness"]
    assert robustness["attacks"][-1]["epsilon"] == pytest.approx(4 / 255)
    # FGSM takes one step of this length, whatever the bound of the strongest attack is.
    assert robustness["accuracies"]["FGSM"]["1"] == usual["accuracies"]["FGSM"]["0.5"]


def llama() -> LlamaForSequenceClassification:
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=50,
        pad_token_id=0,
        initializer_range=0.5,
    )
    return LlamaForSequenceClassification(config)


def gpt2() -> GPT2ForSequenceClassification:
    config = GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=50, pad_token_id=0, initializer_range=0.5)
    return GPT2ForSequenceClassification(config)


def one_by_one(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """One batch per text, without padding."""
    samples = []
    for batch in batches:
        for row, mask in enumerate(batch["attention_mask"].bool()):
            samples.append({n: v[[row]][:, mask] if v.dim() == 2 else v[[row]] for n, v in batch.items()})
    return samples


@pytest.mark.parametrize("is_left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("model", [llama(), gpt2()], ids=["llama", "gpt2"])
def test_a_decoder_is_attacked_as_with_batch_size_1(model: PreTrainedModel, is_left: bool) -> None:
    batches = [{n: v.flip(1) if is_left and v.dim() == 2 else v for n, v in batch.items()} for batch in texts(10)]
    robustness = evaluate_classifier(model, batches, attacked_samples=8).metrics["robustness"]
    rows = [(row["epsilon"], row["accuracy"]) for row in robustness["attacks"] if row["name"] in ("none", "FGSM")]
    epsilons = [epsilon for epsilon, _ in rows]
    # FGSM has no random start, so samples do not depend on the rest of the batch.
    curve = robustness_curve(model, one_by_one(batches)[:8], epsilons, Attack.fgsm(epsilons[-1]))
    assert rows == [(result.epsilon, result.accuracy) for result in curve]
    assert robustness["samples"] == 8


def test_pixels_have_the_dtype_of_the_model() -> None:
    model, batches = vit(), images()
    exact = predict(model, batches)[0]
    evaluation = evaluate_classifier(model.bfloat16(), batches, attacked_samples=3, normalization=NORMALIZATION)
    assert set(evaluation.metrics) == {"accuracy", "samples", "calibration", "robustness", "attention"}
    assert torch.allclose(predict(model, batches)[0], exact, atol=0.05 * exact.abs().max().item())


def test_anything_but_a_list_of_batches_is_refused() -> None:
    model, batches = vit(), images()
    assert torch.equal(predict(model, iter(batches))[0], predict(model, batches)[0])  # one pass
    cases = [
        (lambda: predict(model, batches[0]), r"got one batch with \['labels', 'pixel_values'\].*\[batch\]"),
        (lambda: evaluate_classifier(model, batches[0]), "must be a list or a DataLoader of batches, got one batch"),
        (lambda: evaluate_classifier(model, iter(batches)), "got the iterator list_iterator: .*more than once"),
        (lambda: evaluate_classifier(model, (batch for batch in batches)), r"Pass list\(batches\)"),
        (lambda: predict(model, 3), "got int"),
    ]
    for call, message in cases:
        with pytest.raises(TypeError, match=message):
            call()


def test_the_random_state_is_unchanged_and_the_seed_matters() -> None:
    model, batches = vit(), images()
    state = torch.get_rng_state()
    runs = [
        evaluate_classifier(model, batches, attacked_samples=12, normalization=NORMALIZATION, seed=1).metrics
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("samples", [12, 150])
def test_attention_is_measured_on_the_same_samples_for_any_batch_size(samples: int) -> None:
    model, whole = vit(), images(samples)
    inputs = {name: torch.cat([batch[name] for batch in whole]) for name in whole[0]}
    pixels, labels = inputs["pixel_values"].split(100), inputs["labels"].split(100)
    large = [{"pixel_values": p, "labels": y} for p, y in zip(pixels, labels, strict=True)]
    one, other = (evaluate_classifier(model, batches).metrics["attention"]["attentions"] for batches in (whole, large))
    assert one == pytest.approx(other) and one["samples"] == min(samples, 128)
    if samples > 128:
        first = [{name: value[:128] for name, value in inputs.items()}]
        assert evaluate_classifier(model, first).metrics["attention"]["attentions"] == pytest.approx(one)


def test_temperatures_come_from_the_other_half() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (40,))
    logits = torch.nn.functional.one_hot(labels, 3) + torch.randn(40, 3)
    scaled = cross_fitted(logits, labels)
    assert torch.allclose(scaled[::2] * fit_temperature(logits[1::2], labels[1::2]), logits[::2])
    assert torch.allclose(scaled[1::2] * fit_temperature(logits[::2], labels[::2]), logits[1::2])


def test_scaling_is_omitted_if_a_half_has_no_optimal_temperature(caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.arange(40) % 2
    logits = torch.nn.functional.one_hot(1 - labels, 2) * 2.0  # always wrong: no temperature is hot enough
    assert cross_fitted(logits, labels) is None
    assert cross_fitted(torch.nn.functional.one_hot(labels, 2) * 2.0, labels) is None
    assert caplog.text == ""  # There is no bound to warn about.


def test_a_single_error_has_a_temperature_but_cannot_be_cross_fitted() -> None:
    model, batches = vit(), images(40)
    logits, _ = predict(model, batches)
    for batch, part in zip(batches, logits.split(5), strict=True):
        batch["labels"] = part.argmax(-1)
    assert evaluate_classifier(model, batches).metrics["calibration"].keys().isdisjoint(SCALED)
    batches[0]["labels"][3] = logits[3].argmin()
    calibration = evaluate_classifier(model, batches).metrics["calibration"]
    labels = torch.cat([batch["labels"] for batch in batches])
    assert calibration.keys() & SCALED == {"temperature"}
    assert calibration["temperature"] == fit_temperature(logits, labels)


def test_samples_without_a_label_are_ignored() -> None:
    model, batches = vit(), images()
    whole = evaluate_classifier(model, batches[:2]).metrics
    ignored = batches[2] | {"labels": torch.full_like(batches[2]["labels"], -100)}
    partial = evaluate_classifier(model, [*batches[:2], ignored]).metrics
    assert (partial["accuracy"], partial["samples"]) == (whole["accuracy"], 10)
    attacks = {"attacked_samples": 6, "normalization": NORMALIZATION}
    attacked = [evaluate_classifier(model, of, **attacks).metrics for of in (batches[:2], [ignored, *batches[:2]])]
    assert attacked[0]["robustness"] == attacked[1]["robustness"]
    shared, positions = {"labels": torch.tensor([1, -100, 0])}, torch.arange(2)[None]
    (kept,) = labelled_samples([{**shared, "position_ids": positions, "scale": torch.tensor(2.0)}])
    assert kept["labels"].tolist() == [1, 0] and kept["position_ids"] is positions and kept["scale"] == 2.0
    with pytest.raises(ValueError, match="at least one item with a label"):
        evaluate_classifier(model, [ignored])


def resnet() -> ResNetForImageClassification:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


def swin() -> SwinForImageClassification:
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=3
    )
    return SwinForImageClassification(config)


@pytest.mark.parametrize(("model", "stacks"), [(resnet(), 0), (swin(), 1)], ids=["resnet", "swin"])
def test_models_without_attention_or_with_different_heads(
    model: PreTrainedModel, stacks: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = evaluate_classifier(model, images(6, size=32))
    assert len(evaluation.attention) == stacks
    assert ("Attention was not measured" in caplog.text) == (stacks == 0)
    names = [path.name for path in save_plots(tmp_path, evaluation)]
    assert names == ["reliability.png"] + ["attention_entropy.png"] * stacks


def test_plots_are_files_of_600_pixels(tmp_path: Path) -> None:
    evaluation = evaluate_classifier(vit(), images(), attacked_samples=5, normalization=NORMALIZATION)
    history = [{"loss": 1.0, "step": 1}, {"loss": 0.5, "step": 2}, {"eval_loss": 0.6, "step": 2}]
    paths = save_plots(tmp_path, evaluation, log_history=history)
    names = {"reliability.png", "robustness.png", "attention_entropy.png", "training.png"}
    assert {path.relative_to(tmp_path).as_posix() for path in paths} == {f"plots/{name}" for name in names}
    for path in paths:
        with Image.open(path) as image:
            assert image.width == 600
    assert save_plots(tmp_path) == []


def without_labels() -> list[dict[str, Any]]:
    return [{"pixel_values": batch["pixel_values"]} for batch in images()]


def test_bad_input() -> None:
    model = vit()
    broken = vit()
    torch.nn.init.constant_(broken.classifier.weight, math.nan)
    cases = [
        (lambda: evaluate_classifier(model, []), "at least one batch"),
        (lambda: evaluate_classifier(model, without_labels()), "must contain `labels`"),
        (lambda: evaluate_classifier(broken, images()), "NaN"),
        (lambda: evaluate_classifier(model, images(), attacked_samples=3), "normalization"),
        (lambda: evaluate_classifier(model, images(), attacked_samples=3, epsilon=0), "above 0, got 0"),
        (lambda: evaluate_classifier(model, images(), attacked_samples=3, epsilon=8), "at most 1 for images, got 8"),
        (lambda: evaluate_classifier(model, images(), epsilon=0.1), "needs `attacked_samples`"),
        (lambda: evaluate_classifier(model, [images()[0] | {"labels": torch.full((5,), 9)}]), r"\[0, 3\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
