"""Packed documents never mix, for all arguments by which TRL and Transformers' collators mark them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_attentiondrop import AffineScaledConfig, AttentionDropConfig, report

from .models import VOCAB_SIZE, build


METHODS: dict[str, dict[str, Any]] = {
    "hard": {"attention_drop": AttentionDropConfig(p=0.5)},
    "hard_zero": {"attention_drop": AttentionDropConfig(p=0.5, fill="zero")},
    "blur": {"attention_drop": AttentionDropConfig(variant="blur")},
    "affine": {"attn_implementation": "affine_scaled", "attention_reweighting": AffineScaledConfig(init="paper")},
}
LENGTHS = [5, 3, 4]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCAB_SIZE)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w3")


def documents(count: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    ids = [torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {"packing": True, "max_length": 16}) for method in METHODS),
        *((method, {"padding_free": True, "max_length": None}) for method in ("hard", "affine")),
    ],
    ids=str,
)
def test_sft_trains_on_packed_documents(
    method: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build("llama", **METHODS[method])
    arguments = SFTConfig(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", **options)
    trainer = SFTTrainer(model, arguments, train_dataset=documents(), processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert method == "affine" or {row.calls for row in report(model).rows} >= {2}


@pytest.mark.parametrize("flags", [{}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True}], ids=str)
@pytest.mark.parametrize("method", ["hard", "affine"])
def test_the_flattening_collator_trains(method: str, flags: dict[str, bool], tmp_path: Path) -> None:
    model = build("llama", **METHODS[method])
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none")
    collator = DataCollatorWithFlattening(**flags)
    Trainer(model, arguments, train_dataset=documents(), data_collator=collator).train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def packed() -> dict[str, torch.Tensor]:
    """Three documents in one row, with all arguments that TRL passes."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return {
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "seq_idx": torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))[None].int(),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(LENGTHS),
        "max_length_k": torch.tensor(max(LENGTHS)),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_documents_do_not_attend_to_each_other(method: str, training: bool) -> None:
    model = build("llama", **METHODS[method]).train(training)
    embeddings = torch.randn(1, sum(LENGTHS), 32, requires_grad=True)
    logits = model(inputs_embeds=embeddings, use_cache=False, **packed()).logits
    before, inside, _ = logits.split(LENGTHS, dim=1)
    (gradient,) = torch.autograd.grad(inside.square().sum(), embeddings)
    earlier, own, later = gradient.split(LENGTHS, dim=1)
    assert (earlier == 0).all() and (later == 0).all() and (own != 0).any()
    if not training:
        alone = model(inputs_embeds=embeddings[:, : LENGTHS[0]], use_cache=False).logits
        torch.testing.assert_close(before, alone)


@pytest.mark.parametrize("name", ["seq_idx", "cu_seq_lens_q"])
@pytest.mark.parametrize("mask", ["none", "padded"])
@pytest.mark.parametrize("method", METHODS)
def test_documents_that_the_mask_mixes_raise(method: str, mask: str, name: str) -> None:
    """With a cache, or an attention mask, Transformers does not infer documents from the position ids."""
    model, batch = build("llama", **METHODS[method]).train(), packed()
    batch["input_ids"] = torch.full((1, sum(LENGTHS)), 5)
    if mask == "padded":
        batch["attention_mask"] = torch.ones(1, sum(LENGTHS)).index_fill(1, torch.tensor([sum(LENGTHS) - 1]), 0)
    del batch["cu_seq_lens_q" if name == "seq_idx" else "seq_idx"], batch["cu_seq_lens_k"]
    with pytest.raises(ValueError, match=rf"`{name}`.*leak into each other.*position_ids.*use_cache=False"):
        model(use_cache=True, **batch)


def test_one_document_needs_no_mask() -> None:
    model = build("llama").train()
    ids = torch.full((1, 4), 5)
    ends, document = torch.tensor([0, 4]), torch.zeros(1, 4, dtype=torch.int32)
    model(ids, seq_idx=document, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=4, max_length_k=4)


@pytest.mark.parametrize("rows", [1, 2])
def test_offsets_continue_across_rows(rows: int) -> None:
    model = build("llama").train()
    ids, positions = torch.full((rows, 6), 5), torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(rows, -1)
    ends = torch.arange(0, 6 * rows + 1, 3)
    model(ids, position_ids=positions, cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False)


def test_packing_compiles_in_one_graph() -> None:
    model, batch = build("llama", **METHODS["hard"]).train(), packed()
    batch |= {"input_ids": torch.full((1, sum(LENGTHS)), 5), "use_cache": False}
    del batch["max_length_k"]
    torch.manual_seed(0)
    expected = model(**batch).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(**batch).logits, expected)
