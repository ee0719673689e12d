"""Every input of a batch is repeated in the layout that the model reads, or raises an error with its name."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from hf_attentiondrop.training.doubling import batch_size_of, check_packing, first_pass, repeat_rows

from .models import build, inputs


def test_batch_first_tensors_are_concatenated() -> None:
    values = {"input_ids": torch.arange(6).view(2, 3), "labels": torch.tensor([0, 1]), "flag": True, "none": None}
    doubled = repeat_rows(values, 2)
    assert doubled["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert doubled["labels"].tolist() == [0, 1, 0, 1]
    assert doubled["flag"] is True and doubled["none"] is None
    assert values["input_ids"].shape == (2, 3), "the batch itself does not change"


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_position_ids_of_several_axes_are_repeated_along_their_rows(batch_size: int) -> None:
    position_ids = torch.arange(3 * batch_size * 4).view(3, batch_size, 4)
    doubled = repeat_rows({"position_ids": position_ids}, batch_size)["position_ids"]
    assert doubled.shape == (3, 2 * batch_size, 4)
    assert all(torch.equal(half, position_ids) for half in doubled.chunk(2, dim=1))


def test_inputs_shared_by_all_rows_are_kept() -> None:
    values = {
        "position_ids": torch.arange(4)[None],
        "attention_mask": torch.ones(1, 1, 4, 4),
        "cache_position": torch.arange(2),
        "scalar": torch.tensor(3.0),
    }
    assert all(repeat_rows(values, 2)[name] is value for name, value in values.items())
    masks = {"full_attention": torch.ones(1, 1, 4, 4), "sliding_attention": torch.ones(2, 1, 4, 4)}
    repeated = repeat_rows({"attention_mask": masks}, 2)["attention_mask"]
    assert [len(mask) for mask in repeated.values()] == [1, 4]
    assert repeat_rows({"attention_mask": torch.ones(1, 4)}, 1)["attention_mask"].shape == (2, 4)


def test_offsets_of_packed_documents_are_continued() -> None:
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    doubled = repeat_rows({"cu_seq_lens_q": offsets, "max_length_q": 4, "input_ids": torch.zeros(1, 7)}, 1)
    assert doubled["cu_seq_lens_q"].tolist() == [0, 3, 7, 10, 14] and doubled["cu_seq_lens_q"].dtype == torch.int32
    assert doubled["max_length_q"] == 4 and doubled["input_ids"].shape == (2, 7)


def test_a_single_document_needs_no_offsets() -> None:
    """Offsets would mark two packed documents, but the doubled batch has two rows."""
    batch = {"cu_seq_lens_q": torch.tensor([0, 7]), "seq_idx": torch.zeros(1, 7), "input_ids": torch.zeros(1, 7)}
    doubled = repeat_rows(batch, 1)
    assert doubled["cu_seq_lens_q"] is None and doubled["seq_idx"].shape == (2, 7)


def test_lists_of_images_are_repeated_whole() -> None:
    values = {"pixel_values": torch.rand(20, 6), "image_grid_thw": torch.ones(3, 3), "input_ids": torch.zeros(2, 5)}
    doubled = repeat_rows(values, 2)
    assert torch.equal(doubled["pixel_values"], values["pixel_values"].repeat(2, 1))
    assert doubled["image_grid_thw"].shape == (6, 3)


def test_some_rows_are_repeated() -> None:
    states = torch.arange(6.0).view(3, 2)
    values = {
        "input_ids": states,
        "position_ids": torch.arange(18).view(3, 3, 2),
        "attention_mask": torch.ones(1, 1, 2, 2),
        "encoder_outputs": BaseModelOutput(states),
        "pair": (states,),
        "text": ["a", "b", "c"],
        "flag": True,
    }
    repeated = repeat_rows(values, 3, torch.tensor([2, 0]))
    for value in (repeated["input_ids"], repeated["encoder_outputs"].last_hidden_state, repeated["pair"][0]):
        assert torch.equal(value, states[[0, 1, 2, 2, 0]])
    assert torch.equal(repeated["position_ids"], values["position_ids"][:, [0, 1, 2, 2, 0]])
    assert repeated["text"] == ["a", "b", "c", "c", "a"] and repeated["flag"] is True
    assert repeated["attention_mask"] is values["attention_mask"]
    unchanged = repeat_rows(values, 3, torch.tensor([], dtype=torch.long))
    assert unchanged.keys() == values.keys() and all(unchanged[name] is values[name] for name in values)
    assert unchanged is not values, "the Trainer may pop the labels"


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("pixel_values", torch.zeros(2, 3, 4, 4), "images, clips or sounds"),
        ("image_grid_thw", torch.ones(5, 3), "images, clips or sounds"),
        ("image_sizes", [(4, 4), (4, 4)], "images, clips or sounds"),
        ("cu_seq_lens_q", torch.tensor([0, 3, 7]), "offsets of packed documents"),
    ],
)
def test_inputs_whose_entries_belong_to_unknown_rows_raise_unless_all_rows_are_repeated(
    name: str, value: Any, kind: str
) -> None:
    """Also where their number equals the batch size: the first row may own both images, the other none."""
    batch = {"input_ids": torch.zeros(2, 7), name: value}
    with pytest.raises(ValueError, match=f"the input `{name}` lists .*{kind} of all 2 rows.*consistency_fraction=1"):
        repeat_rows(batch, 2, torch.tensor([1]))
    assert repeat_rows(batch, 2, torch.tensor([], dtype=torch.long))[name] is value
    assert len(repeat_rows(batch, 2)[name]) > len(value)


def test_images_that_are_the_main_input_are_repeated_by_row() -> None:
    images = torch.rand(3, 1, 4, 4)
    repeated = repeat_rows({"pixel_values": images}, 3, torch.tensor([1]), "pixel_values")["pixel_values"]
    assert torch.equal(repeated, images[[0, 1, 2, 1]])


def test_nested_structures_are_repeated() -> None:
    states = torch.rand(2, 3, 4)
    doubled = repeat_rows(
        {"encoder_outputs": BaseModelOutput(states), "pair": (states,), "masks": {"full": states}, "text": ["a", "b"]},
        2,
    )
    assert isinstance(doubled["encoder_outputs"], BaseModelOutput)
    assert doubled["encoder_outputs"].last_hidden_state.shape == (4, 3, 4)
    assert doubled["pair"][0].shape == (4, 3, 4) and doubled["masks"]["full"].shape == (4, 3, 4)
    assert doubled["text"] == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("edge_index", torch.zeros(2, 7), r"shape \(2, 7\)"),
        ("past_key_values", DynamicCache(), "a DynamicCache"),
        ("boxes", [torch.zeros(4)], "a list"),
    ],
)
def test_an_unknown_input_raises_with_its_name(name: str, value: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"the input `{name}`.*first dimension of 3, the batch size, got {got}"):
        repeat_rows({name: value}, 3)


def test_the_batch_size_comes_from_the_main_input() -> None:
    values = {"pixel_values": torch.zeros(7, 3), "input_ids": torch.zeros(2, 5)}
    assert batch_size_of(values) == 2 and batch_size_of(values, "pixel_values") == 7
    with pytest.raises(ValueError, match=r"Cannot tell the batch size.*got \['other'\]"):
        batch_size_of({"other": torch.zeros(2)})


@pytest.mark.parametrize("family", ["bert", "vit", "marian", "llama"])
def test_a_doubled_batch_returns_every_output_twice(family: str) -> None:
    model, batch = build(family, attn_implementation="sdpa"), inputs(family)
    outputs = model(**batch, output_hidden_states=True)
    doubled = model(**repeat_rows(batch, 4), output_hidden_states=True)
    torch.testing.assert_close(doubled.loss, outputs.loss)
    torch.testing.assert_close(doubled.logits, torch.cat((outputs.logits, outputs.logits)))
    half = first_pass(doubled, 4, 4)
    torch.testing.assert_close(half.logits, outputs.logits)
    assert type(half) is type(outputs)


def test_packed_documents_stay_apart_in_both_rows() -> None:
    """With position ids as the only marks, as padding-free collators make them."""
    model = build("llama", attn_implementation="sdpa")
    input_ids = torch.randint(3, 60, (1, 9))
    packed = {"input_ids": input_ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    second = model(input_ids[:, 4:]).logits
    for row in model(**repeat_rows(packed, 1), use_cache=False).logits:
        torch.testing.assert_close(row[4:], second[0])


def test_packed_documents_that_flash_attention_would_mix_raise() -> None:
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    with pytest.raises(
        ValueError,
        match="got `position_ids` alone.*documents would attend to each other.*return_flash",
    ):
        check_packing(packed, "flash_attention_2")
    check_packing(packed, "attentiondrop")
    check_packing({"position_ids": torch.arange(5)[None]}, "flash_attention_2")
    check_packing({**packed, "cu_seq_lens_q": torch.tensor([0, 3, 5])}, "flash_attention_2")
