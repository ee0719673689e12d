"""The fields of the consistency term: parsing, validation and resolution."""

from dataclasses import dataclass
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_attentiondrop.training.arguments import (
    AttentionDropSeq2SeqTrainingArguments,
    AttentionDropTrainingArguments,
    ConsistencyArguments,
    resolve_consistency,
)


CLASSES = [AttentionDropTrainingArguments, AttentionDropSeq2SeqTrainingArguments]


@pytest.mark.parametrize("kind", CLASSES)
def test_they_parse_from_a_command_line_along_with_the_stock_fields(kind: type, tmp_path: Any) -> None:
    command = ["--output_dir", str(tmp_path), "--consistency_weight", "0.5", "--consistency_divergence", "js"]
    (values,) = HfArgumentParser(kind).parse_args_into_dataclasses([*command, "--learning_rate", "0.1"])
    assert isinstance(values, TrainingArguments) and values.learning_rate == 0.1
    assert (values.consistency_weight, values.consistency_divergence) == (0.5, "js")
    assert values.to_dict()["consistency_warmup_steps"] == 0
    with pytest.raises(SystemExit):
        HfArgumentParser(kind).parse_args_into_dataclasses([*command, "--consistency_divergence", "hellinger"])


@pytest.mark.parametrize("kind", [ConsistencyArguments, *CLASSES])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"consistency_weight": -0.1}, "`consistency_weight` must be a finite number >= 0, got -0.1"),
        ({"consistency_weight": float("nan")}, "`consistency_weight` must be .*got nan"),
        ({"consistency_weight": float("inf")}, "`consistency_weight` must be .*got inf"),
        ({"consistency_weight": "1"}, "`consistency_weight` must be .*got '1'"),
        ({"consistency_divergence": "l2"}, "must be one of .*'symmetric_kl', 'kl', 'js'.*got 'l2'"),
        ({"consistency_warmup_steps": -1}, "`consistency_warmup_steps` must be an integer >= 0, got -1"),
        (
            {"consistency_weight": 0.5, "consistency_shared_trunk": "no"},
            "`consistency_shared_trunk` must be True or False",
        ),
        ({"consistency_warmup_steps": 0.5}, "`consistency_warmup_steps` must be an integer >= 0, got 0.5"),
        ({"consistency_fraction": 0}, "`consistency_fraction` must be a number > 0 and <= 1, got 0. .*no divergence"),
        ({"consistency_fraction": 1.5}, "`consistency_fraction` must be .*got 1.5"),
        ({"consistency_fraction": float("nan")}, "`consistency_fraction` must be .*got nan"),
        ({"consistency_fraction": True}, "`consistency_fraction` must be .*got True"),
        ({"consistency_interval": 0}, "`consistency_interval` must be an integer >= 1, got 0"),
        ({"consistency_interval": 2.0}, "`consistency_interval` must be an integer >= 1, got 2.0"),
    ],
)
def test_bad_values_raise(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_they_mix_into_other_arguments_and_keep_their_checks(tmp_path: Any) -> None:
    @dataclass
    class OtherArguments(TrainingArguments):
        threshold: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.threshold < 0:
                raise ValueError("threshold")

    @dataclass
    class Both(ConsistencyArguments, OtherArguments):
        pass

    assert Both(output_dir=str(tmp_path), consistency_weight=3).consistency_weight == 3
    with pytest.raises(ValueError, match="threshold"):
        Both(output_dir=str(tmp_path), threshold=-1)


def test_an_override_goes_before_the_arguments_and_these_before_the_default(tmp_path: Any) -> None:
    stock = TrainingArguments(str(tmp_path))
    assert resolve_consistency(stock) == ConsistencyArguments()
    args = AttentionDropTrainingArguments(str(tmp_path), consistency_weight=0.25, consistency_divergence="js")
    resolved = resolve_consistency(args, {"consistency_weight": 4.0, "consistency_divergence": None})
    assert resolved == ConsistencyArguments(consistency_weight=4.0, consistency_divergence="js")
    with pytest.raises(ValueError, match="`consistency_weight` must be a finite number >= 0, got -1"):
        resolve_consistency(stock, {"consistency_weight": -1})
