"""The studies, their committed results, and the documents that quote them."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from docs.generate_evidence import DOCUMENTS, NUMBER, RESULTS, ROOT, updated
from hf_attentiondrop.compare.results import RESULTS_FILE, read_runs
from hf_attentiondrop.compare.study import name_of, read_study
from studies import gradient_noise, prepare


STUDIES = sorted(Path("studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_has_all_its_results(path: Path) -> None:
    study, folder = read_study(path), RESULTS / path.stem
    assert study.differences(read_study(folder / "study.yaml").to_dict()) == ""
    runs = read_runs(folder / RESULTS_FILE)
    names = [name_of(run) for run in runs]
    assert len(set(names)) == len(names) == study.size
    assert {run.state for run in runs} == {"complete"}
    assert (folder / "report.md").exists()


def test_there_are_studies() -> None:
    assert {path.stem for path in STUDIES} == {path.name for path in RESULTS.iterdir()}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_quote_the_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert updated(text) == text, "run `python -m docs.generate_evidence`"
    # In Markdown, a comment at the start of a line ends the paragraph.
    assert not re.search(r"^ *<!-- =\S+ \w", text, re.MULTILINE)
    # Code and the definition of an interval aside.
    if path.name != "compare.md":
        assert "±" not in NUMBER.sub("", text), "a measured number without its source"


def test_a_number_without_a_source_is_refused() -> None:
    study = "consistency_weights"
    wrong = ["nothing weight_1 eval_loss", f"{study} nothing eval_loss", f"{study} weight_1 nothing"]
    wrong += [f"{study} weight_1 eval_loss nothing", f"{study} weight_1 eval_loss vs nothing"]
    for names in wrong:
        with pytest.raises(ValueError, match="nothing"):
            updated(f"<!-- ={names} -->0<!-- / -->")


def test_cifar10_is_prepared(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in range(10):
            folder = tmp_path / "source" / split / str(label)
            folder.mkdir(parents=True)
            for number in range(3):
                (folder / f"{number}.jpg").write_bytes(b"image")
    prepare.main(["--cifar10", str(tmp_path / "source"), "--output", str(tmp_path / "data")])
    assert len(list((tmp_path / "data" / "cifar10").rglob("*.jpg"))) == 60


def test_exported_weights_get_their_names_back() -> None:
    tensors = {
        "backbone.embeddings.cls_token": np.zeros((1, 1, 2)),
        "backbone.encoder.layer.0.mlp.fc1.bias": np.zeros(3),
        "decoder.bias": np.zeros(3),
        "onnx::MatMul_1": np.arange(6.0).reshape(2, 3),
        "onnx::Concat_1957": np.zeros((1, 1, 2)),
        "onnx::Reshape_1962": np.ones((1, 4, 2)),
    }
    product = "/backbone/encoder/layer.0/mlp/fc1/MatMul_output_0"
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_1"], [product]),
        onnx.helper.make_node("MatMul", [product, product], ["/backbone/scores/MatMul_output_0"]),
    ]
    graph = onnx.helper.make_graph(
        nodes, "model", [], [], [onnx.numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
    )
    weights = prepare.encoder_weights(onnx.helper.make_model(graph).SerializeToString())
    assert {name.removeprefix("dinov2.") for name in weights} == {
        "embeddings.cls_token",
        "embeddings.mask_token",
        "embeddings.position_embeddings",
        "encoder.layer.0.mlp.fc1.bias",
        "encoder.layer.0.mlp.fc1.weight",
    }
    # The exporter stores the weight of a linear layer transposed.
    np.testing.assert_array_equal(weights["dinov2.encoder.layer.0.mlp.fc1.weight"], [[0, 3], [1, 4], [2, 5]])
    assert weights["dinov2.embeddings.position_embeddings"][0, :, 0].tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("arguments", [["--sst2"], ["--shakespeare"], ["--cifar10"], []], ids=lambda a: "".join(a))
def test_other_data_are_refused(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "source", tmp_path / "data"
    for name in ("train.tsv", "input.txt", "train/only one class/0.jpg", "test/0.jpg"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("other\t1\n")
    path = [str(source / "input.txt" if "--shakespeare" in arguments else source)] if arguments else []
    with pytest.raises(SystemExit) as exit:
        prepare.main([*arguments, *path, "--output", str(output)])
    assert exit.value.code == 2
    assert re.search(r"commit|classes|one for each class|nothing to prepare", capsys.readouterr().err)
    assert not output.exists()


def test_gradient_noise_is_measured_at_the_same_weights(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(24):
            pixels = generator.integers(0, 128, (32, 32, 3)) + 127 * (label == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / label / f"{number}.png")
    metrics = {}
    for p in (0.0, 0.5):
        output, perturbation = tmp_path / str(p), json.dumps({"variant": "hard", "p": p})
        flags = ["--train_dir", str(tmp_path / "images"), "--train_samples", "32", "--num_train_epochs", "1"]
        gradient_noise.main(
            [*flags, "--batch_size", "8", "--attention_drop", perturbation, "--output_dir", str(output)]
        )
        metrics[p] = json.loads((output / "metrics.json").read_text())
    # Measured on 32 of the 38 images that are not held out, each of them once.
    arguments = argparse.Namespace(train_dir=str(tmp_path / "images"), train_samples=32, batch_size=8, seed=0)
    batches = gradient_noise.load_batches(tmp_path / "0.0" / "model", arguments)
    data = gradient_noise.image_classification.ImageDataArguments(train_dir=arguments.train_dir)
    rows = [list(part) for part in gradient_noise.image_classification.load_data(data).values()]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "0.0" / "model")
    train, held_out = (gradient_noise.image_classification.collate(part, processor, data) for part in rows)
    seen = {pixels.sum().item() for batch in batches for pixels in batch["pixel_values"]}
    assert len(seen) == 32 and seen <= {pixels.sum().item() for pixels in train["pixel_values"]}
    assert seen.isdisjoint(pixels.sum().item() for pixels in held_out["pixel_values"])
    assert metrics[0.0]["variance_ratio"] == pytest.approx(1) and metrics[0.0]["variance"] > 0
    assert metrics[0.5]["variance_ratio"] != pytest.approx(1, abs=0.01)
