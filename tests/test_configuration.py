"""The configuration: errors for invalid values, and saving and loading in config.json and sub-configs."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, BertConfig, CLIPConfig, LlavaConfig, PreTrainedConfig

from hf_attentiondrop import AffineScaledConfig, AttentionDropConfig, GatedAttentionConfig
from hf_attentiondrop.integration.config_entries import register_config_entries
from hf_attentiondrop.methods import PERTURBATIONS
from hf_attentiondrop.methods.parsing import perturbation_from


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "soft"}, r"`variant` must be one of .*'hard', 'blur'.* got 'soft'"),
        ({"p": 2}, r"`p` must be a probability in \[0, 1\], got 2"),
        ({"p": -0.1}, "got -0.1"),
        ({"p": float("nan")}, "got nan"),
        ({"p": True}, "got True"),
        ({"p": "0.1"}, "got '0.1'"),
        ({"k": 0}, "`k` must be an integer >= 1 or a share between 0 and 1, got 0"),
        ({"k": 2.5}, "got 2.5"),
        ({"k": 5.0}, "got 5.0. It is the number of highest scores .* or the share"),
        ({"k": 1.0}, "got 1.0"),
        ({"k": 0.0}, "got 0.0"),
        ({"k": -0.1}, "got -0.1"),
        ({"k": float("nan")}, "got nan"),
        ({"k": True}, "got True"),
        ({"k": "0.1"}, "got '0.1'"),
        ({"fill": "mean"}, "`fill` must be one of"),
        ({"variant": "blur", "sigma_max": -1.0}, "`sigma_max` must be a finite number >= 0, got -1.0"),
        ({"variant": "blur", "sigma_max": float("inf")}, "got inf"),
        ({"variant": "blur", "width": 4}, "`width` must be an odd integer >= 1, got 4"),
        ({"variant": "blur", "width": -1}, "got -1"),
        ({"layers": []}, "`layers` must be None or a non-empty list of integers"),
        ({"layers": ["first"]}, "`layers` must be None"),
        ({"layers": 3}, "`layers` must be None"),
        ({"attentions": []}, "`attentions` must be a non-empty list"),
        ({"attentions": ["self"]}, "`attentions` must be .*'encoder_self', 'decoder_self', 'cross'"),
        ({"attentions": "cross"}, "`attentions` must be"),
    ],
)
def test_an_invalid_value_raises_with_the_expected_one(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionDropConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"variant": "blur", "p": 0.9},
            "Unknown key 'p' in `attention_drop`: variant='blur' does not use it, so 0.9 would have no effect. It is "
            "a setting of hard",
        ),
        ({"variant": "blur", "k": 7}, "Unknown key 'k'"),
        ({"variant": "blur", "fill": "mask"}, "It is a setting of hard. Leave it out, or name another variant."),
        ({"sigma_max": 2.0}, "Unknown key 'sigma_max' in `attention_drop`: variant='hard' does not use it"),
        ({"width": 3}, "The keys of hard are p, k, fill, layers, attentions."),
    ],
)
def test_a_setting_of_another_variant_raises(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AttentionDropConfig(**values)


@pytest.mark.parametrize("variant", PERTURBATIONS)
def test_settings_go_to_a_dict_and_back(variant: str) -> None:
    drop = AttentionDropConfig(variant=variant)
    assert type(drop) is PERTURBATIONS[variant]
    assert perturbation_from(drop.to_dict()) == drop
    assert drop.to_dict().keys() == {"variant", *drop.settings()}


@pytest.mark.parametrize("variant", ["hard", "blur"])
def test_a_checkpoint_of_an_early_release_reads_the_same(variant: str, tmp_path: Path) -> None:
    """Early releases wrote the settings of both variants and ignored those of the other variant."""
    early = {"variant": variant, "p": 0.3, "k": 7, "fill": "zero", "sigma_max": 0.5, "width": 3}
    early |= {"layers": [0], "attentions": ["cross"]}
    BertConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_drop": early}))
    own = {"p": 0.3, "k": 7, "fill": "zero"} if variant == "hard" else {"sigma_max": 0.5, "width": 3}
    expected = AttentionDropConfig(variant=variant, **own, layers=[0], attentions=["cross"])
    assert AutoConfig.from_pretrained(tmp_path).attention_drop == expected


@pytest.mark.parametrize(
    ("values", "plain"),
    [
        ({"p": np.float64(0.3)}, {"p": 0.3}),
        ({"p": np.float32(0.5)}, {"p": 0.5}),
        ({"p": torch.tensor(0.5)}, {"p": 0.5}),
        ({"k": np.int64(3)}, {"k": 3}),
        ({"layers": range(3)}, {"layers": (0, 1, 2)}),
        ({"layers": (0, 1)}, {"layers": (0, 1)}),
        ({"layers": np.arange(2)}, {"layers": (0, 1)}),
        ({"layers": torch.arange(2)}, {"layers": (0, 1)}),
        ({"layers": [np.int32(0), -1]}, {"layers": (0, -1)}),
        ({"variant": np.str_("blur"), "width": np.int8(3)}, {"variant": "blur", "width": 3}),
    ],
    ids=str,
)
def test_numbers_and_arrays_of_numpy_and_torch_become_plain(values: dict[str, Any], plain: dict[str, Any]) -> None:
    drop = AttentionDropConfig(**values)
    assert drop == AttentionDropConfig(**plain)
    assert json.loads(json.dumps(drop.to_dict())) == AttentionDropConfig(**plain).to_dict()
    assert all(type(getattr(drop, name)) is type(value) for name, value in plain.items())
    assert {type(layer) for layer in drop.layers or ()} <= {int}


def test_the_same_holds_for_learned_methods() -> None:
    affine = AffineScaledConfig(momentum=np.float64(0.5), gate=np.True_, layers=range(2))
    assert (
        json.loads(json.dumps(affine.to_dict()))
        == AffineScaledConfig(momentum=0.5, gate=True, layers=[0, 1]).to_dict()
    )
    assert GatedAttentionConfig(layers=np.array([1])) == GatedAttentionConfig(layers=[1])


@pytest.mark.parametrize(
    "values", [{"layers": "01"}, {"layers": np.array(1)}, {"layers": {0: 1}}, {"k": np.float64(3)}, {"p": np.True_}]
)
def test_similar_entries_raise(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(values))}` must be"):
        AttentionDropConfig(**values)


def test_an_unknown_key_raises_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="Unknown key 'sigma'.*Did you mean 'sigma_max'"):
        perturbation_from({"sigma": 1.0})


def test_a_value_that_is_no_mapping_raises() -> None:
    with pytest.raises(TypeError, match="must be one of HardMasking, .* a dict"):
        BertConfig(attention_drop=0.1)


def test_json_round_trip(tmp_path: Path) -> None:
    drop = AttentionDropConfig(variant="blur", layers=[0, -1], attentions=["cross"])
    BertConfig(attention_drop=drop).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_drop"] == drop.to_dict()
    for restored in (BertConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert restored.attention_drop == drop
    assert copy.deepcopy(restored).attention_drop == drop


def test_a_share_of_the_keys_goes_through_json(tmp_path: Path) -> None:
    BertConfig(attention_drop={"k": 0.25}).save_pretrained(tmp_path)
    restored = AutoConfig.from_pretrained(tmp_path).attention_drop
    assert restored.k == 0.25 and restored.summary == "hard p=0.1 k=0.25 fill=mask"


def test_from_pretrained_takes_a_config_or_a_dict(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attention_drop is None
    for value in (AttentionDropConfig(p=0.3), {"p": 0.3}):
        assert AutoConfig.from_pretrained(tmp_path, attention_drop=value).attention_drop.p == 0.3
    with pytest.raises(ValueError, match="got 3"):
        AutoConfig.from_pretrained(tmp_path, attention_drop={"p": 3})


def test_a_config_without_the_entry_saves_none(tmp_path: Path) -> None:
    config = BertConfig(attention_drop={"p": 0.2})
    config.attention_drop = None
    config.save_pretrained(tmp_path)
    assert "attention_drop" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("config_class", [CLIPConfig, LlavaConfig])
def test_sub_configs_follow_and_keep_their_differences(config_class: type[PreTrainedConfig], tmp_path: Path) -> None:
    config = config_class(attention_drop={"p": 0.2})
    assert config.text_config.attention_drop.p == config.vision_config.attention_drop.p == 0.2
    config.vision_config.attention_drop = AttentionDropConfig(p=0.4)
    config.save_pretrained(tmp_path)
    restored = config_class.from_pretrained(tmp_path)
    assert [c.attention_drop.p for c in (restored, restored.text_config, restored.vision_config)] == [0.2, 0.2, 0.4]
    restored = config_class.from_pretrained(tmp_path, attention_drop={"p": 0.1})
    assert [c.attention_drop.p for c in (restored, restored.text_config, restored.vision_config)] == [0.1, 0.1, 0.1]


def test_another_owner_of_the_entry_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedConfig, "attention_drop", property(lambda self: None))
    with pytest.raises(RuntimeError, match="already exists"):
        register_config_entries()
