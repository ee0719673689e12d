"""Whole models in training: they learn, do not leak information, and sample masks independently."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_attentiondrop import report

from .methods import examples
from .models import build, inputs


ALL_KINDS = ["encoder_self", "decoder_self", "cross"]
DROPS = {
    name: replace(example, attentions=ALL_KINDS)
    for name, example in examples().items()
    if name != "hard_share"  # No difference to hard_mask here.
}
FAMILIES = ["bert", "vit", "marian", "llama"]


def forward(model: PreTrainedModel, batch: dict[str, torch.Tensor], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return model(**batch)


# Every perturbation without padding, with it on the right and on the left, each in one family, and some more pairs.
TRAINED = [
    *itertools.product(["bert"], [None], DROPS),
    *itertools.product(["vit"], [None], ["hard_zero", "blur"]),
    *itertools.product(["marian"], ["right"], DROPS),
    *itertools.product(["llama"], ["left"], DROPS),
    ("bert", "right", "hard_mask"),
    ("marian", "left", "blur"),
    ("llama", "right", "hard_zero"),
]


@pytest.mark.parametrize(("family", "padding", "variant"), TRAINED)
def test_twenty_steps_lower_the_loss_and_leave_evaluation_alone(
    family: str, padding: str | None, variant: str
) -> None:
    model = build(family, attention_drop=DROPS[variant]).train()
    batch = inputs(family, padding=padding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses))) and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert {row.calls for row in report(model).rows} == {20}

    evaluated = forward(model.eval(), batch).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(evaluated, forward(model, batch).logits)


@pytest.mark.parametrize("variant", DROPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_result_and_another_does_not(family: str, variant: str) -> None:
    model, batch = build(family, dropout=False, attention_drop=DROPS[variant]).train(), inputs(family)
    first, again, other = (forward(model, batch, seed).logits for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("variant", DROPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_copies_of_a_sample_in_one_batch_differ(family: str, variant: str) -> None:
    model = build(family, dropout=False, attention_drop=DROPS[variant]).train()
    batch = {name: torch.cat([tensor, tensor]) for name, tensor in inputs(family).items()}
    first, second = forward(model, batch).logits.chunk(2)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sigma_is_uniform_and_independent_over_samples_layers_and_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    import hf_attentiondrop.methods.blur as blur

    original = blur.blur_keys
    monkeypatch.setattr(blur, "blur_keys", lambda key, sigma, seen: drawn.append(sigma) or original(key, sigma, seen))
    model = build("bert", attention_drop={"variant": "blur", "sigma_max": 2.0}).train()
    for _ in range(50):
        model(**inputs("bert", batch_size=40))
    sigma = torch.stack(drawn).view(50, 2, 40).double()  # calls, layers, samples
    assert 0 <= sigma.min() and sigma.max() <= 2.0
    quantiles = sigma.flatten().sort().values / 2.0
    uniform = (torch.arange(quantiles.numel()) + 0.5) / quantiles.numel()
    assert (quantiles - uniform).abs().max() < 1.95 / quantiles.numel() ** 0.5, "Kolmogorov-Smirnov at 0.001"
    pairs = {
        "samples": (sigma[..., 1:], sigma[..., :-1]),
        "layers": (sigma[:, 0], sigma[:, 1]),
        "calls": (sigma[1:], sigma[:-1]),
    }
    for name, (a, b) in pairs.items():
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert correlation.abs() < 4 / a.numel() ** 0.5, name


@pytest.mark.parametrize("variant", DROPS)
def test_layers_sample_independently(variant: str) -> None:
    """With one layer perturbed at a time, the same seed must not perturb both layers alike."""
    model = build("llama", dropout=False, attention_drop=DROPS[variant]).train()
    outputs = forward(model, inputs("llama") | {"output_attentions": True})
    first, second = outputs.attentions
    stock = forward(model.eval(), inputs("llama") | {"output_attentions": True}).attentions
    pairs = zip((first, second), stock, strict=True)
    changes = [((perturbed - clean) * 1e6).trunc().sign() for perturbed, clean in pairs]
    assert all(change.any() for change in changes) and not torch.equal(*changes)


@pytest.mark.parametrize("variant", DROPS)
@pytest.mark.parametrize("family", ["llama", "marian"])
def test_nothing_leaks_from_later_tokens(family: str, variant: str) -> None:
    model, batch = build(family, dropout=False, attention_drop=DROPS[variant]).train(), inputs(family)
    ids = "input_ids" if family == "llama" else "labels"
    changed = batch | {ids: batch[ids].clone()}
    changed[ids][:, -2:] = 63 - changed[ids][:, -2:]
    before, after = (forward(model, b).logits for b in (batch, changed))
    # Marian shifts its labels to the right, so it does not read the last one.
    known = batch[ids].shape[1] - 2
    torch.testing.assert_close(before[:, :known], after[:, :known], rtol=0, atol=1e-6)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("variant", DROPS)
@pytest.mark.parametrize(
    ("family", "padding"),
    [("bert", "right"), ("llama", "left"), ("llama", "right"), ("marian", "left"), ("marian", "right")],
)
def test_padding_tokens_do_not_matter(family: str, variant: str, padding: str) -> None:
    model = build(family, dropout=False, attention_drop=DROPS[variant]).train()
    batch = inputs(family, padding=padding)
    hidden = batch["attention_mask"] == 0
    changed = batch | {"input_ids": batch["input_ids"].masked_fill(hidden, 7)}
    before, after = (forward(model, b).logits for b in (batch, changed))
    if family == "llama":
        before, after = before[~hidden], after[~hidden]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "marian"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_equals_stock(family: str, num_beams: int) -> None:
    batch = inputs(family, padding="left")
    del batch["labels"]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    model = build(family, attention_drop=DROPS["hard_mask"])
    generated = model.generate(**batch, **options)
    assert {row.calls for row in report(model).rows} == {0}
    model.set_attn_implementation("sdpa")
    assert torch.equal(generated, model.generate(**batch, **options))


@pytest.mark.parametrize("variant", DROPS)
@pytest.mark.parametrize("family", ["llama", "marian"])
def test_generation_in_training_mode_is_perturbed_with_a_cache(family: str, variant: str) -> None:
    batch = inputs(family, padding="left")
    del batch["labels"]
    model = build(family, dropout=False, attention_drop=DROPS[variant]).train()
    with torch.no_grad():
        torch.manual_seed(0)
        generated = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert generated.shape[0] == 4
    assert all(row.calls >= 1 for row in report(model).rows)


def test_loss_arguments_of_the_trainer_do_not_affect_attention() -> None:
    model, batch = build("llama", dropout=False).train(), inputs("llama")
    count = torch.tensor(4 * 9)
    for_the_loss = {"num_items_in_batch": count, "shift_labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}
    torch.testing.assert_close(forward(model, batch | for_the_loss).loss, forward(model, batch).loss)


def test_labels_may_come_along_when_generating() -> None:
    """Seq2SeqTrainer passes the whole batch to `generate`, and Marian passes it on to its attention."""
    model, batch = build("marian"), inputs("marian")
    without = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert torch.equal(model.generate(**batch, max_new_tokens=4), model.generate(**without, max_new_tokens=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", DROPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_and_autocast_train(family: str, variant: str, dtype: torch.dtype) -> None:
    batch = inputs(family, padding="left" if family != "vit" else None)
    model = build(family, attention_drop=DROPS[variant]).train()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**batch).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model = model.to(dtype)
    model.zero_grad()
    batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}
    model(**batch).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
