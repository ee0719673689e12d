"""A process of `test_hub.py` that trains tiny models and pushes them to its server, with faults for some.

python -m tests.hub_push folder

It writes the outputs of the models to `folder/outputs.pt` and the errors to `folder/errors.json`.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from hf_attentiondrop import AttentionDropTrainer, AttentionDropTrainingArguments
from hf_attentiondrop.hub import METRICS_FILE, UploadError

from .models import build


TEXTS = ["the cat sat on the mat", "on the mat"]
IMAGES = [Image.new("RGB", (8, 8), color) for color in ("red", "navy")]
FAILURES: dict[str, dict[str, Any]] = {
    "invalid": {"license": ""},
    "forbidden": {},
    "broken": {},
    "cut-off": {},
    "anonymous": {"token": False},
}
METRICS = {"eval_accuracy": 0.5, "eval_samples": 2}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *sorted(set(" ".join(TEXTS).split()))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 8, "width": 8})


def train(folder: Path, model: Any, processing_class: Any, inputs: dict[str, Tensor]) -> AttentionDropTrainer:
    """A trainer after three steps, with the files of a run and a checkpoint in a folder of the same name."""
    rows = [{name: value[i] for name, value in inputs.items()} | {"labels": i} for i in range(2)]
    arguments = AttentionDropTrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=0.05,
        save_steps=3,
        hub_model_id=f"tester/{folder.name}",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = AttentionDropTrainer(model, arguments, train_dataset=rows, processing_class=processing_class)
    trainer.train()
    trainer.save_model()
    (folder / METRICS_FILE).write_text(json.dumps(METRICS))
    Image.new("RGB", (2, 2)).save(folder / "reliability_diagram.png")
    return trainer


def outputs(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def digests(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def push(folder: Path) -> dict[str, Tensor]:
    texts = dict(tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    images = dict(processor()(IMAGES, return_tensors="pt"))

    dropped = train(folder / "dropped", build("bert"), tokenizer(), texts)
    dropped.push_to_hub(dataset="two sentences", plots=[folder / "dropped" / "reliability_diagram.png"])

    vit = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = ViTForImageClassification._from_config(vit, attn_implementation="affine_scaled")
    reweighted = train(folder / "reweighted", model, processor(), images)
    reweighted.push_to_hub(dataset_tags="tester/colours", dataset_split="test", metrics=METRICS)

    base = AutoModelForSequenceClassification.from_pretrained("tester/dropped", attn_implementation="attentiondrop")
    lora = get_peft_model(base, LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    adapter = train(folder / "adapter", lora, tokenizer(), texts)
    adapter.push_to_hub()

    return {
        "dropped": outputs(dropped.model, texts),
        "reweighted": outputs(reweighted.model, images),
        "adapter": outputs(adapter.model, texts),
    }


def fail(folder: Path) -> dict[str, str]:
    texts = dict(tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    trainer = train(folder / "failing", build("bert"), tokenizer(), texts)
    before, errors = digests(folder / "failing"), {}
    for name, options in FAILURES.items():
        trainer.hub_model_id, trainer.args.hub_model_id = None, f"tester/{name}"
        try:
            trainer.push_to_hub(**options)
        except UploadError as error:
            errors[name] = str(error)
        # The push writes the card, and the same weights and arguments again.
        after = digests(folder / "failing")
        assert after.pop("README.md")
        assert after.keys() == before.keys()
        assert {path for path in before if after[path] != before[path]} <= {"training_args.bin"}
    return errors


if __name__ == "__main__":
    torch.set_num_threads(1)
    set_seed(0)
    assert constants.ENDPOINT.startswith("http://127.0.0.1:")
    root = Path(sys.argv[1])
    torch.save(push(root), root / "outputs.pt")
    (root / "errors.json").write_text(json.dumps(fail(root)))
