"""Attention statistics and gradient noise match their definitions, and measuring does not change the model."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_attentiondrop import AffineScaledConfig, AttentionSinkConfig
from hf_attentiondrop.evaluation.callback import DiagnosticsCallback
from hf_attentiondrop.evaluation.diagnostics import attention_statistics
from hf_attentiondrop.evaluation.gradients import gradient_noise, gradient_norms
from hf_attentiondrop.evaluation.maps import attention_maps
from hf_attentiondrop.evaluation.running import random_state_kept


SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
}
IDS = torch.arange(14).view(2, 7) + 3
LEFT, RIGHT = torch.tensor([[1] * 7, [0, 0] + [1] * 5]), torch.tensor([[1] * 7, [1] * 5 + [0, 0]])


def llama(implementation: str = "sdpa", **options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(**SMALL, num_key_value_heads=2, **options)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation)


def bert(implementation: str = "attentiondrop") -> BertForSequenceClassification:
    return BertForSequenceClassification._from_config(BertConfig(**SMALL), attn_implementation=implementation)


def by_hand(weights: Tensor, queries: Tensor, first: list[int], top_k: int) -> list[float]:
    """Per query, for the weights `(B, Q, K)` of one head."""
    rows = [
        (row.tolist(), first[sample])
        for sample in range(len(weights))
        for row in weights[sample][queries[sample].bool()].double()
    ]
    shares = [([abs(weight) / sum(map(abs, row)) for weight in row], index) for row, index in rows]
    entropy = sum(-share * math.log(share) for row, _ in shares for share in row if share > 0)
    first_mass = sum(row[index] for row, index in shares)
    top = sum(sum(sorted(row)[-top_k:]) for row, _ in shares)
    return [value / len(rows) for value in (entropy, first_mass, top, sum(sum(row) for row, _ in rows))]


@pytest.mark.parametrize(("mask", "first"), [(LEFT, [0, 2]), (RIGHT, [0, 0])], ids=["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "affine_scaled", "attention_sink"])
def test_statistics_match_the_weights(implementation: str, mask: Tensor, first: list[int]) -> None:
    learned = {
        "affine_scaled": {"attention_reweighting": AffineScaledConfig(init="paper")},
        "attention_sink": {"attention_reweighting": AttentionSinkConfig(init=0.0)},
    }
    model = llama(implementation, **learned.get(implementation, {})).eval()
    for name, tensor in model.state_dict().items():
        if "reweighting" in name:
            torch.nn.init.normal_(tensor)
    batch = {"input_ids": IDS, "attention_mask": mask}
    weights = model(**batch, output_attentions=True).attentions
    statistics = attention_statistics(model, [batch], top_k=2)["attentions"]
    measured = (statistics.entropy, statistics.first_token_mass, statistics.top_k_mass, statistics.total_mass)
    for layer in range(2):
        for head in range(4):
            expected = by_hand(weights[layer][:, head], mask, first, 2)
            assert [values[layer, head].item() for values in measured] == pytest.approx(expected, rel=1e-9)
    assert statistics.queries == mask.sum()
    if implementation == "eager":
        assert statistics.total_mass.numpy() == pytest.approx(1.0, abs=1e-6)


def test_the_uniform_entropy_counts_visible_keys() -> None:
    batch = {"input_ids": IDS, "attention_mask": RIGHT}
    # In a causal model a token sees itself and the tokens before it.
    seen = [position + 1 for length in RIGHT.sum(-1).tolist() for position in range(length)]
    expected = sum(map(math.log, seen)) / len(seen)
    for implementation in ("eager", "affine_scaled"):
        statistics = attention_statistics(llama(implementation), [batch])["attentions"]
        assert statistics.uniform_entropy.tolist() == pytest.approx([expected] * 2)
        assert (statistics.entropy <= statistics.uniform_entropy[:, None] + 1e-9).all()


def test_several_batches_give_the_statistics_of_one(  # Of unequal size, so that a mean of means would differ.
) -> None:
    model = llama()
    batches = [{"input_ids": IDS[:1], "attention_mask": LEFT[:1]}, {"input_ids": IDS[1:], "attention_mask": LEFT[1:]}]
    whole, parts = (
        attention_statistics(model, given)["attentions"].means()
        for given in ([{"input_ids": IDS, "attention_mask": LEFT}], batches)
    )
    assert parts == pytest.approx(whole, rel=1e-6)


def test_stock_attention_is_measured_and_kept() -> None:
    model = llama("sdpa").train()
    model.model.norm.eval()
    stock = attention_statistics(model, [{"input_ids": IDS}])["attentions"]
    assert model.config._attn_implementation == "sdpa"
    assert model.training and not model.model.norm.training
    model.set_attn_implementation("eager")
    assert torch.equal(stock.entropy, attention_statistics(model, [{"input_ids": IDS}])["attentions"].entropy)


def test_a_perturbed_model_is_measured_unperturbed() -> None:
    model = bert()
    statistics = [attention_statistics(model.train(), [{"input_ids": IDS}])["attentions"].entropy for _ in range(2)]
    assert torch.equal(*statistics)


def test_all_stacks_of_an_encoder_decoder() -> None:
    config = MarianConfig(
        vocab_size=50,
        d_model=32,
        encoder_layers=1,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    batch = {"input_ids": IDS, "attention_mask": RIGHT, "decoder_input_ids": IDS[:, :4]}
    statistics = attention_statistics(MarianMTModel(config), [batch])
    shapes = {name: (tuple(of.entropy.shape), of.queries) for name, of in statistics.items()}
    assert shapes == {
        "encoder_attentions": ((1, 4), 12),
        "decoder_attentions": ((3, 2), 8),
        "cross_attentions": ((3, 2), 8),
    }


def test_all_random_states_are_kept() -> None:
    def draws() -> tuple[float, ...]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed() -> None:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    model = bert()
    seed()
    expected = draws()
    seed()
    with random_state_kept(model):
        draws()
    assert draws() == expected


@pytest.mark.parametrize("model_class", [MarianMTModel, T5ForConditionalGeneration])
@pytest.mark.parametrize("names", [{"labels"}, {"labels", "decoder_input_ids"}])
def test_labels_are_the_inputs_of_a_decoder(model_class: type[PreTrainedModel], names: set[str]) -> None:
    small = {"d_model": 32, "vocab_size": 50, "pad_token_id": 0, "decoder_start_token_id": 0}
    if model_class is MarianMTModel:
        small |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    else:
        small |= {"d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = model_class(model_class.config_class(**small))
    labels = IDS[:, :4].clone()
    labels[1, 2:] = -100
    batch = {"input_ids": IDS, "attention_mask": RIGHT, "labels": labels}
    batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    given = {name: value for name, value in batch.items() if name in {"input_ids", "attention_mask"} | names}
    expected = {name: value for name, value in batch.items() if name != "labels"}
    expected["decoder_attention_mask"] = (labels != -100).long()
    found, wanted = (attention_statistics(model, [of]) for of in (given, expected))
    assert wanted["decoder_attentions"].queries == wanted["cross_attentions"].queries == 6
    assert {name: of.metrics() for name, of in found.items()} == {name: of.metrics() for name, of in wanted.items()}
    model.set_attn_implementation("attentiondrop")
    for kind in ("decoder_self", "cross"):
        maps = [attention_maps(model, of, kind=kind, sample=1).weights for of in (given, expected)]
        assert maps[0].shape[1] == 2
        assert torch.equal(*maps)


def test_virtual_tokens_of_an_adapted_decoder() -> None:
    small = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    model = T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0))
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    labels = IDS[:, :4].clone()
    labels[1, 2:] = -100
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels=labels)
    batch = {"input_ids": IDS, "labels": labels, "decoder_input_ids": decoder_input_ids}
    assert attention_statistics(adapted, [batch])["decoder_attentions"].queries == 8


def test_layers_with_different_heads() -> None:
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    batch = {"pixel_values": torch.rand(1, 3, 32, 32)}
    statistics = attention_statistics(SwinForImageClassification(config), [batch])["attentions"]
    assert statistics.entropy.isnan().tolist() == [[False, False, True, True], [False] * 4]
    assert all(math.isfinite(value) for value in statistics.means().values())


def flat_gradient(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(model(**batch).loss, list(model.parameters()))])


def test_gradient_noise_is_the_trace_of_the_covariance() -> None:
    model = llama()
    batches = [{"input_ids": ids[None], "labels": ids[None]} for ids in (IDS[0], IDS[1], IDS[0].flip(0))]
    gradients = torch.stack([flat_gradient(model, batch) for batch in batches]).double()
    noise = gradient_noise(model, batches)
    assert noise.variance == pytest.approx(gradients.var(dim=0).sum().item(), rel=1e-5)
    assert noise.mean_norm == pytest.approx(gradients.mean(dim=0).norm().item(), rel=1e-5)
    assert noise.batches == 3


def test_gradient_noise_includes_perturbations_and_does_not_change_the_model() -> None:
    model = bert("affine_scaled").eval()
    model.bert.embeddings.word_embeddings.weight.grad = torch.ones(50, 32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    assert gradient_noise(model, [batch, batch]).variance > 0  # The same batch twice: only dropout differs.
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert model.bert.embeddings.word_embeddings.weight.grad.eq(1).all()
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1


def test_gradient_norms() -> None:
    norms = gradient_norms([1.0, 2.0, 3.0, 2.0, 7.0])
    assert (norms.mean, norms.variance, norms.steps) == (3.0, 5.5, 5)
    assert norms.spikes == 1  # 7 is more than three times the median 2; 3 is not more than three times 1.5.
    assert gradient_norms([1.0] * 30 + [3.1, 2.9] + [1.0] * 30).spikes == 1


def trained(folder: Path, with_callback: bool) -> Trainer:
    torch.manual_seed(0)
    data = Dataset.from_dict({"input_ids": IDS.repeat(8, 1).tolist(), "labels": [0, 1] * 8})
    arguments = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=4, logging_steps=1, report_to="none", use_cpu=True, seed=1
    )
    trainer = Trainer(bert("affine_scaled"), arguments, train_dataset=data, eval_dataset=data)
    batches = list(trainer.get_eval_dataloader())
    if with_callback:
        trainer.add_callback(DiagnosticsCallback(trainer, batches, every=2, with_gradients=True))
    trainer.train()
    return trainer


def test_callback_logs_and_does_not_change_the_training(tmp_path: Path) -> None:
    plain, watched = trained(tmp_path / "plain", False), trained(tmp_path / "watched", True)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    history = watched.state.log_history
    measured = [logs for logs in history if "attentions_entropy" in logs]
    assert [logs["step"] for logs in measured] == [2, 4]
    assert all(logs["gradient_variance"] > 0 and 0 < logs["attentions_first_token_mass"] < 1 for logs in measured)
    norms = [logs["grad_norm"] for logs in history if "grad_norm" in logs]
    summary = next(logs for logs in history if "gradient_norm_variance" in logs)
    assert len(norms) == 4
    assert summary["gradient_norm_variance"] == pytest.approx(gradient_norms(norms).variance)
    # A second training has norms of its own.
    watched.train()
    history = watched.state.log_history
    norms = [logs["grad_norm"] for logs in history if "grad_norm" in logs]
    summary = next(logs for logs in history if "gradient_norm_variance" in logs)
    assert len(norms) == 4
    assert summary["gradient_norm_variance"] == pytest.approx(gradient_norms(norms).variance)


def test_pixels_have_the_dtype_of_the_model() -> None:
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    model, batch = SwinForImageClassification(config), {"pixel_values": torch.rand(1, 3, 32, 32)}
    exact = attention_statistics(model, [batch])["attentions"].means()
    assert attention_statistics(model.bfloat16(), [batch])["attentions"].means() == pytest.approx(exact, rel=0.05)
    labelled = [batch | {"labels": torch.tensor([label])} for label in (0, 1)]
    assert gradient_noise(model, labelled).variance > 0


def test_a_single_batch_is_refused() -> None:
    batch = {"input_ids": IDS, "labels": IDS}
    for measure in (attention_statistics, gradient_noise):
        with pytest.raises(TypeError, match=r"got one batch with \['input_ids', 'labels'\].*\[batch\]"):
            measure(llama(), batch)
    # One pass over the batches, so an iterator works.
    once, listed = attention_statistics(llama_ := llama(), iter([batch])), attention_statistics(llama_, [batch])
    assert torch.equal(once["attentions"].entropy, listed["attentions"].entropy)


def test_bad_input() -> None:
    model, batch = llama(), {"input_ids": IDS}
    broken = llama()
    torch.nn.init.constant_(broken.model.layers[0].self_attn.q_proj.weight, math.nan)
    cases = [
        (lambda: attention_statistics(model, []), "there is nothing to measure"),
        (lambda: attention_statistics(model, [batch | {"attention_mask": torch.zeros(2, 7)}]), "nothing to measure"),
        (lambda: attention_statistics(model, [batch], top_k=0), "`top_k` must be an integer >= 1, got 0"),
        (lambda: attention_statistics(broken, [batch]), "not finite"),
        (lambda: gradient_noise(model, [batch]), "Expected a finite loss from a batch with labels"),
        (lambda: gradient_noise(model, [batch | {"labels": IDS}]), "at least two batches for a variance, got 1"),
        (
            lambda: gradient_noise(llama().requires_grad_(False), [batch]),
            "parameters with requires_grad=True, got none",
        ),
        (lambda: gradient_norms([1.0]), "at least two gradient norms"),
        (lambda: gradient_norms([1.0, math.inf]), "all finite"),
        (lambda: DiagnosticsCallback(None, [batch], every=0), "`every` must be an integer >= 1, got 0"),
        (lambda: DiagnosticsCallback(None, [batch], with_gradients=True), "two for the variance of gradients, got 1"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
