"""The detected shift of the labels matches the loss, for every language-model head of Transformers."""

import inspect
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_attentiondrop.training.alignment import LabelAlignment
from hf_attentiondrop.training.label_shift import shifts_labels

from .architectures import ARCHITECTURES, tiny_config
from .models import build, inputs


KINDS = ("CAUSAL_LM", "SEQ_TO_SEQ", "IMAGE_TEXT", "MULTIMODAL", "SPEECH_SEQ", "MASKED_LM", "WITH_LM")
# They need gigabytes, minutes or special settings.
TOO_LARGE = frozenset(
    {
        "BltForCausalLM",
        "EvollaForProteinText2Text",
        "FalconH1ForCausalLM",
        "LongcatFlashForCausalLM",
        "VibeVoiceAsrForConditionalGeneration",
        "VibeVoiceForConditionalGeneration",
    }
)
# Their names imply no loss type, so they use the default one, the causal loss.
NAMELESS = [
    name for name in ("EvollaForProteinText2Text", "NemotronH_Omni_Reasoning_V3") if hasattr(transformers, name)
]
BATCH, LENGTH = 2, 8


def heads() -> list[str]:
    """Every class with a language-model head that computes a loss."""
    names = set()
    for attribute in dir(modeling_auto):
        if attribute.endswith("MAPPING_NAMES") and any(kind in attribute for kind in KINDS):
            for value in getattr(modeling_auto, attribute).values():
                names.update([value] if isinstance(value, str) else value)
    return sorted(name for name in names if "Assistant" not in name)


def tiny(name: str, **given: Any) -> PreTrainedModel:
    model_class = getattr(transformers, name)
    architecture = ARCHITECTURES.get(model_class.config_class.model_type)
    config = tiny_config(model_class.config_class, {**(architecture.config if architecture else {}), **given})
    if "Causal" in name or "LMHead" in name:
        config.is_decoder = True
    for key in ("pad_token_id", "decoder_start_token_id"):
        if getattr(config, key, None) is None:
            setattr(config, key, 3)
    torch.manual_seed(0)
    return model_class(config).eval()


def shift_of_loss(model: PreTrainedModel) -> bool:
    """Measures the shift: a loss that shifts does not depend on the first label."""
    input_ids = torch.randint(10, 90, (BATCH, LENGTH))
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    accepted = inspect.signature(model.forward).parameters
    batch = {key: value for key, value in batch.items() if key in accepted}

    def loss(position: int, label: int) -> Tensor:
        labels = torch.full((BATCH, LENGTH), -100)
        labels[:, position] = label
        with torch.no_grad():
            return model(**batch, labels=labels).loss

    assert loss(-1, 11).isfinite()
    return torch.allclose(loss(0, 11).nan_to_num(), loss(0, 57).nan_to_num(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "shifts"),
    [
        *((f"{name}ForCausalLM", True) for name in ("Llama", "Bloom", "GPTNeo", "Mixtral", "RoFormer")),
        *((f"{name}LMHeadModel", True) for name in ("GPT2", "Bert", "CTRL")),
        ("BartForCausalLM", False),
        ("BigBirdPegasusForCausalLM", False),
        ("BlenderbotForCausalLM", False),
        ("BlenderbotSmallForCausalLM", False),
        ("CpmAntForCausalLM", False),
        ("MBartForCausalLM", False),
        ("MarianForCausalLM", False),
        ("MvpForCausalLM", False),
        ("PLBartForCausalLM", False),
        ("PegasusForCausalLM", False),
        ("ProphetNetForCausalLM", False),
        ("TrOCRForCausalLM", False),
        ("WhisperForCausalLM", False),
        ("XLMWithLMHeadModel", False),
        ("XLNetLMHeadModel", False),
        *((f"{name}ForConditionalGeneration", False) for name in ("Bart", "T5", "T5Gemma", "ProphetNet")),
        *((f"{name}ForMaskedLM", False) for name in ("Bert", "DistilBert", "Luke", "ModernBert")),
        ("LlavaForConditionalGeneration", True),
    ],
)
def test_the_shift_matches_the_loss(name: str, shifts: bool) -> None:
    model = tiny(name)
    assert shift_of_loss(model) == shifts
    assert shifts_labels(model) == shifts


@pytest.mark.slow
def test_the_shift_matches_the_loss_of_every_head() -> None:
    results = Counter()
    for name in heads():
        model_class = getattr(transformers, name, None)
        if model_class is None or "labels" not in inspect.signature(model_class.forward).parameters:
            continue
        try:
            if name in TOO_LARGE:
                raise MemoryError
            model = tiny(name)
            measured = shift_of_loss(model)
        except Exception:  # Some need more than tiny settings, or images and audio.
            results["not measured"] += 1
            continue
        assert shifts_labels(model) == measured, name
        results["measured"] += 1
    assert results["measured"] >= 2 * results["not measured"], results
    assert results["measured"] >= 200, results


@pytest.mark.parametrize(("model_type", "shifts"), [("opt", True), ("t5", False)])
def test_a_head_that_passes_its_labels_to_a_submodule_shifts_like_the_submodule(model_type: str, shifts: bool) -> None:
    config = tiny_config(InstructBlipConfig, {"text_config": {"model_type": model_type}})
    with torch.device("meta"):
        model = InstructBlipForConditionalGeneration(config)
    assert shifts_labels(model) == shifts


@pytest.mark.parametrize("name", NAMELESS)
def test_a_head_without_a_loss_type_uses_the_default_loss(name: str) -> None:
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        assert shifts_labels(model_class(tiny_config(model_class.config_class, {})))


class Subclass(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Own(transformers.LlamaForCausalLM):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return {"loss": self.score(logits, labels), "logits": logits}

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Hidden(Own):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.score = lambda logits, labels: logits.mean()


class Rolled(Own):
    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        target = torch.roll(labels, -1, 1)
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


class Moved(Own):
    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = nn.functional.pad(labels, (0, 1), value=-100).narrow(1, 1, labels.shape[1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ("model_class", "shifts"), [(Subclass, True), (Own, False), (Hidden, None), (Rolled, None), (Moved, None)]
)
def test_custom_models(model_class: type, shifts: bool | None) -> None:
    assert shifts_labels(model_class(build("llama").config)) is shifts


def test_the_shift_of_a_custom_loss_function_is_unknown() -> None:
    model = build("llama")
    model.loss_function = lambda logits, labels, **kwargs: logits.mean()
    assert shifts_labels(model) is None


def test_an_unknown_shift_raises_only_where_it_matters() -> None:
    alignment = LabelAlignment.of_model(Hidden(build("llama").config))
    batch = inputs("llama")
    for call in (lambda: alignment.count_items(batch, 4), lambda: alignment.targets(batch, 10)):
        with pytest.raises(ValueError, match="source of Hidden does not show whether its loss.*self.loss_function"):
            call()
    assert alignment.count_items({"labels": torch.tensor([0, -100, 2])}, 3) == 2
    assert alignment.count_items({"labels": torch.rand(3, 4)}, 3) == 3
    assert alignment.count_items({**batch, "shift_labels": batch["labels"]}, 4) == 40


def test_with_label_smoothing_the_trainer_decides_about_the_shift() -> None:
    """It computes the loss itself, and shifts the labels for the classes of the causal auto model."""
    model = tiny("BartForCausalLM")
    assert not LabelAlignment.of_model(model).shifts_labels
    assert LabelAlignment.of_model(model, smooths_labels=True).shifts_labels
    llava = tiny("LlavaForConditionalGeneration")
    assert LabelAlignment.of_model(llava).shifts_labels
    assert not LabelAlignment.of_model(llava, smooths_labels=True).shifts_labels


def test_the_fused_head_of_trl_always_shifts() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    model = tiny("BartForCausalLM")
    utils.add_fused_lm_head(model)
    assert LabelAlignment.of_model(model).shifts_labels
    assert LabelAlignment.of_model(model, smooths_labels=True).shifts_labels
