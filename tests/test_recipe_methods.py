"""Flags of a recipe for perturbations: `--attention_drop`, and the settings of the methods in the table."""

import json
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification

from hf_attentiondrop import HardMasking, report
from hf_attentiondrop.attention.call import Attend, AttentionCall, AttentionOutput
from hf_attentiondrop.integration.config_entries import to_entry
from hf_attentiondrop.methods import PERTURBATIONS
from hf_attentiondrop.methods.card import MethodCard
from hf_attentiondrop.methods.method import Perturbation

from .recipe_runs import NO_EVALUATION, RECIPES, error_line, load, read_json, run_with_file


QUICK = ["--max_steps", "2", "--num_hidden_layers", "1", *NO_EVALUATION]
BOTH = [{"variant": "hard", "p": 0.25}, {"variant": "blur", "sigma_max": 0.5, "layers": [0]}]
BOTH_AS_TEXT = "[{variant: hard, p: 0.25}, {variant: blur, sigma_max: 0.5, layers: [0]}]"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("image_classification", monkeypatch)


def parse(recipe: ModuleType, folder: Path, settings: dict[str, Any], *flags: str) -> tuple[Any, dict[str, Any]]:
    """Parses a file of settings and flags that override it, and returns the entry of the model and the record."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    parser = recipe.RecipeParser("", (recipe.ImageModelArguments, recipe.ImageTrainingArguments))
    *_, attention = parser.parse(["--config", str(file), *flags])
    drop = attention["attention_drop"]
    return None if drop is None else to_entry(drop), parser.values


@pytest.mark.parametrize(
    ("settings", "flags", "expected"),
    [
        ({}, ["--attention_drop", BOTH_AS_TEXT], BOTH),
        ({"attention_drop": BOTH}, [], BOTH),
        ({"attention_drop": BOTH_AS_TEXT}, [], BOTH),
        ({"attention_drop": BOTH}, ["--attention_drop", "[{variant: blur}]"], [{"variant": "blur"}]),
        ({"attention_drop": {"p": 1e-5}}, [], {"p": 1e-5}),
        ({}, ["--attention_drop", "{variant: blur, width: 3}"], {"variant": "blur", "width": 3}),
    ],
    ids=["list", "list in the file", "text in the file", "flag over file", "mapping in the file", "mapping"],
)
def test_attention_drop_is_one_perturbation_or_a_list(
    recipe: ModuleType, tmp_path: Path, settings: dict[str, Any], flags: list[str], expected: Any
) -> None:
    entry, record = parse(recipe, tmp_path, settings, *flags)
    assert entry == record["attention_drop"] == to_entry(expected)
    assert not record.keys() & {"variant", "p", "layers", "sigma_max", "width"}


@pytest.mark.parametrize(
    ("settings", "flags", "p"),
    [
        ({}, ["--p", "[0.2]"], [0.2]),
        ({}, ["--p", "{from: 0.2, to: 0.0}"], {"from": 0.2, "to": 0.0}),
        ({"p": {"from": 0.2, "to": 0.0}}, [], {"from": 0.2, "to": 0.0}),
        ({"p": [{"heads": [0.1, 0.2]}]}, [], [{"heads": [0.1, 0.2]}]),
        ({"p": [0.1]}, ["--p", "0.3"], 0.3),
    ],
    ids=str,
)
def test_p_may_differ_between_layers(
    recipe: ModuleType, tmp_path: Path, settings: dict[str, Any], flags: list[str], p: Any
) -> None:
    drop, record = parse(recipe, tmp_path, settings, *flags)
    assert drop["p"] == record["p"] == p


def test_run_with_a_list_is_reproduced_and_described(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = run_with_file(recipe, tmp_path, {"attention_drop": BOTH}, *QUICK), tmp_path / "second"
    both = "hard p=0.25 k=5 fill=mask + blur sigma_max=0.5 width=5"
    assert f"  {both}; 1 of 1 modules, 2 passes" in capsys.readouterr().out
    assert read_json(first / "config.json")["attention_drop"] == to_entry(BOTH)
    recipe.main(["--config", str(first / "run.yaml"), "--output_dir", str(second)])
    weights, reproduced = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert weights.keys() == reproduced.keys()
    assert all((weights[name] == reproduced[name]).all() for name in weights)
    assert read_json(second / "config.json") == read_json(first / "config.json")

    model = AutoModelForImageClassification.from_pretrained(first, attn_implementation="attentiondrop")
    assert [row.applied for row in report(model).rows] == [both]
    card = (first / "README.md").read_text()
    assert "### AttentionDrop: hard attention masking" in card
    assert "### AttentionDrop: blurred attention smoothing" in card
    assert "| `p` | 0.25 |" in card and "| `sigma_max` | 0.5 |" in card


def test_a_list_perturbs_a_learned_method(recipe: ModuleType, tmp_path: Path) -> None:
    flags = ["--attn_implementation", "affine_scaled", "--attention_drop", BOTH_AS_TEXT]
    config = read_json(run_with_file(recipe, tmp_path, {}, *QUICK, *flags) / "config.json")
    assert config["attention_drop"] == to_entry(BOTH)
    assert config["attention_reweighting"]["method"] == "affine_scaled"


@pytest.mark.parametrize(
    ("settings", "flags", "expected", "left_out"),
    [
        (
            {"variant": "hard", "p": 0.2, "k": 3},
            ["--attention_drop", BOTH_AS_TEXT],
            BOTH,
            "--attention_drop: the settings of --config .* do not apply: variant, p, k. ",
        ),
        (
            {"attention_drop": BOTH},
            ["--variant", "blur", "--width", "3"],
            {"variant": "blur", "width": 3},
            "--variant blur: the settings of --config .* do not apply: attention_drop. ",
        ),
        (
            {"attention_drop": BOTH},
            ["--attn_implementation", "sdpa"],
            None,
            "--attn_implementation sdpa: the settings of --config .* do not apply: attention_drop. ",
        ),
        (
            {"p": 0.2},
            ["--attn_implementation", "affine_scaled", "--attention_drop", BOTH_AS_TEXT],
            BOTH,
            "--attn_implementation affine_scaled and --attention_drop: .* do not apply: p. ",
        ),
    ],
    ids=["list over flags", "flags over list", "baseline over list", "learned method and list over flags"],
)
def test_settings_of_the_file_do_not_mix_with_the_method_on_the_command_line(
    recipe: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    flags: list[str],
    expected: Any,
    left_out: str,
) -> None:
    entry, record = parse(recipe, tmp_path, settings, *flags)
    assert entry == (None if expected is None else to_entry(expected))
    assert ("attention_drop" in record) == isinstance(expected, list)
    (note,) = [line for line in capsys.readouterr().err.splitlines() if ": note: " in line]
    position = -1
    for part in left_out.split(".*"):
        position = note.find(part, position + 1)
        assert position >= 0, note


EXPECTED = "expected a YAML mapping or a list of mappings such as '[{variant: hard, p: 0.1}, "


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--attention_drop", BOTH_AS_TEXT, "--variant", "blur", "--p", "0.3"],
            "--attention_drop, --variant, --p: expected either --attention_drop or the flags of a single "
            "perturbation, got both, and it is ambiguous which perturbation the latter configure. Write "
            "{variant: blur, p: 0.3} into --attention_drop, or leave --attention_drop out.",
        ),
        (["--attention_drop", "hard"], f"argument --attention_drop: {EXPECTED}"),
        (["--attention_drop", "[hard, blur]"], f"argument --attention_drop: {EXPECTED}"),
        (["--attention_drop", ""], f"argument --attention_drop: {EXPECTED}"),
        (["--attention_drop", "[{variant: hard}"], "argument --attention_drop: expected YAML such as '[{variant"),
        (["--attention_drop", "[]"], "--attention_drop: `attention_drop` must hold at least one perturbation"),
        (
            ["--attention_drop", "[{variant: hard}, {variant: blurr}]"],
            "--attention_drop: Entry 1 of the list: `attention_drop`: `variant` must be one of ('hard', 'blur'",
        ),
        (
            ["--attention_drop", "[{variant: hard}, {variant: blur, p: 0.3}]"],
            "--attention_drop: Entry 1 of the list: Unknown key 'p' in `attention_drop`: variant='blur' does not use "
            "it",
        ),
        (["--attention_drop", "{p: 2}"], "--attention_drop: HardMasking: `p` must be a probability in [0, 1], got 2."),
        (
            ["--attention_drop", BOTH_AS_TEXT, "--attn_implementation", "sdpa"],
            "--attention_drop: settings of AttentionDrop need --attn_implementation attentiondrop or one of",
        ),
        (["--attention_drop", "{layers: [7]}", *QUICK], "names layer 7, and ViTForImageClassification has no such"),
    ],
)
def test_bad_attention_drop_exits_with_one_line(
    recipe: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], message: str
) -> None:
    assert message in error_line(recipe, capfd, *flags, "--output_dir", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_list_in_the_file_and_a_setting_on_the_command_line_exit_with_one_line(
    recipe: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"attention_drop": BOTH}))
    line = error_line(recipe, capfd, "--config", file, "--p", "0.3", "--output_dir", tmp_path / "out")
    assert "--attention_drop, --p: expected either" in line and "Write {p: 0.3} into --attention_drop" in line


@dataclass(frozen=True, repr=False)
class Scaling(Perturbation):
    """Scales the attention output.

    Args:
        p (`float`, defaults to 0.5):
            Probability of nothing.
    """

    variant = "scaling"
    scheduled = "p"

    p: float = 0.5

    def attend(self, call: AttentionCall, attend: Attend, p: Tensor, /) -> AttentionOutput:
        return attend(call)

    def cards(self) -> tuple[MethodCard, ...]:
        return ()


@pytest.fixture
def method_flags(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(RECIPES)
    from shared import method_flags

    return method_flags


def test_help_says_which_variants_use_a_setting(method_flags: ModuleType) -> None:
    shared = method_flags.describe_setting("p", {"hard": HardMasking, "scaling": Scaling})
    assert shared.startswith("hard: Probability in [0, 1] with which each of the `k` highest scores")
    assert shared.endswith("(default: 0.1) scaling: Probability of nothing. (default: 0.5)")
    same = method_flags.describe_setting("p", {"one": Scaling, "two": Scaling})
    assert same == "one, two: Probability of nothing. (default: 0.5)"
    assert method_flags.describe_setting("layers", PERTURBATIONS).startswith("Layers to act on")


def test_settings_with_one_name_have_one_type() -> None:
    hints = [get_type_hints(method) for method in PERTURBATIONS.values()]
    for name in {name for method in PERTURBATIONS.values() for name in method.settings()}:
        assert len({str(of_method[name]) for of_method in hints if name in of_method}) == 1, name


def test_flags_take_every_setting_of_every_method(method_flags: ModuleType) -> None:
    parser = ArgumentParser()
    method_flags.add_method_flags(parser)
    for variant, method in PERTURBATIONS.items():
        values = {name: value for name, value in method().to_dict().items() if value is not None}
        flags = [
            part
            for name, value in values.items()
            for part in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
        ]
        assert vars(parser.parse_args(flags)) == values, variant
