"""The file of a study: what it may say, and one line for each mistake, before anything is written."""

import math
from pathlib import Path
from typing import Any

import pytest

from hf_attentiondrop.cli import main
from hf_attentiondrop.compare.study import parse_study, preset_path, read_study

from ..cli.commands import failure
from ..recipe_runs import ROOT
from .studies import SEARCH, STUDY, write_study


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (
        {"metric": {}},
        "Unknown key 'metric' in `study`: it would have no effect. Did you mean 'metrics'?",
    ),
    "missing keys": ({"title": None, "script": None}, "`study` has no title and no script. It needs title, script,"),
    "empty title": ({"title": " "}, "`title` must be a text, got ' '."),
    "number as script": ({"script": 3}, "`script` must be the path of a Python file, got 3."),
    "missing script": ({"script": "train.py"}, "script: found no script 'train.py' in "),
    "one method": ({"methods": {"none": {}}}, "`methods` must be a mapping from at least two methods"),
    "list of methods": ({"methods": ["none", "low"]}, "`methods` must be a mapping from at least two methods"),
    "method as number": ({"methods": {"none": 1, "low": {}}}, "{} for none, got {'none': 1, 'low': {}}"),
    "method without mapping": ({"methods": {"none": None, "low": {}}}, "for every method, write none: {} for none."),
    "method as path": ({"methods": {"none": {}, "../x": {}}}, "got '../x': it names a folder."),
    "unknown reference": (
        {"reference": "nine"},
        "`reference` must name one of the methods none, low, high, got 'nine'. Did you mean 'none'?",
    ),
    "list as reference": (
        {"reference": ["none"]},
        "`reference` must name one of the methods none, low, high, got ['none']",
    ),
    "no metric": ({"metrics": {}}, "`metrics` must be a mapping from at least one metric to higher or lower, got {}."),
    "unknown direction": ({"metrics": {"test_score": "up"}}, "to higher or lower, got {'test_score': 'up'}."),
    "no seed": ({"seeds": 0}, "`seeds` must be an integer from 1 to 1000, got 0."),
    "seeds as text": ({"seeds": "five"}, "`seeds` must be an integer from 1 to 1000, got 'five'."),
    "list of seeds": ({"seeds": [0, 1]}, "`seeds` must be an integer from 1 to 1000, got [0, 1]."),
    "unknown launcher": ({"launcher": "torchrun"}, "`launcher` must be accelerate or python, got 'torchrun'."),
    "arguments as list": ({"arguments": ["x"]}, "`arguments` must be a mapping from arguments to values, got ['x']."),
    "unknown argument": (
        {"arguments": {"gaate": 1}},
        "`arguments` has 'gaate', which tiny.py does not take. Did you mean 'gate'?",
    ),
    "unknown argument of a method": (
        {"methods": {"none": {}, "low": {"lay-ers": 1}}},
        "`methods.low` has 'lay-ers', which tiny.py does not take. Did you mean 'layers'?",
    ),
    "value of a switch": ({"arguments": {"fast": 2}}, "--fast of tiny.py takes no value, expected true or false"),
    "seed as argument": ({"arguments": {"seed": 1}}, "`arguments` sets 'seed', which the study sets for each run."),
    "infinite argument": (
        {"arguments": {"x": math.inf}},
        "`arguments` sets 'x' to inf, and records of runs hold finite",
    ),
    "list with an infinite number": ({"arguments": {"x": [1, math.inf]}}, "sets 'x' to [1, inf], and records of runs"),
    "infinite choice": (
        {"search": {**SEARCH, "spaces": {"low": {"x": {"choices": [1.0, math.inf]}}}}},
        "choices: [...]",
    ),
    "two spellings": (
        {"arguments": {"out-put": 1}, "methods": {"none": {}, "low": {"out_put": 2}}, "reference": "none"},
        "expected one spelling of an argument, got 'out-put' and 'out_put'.",
    ),
    "search as number": ({"search": 8}, "`search` must be a mapping of the fields of a Search, got 8."),
    "unknown key of the search": ({"search": {**SEARCH, "trails": 8}}, "Unknown key 'trails' in `search`"),
    "no trial": ({"search": {**SEARCH, "trials": 0}}, "`trials` must be an integer of at least 1, got 0."),
    "metric without direction": (
        {"search": {**SEARCH, "metric": "eval_score"}},
        "is none of the metrics, so its direction is unknown. Write metric: {eval_score: higher}, or",
    ),
    "search on test data": (
        {"search": {**SEARCH, "metric": "test_score"}},
        "`search.metric` must be measured on validation data, got 'test_score'",
    ),
    "no space": ({"search": {**SEARCH, "spaces": {}}}, "`spaces` must be a mapping from methods to arguments"),
    "empty space": ({"search": {**SEARCH, "spaces": {"low": {}}}}, "their spaces, none of them empty, got"),
    "space of an unknown method": (
        {"search": {**SEARCH, "spaces": {"hihg": {"x": [0, 1]}}}},
        "`search.spaces` must name one of the methods none, low, high, got 'hihg'. Did you mean 'high'?",
    ),
    "space of an unknown argument": (
        {"search": {**SEARCH, "spaces": {"low": {"y": [0, 1]}}}},
        "`search.spaces.low` has 'y', which tiny.py does not take.",
    ),
    "inverted range": (
        {"search": {**SEARCH, "spaces": {"low": {"x": [1, 0]}}}},
        "`spaces.low.x`: expected a range [low, high] with low < high, both finite, [low, high, log] with",
    ),
    "infinite range": (
        {"search": {**SEARCH, "spaces": {"low": {"x": [0, math.inf]}}}},
        "with low < high, both finite",
    ),
    "space of a fixed argument": (
        {"search": {**SEARCH, "arguments": {"x": 1}}},
        "searches 'x', which `search.arguments` sets, too. Leave one of them out.",
    ),
    "logarithm of 0": ({"search": {**SEARCH, "spaces": {"low": {"x": [0, 1, "log"]}}}}, "with 0 < low < high"),
    "no choice": ({"search": {**SEARCH, "spaces": {"low": {"x": {"choices": []}}}}}, "got {'choices': []}."),
}
TEXTS = {
    "no file": (None, "there is no file"),
    "no YAML": ("title: [", "expected YAML, "),
    "no mapping": ("- a\n- b", "`study` must be a mapping of the fields of a Study, got ['a', 'b']."),
    "boolean as name": (
        "methods:\n  dropout: {p: 0.1}\n  no: {}\n",
        "a name must be a text, and YAML reads no as False: write it in quotes, 'no'",
    ),
    "number as name": ("methods:\n  0.10: {}\n", "YAML reads 0.10 as 0.1: write it in quotes, '0.10'"),
    "key twice": ("methods:\n  a: {}\n  a: {p: 1}\n", "'a' is there twice"),
}


def check_failure(folder: Path, message: str, capsys: pytest.CaptureFixture[str], *flags: str) -> None:
    before = sorted(folder.iterdir())
    code, line = failure(capsys, "compare", *flags)
    assert code == 2
    assert message in line
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_study_ends_in_one_line(mistake: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    changes, message = MISTAKES[mistake]
    check_failure(tmp_path, message, capsys, str(write_study(tmp_path, **changes)))


@pytest.mark.parametrize("mistake", TEXTS)
def test_a_file_that_is_no_study_ends_in_one_line(mistake: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = TEXTS[mistake]
    if text is not None:
        (tmp_path / "tiny.yaml").write_text(text)
    check_failure(tmp_path, message, capsys, "tiny.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected the file of a study or --preset, got neither."),
        (["tiny.yaml", "--preset", "regularizers"], "expected the file of a study or --preset, got both."),
        (["--preset", "regularizer"], "--preset: expected one of regularizers, got 'regularizer'. Did you mean"),
        (["tiny.yaml", "--seeds", "1001"], "`seeds` must be an integer from 1 to 1000, got 1001."),
        (["tiny.yaml", "--script", "other.py"], "found no script 'other.py'"),
        (["tiny.yaml", "--output_dir", "full"], "--output_dir: expected the folder of this study, an empty folder"),
        (["tiny.yaml", "--report_only"], "'runs/tiny' has no complete test run, so there is nothing to report."),
        (["tiny.yaml", "--report_only", "--dry_run"], "expected --report_only or --dry_run, got both"),
        (["tiny.yaml", "--storage", "nonsense"], "--storage: expected the URL of a database that answers"),
        (["tiny.yaml", "--storage", "oracle://host/x"], "--storage: the driver of this database is not installed"),
    ],
)
def test_flags_that_do_not_fit_end_in_one_line(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    write_study(tmp_path)
    if "--storage" in flags:
        # The progress bar is on stderr by then.
        assert main(["compare", *flags]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "runs").exists()
    else:
        check_failure(tmp_path, message, capsys, *flags)


def test_a_changed_study_does_not_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["compare", str(write_study(tmp_path, seeds=1)), "--output_dir", str(tmp_path / "out")]
    assert main(flags) == 0
    capsys.readouterr()
    results = (tmp_path / "out" / "results.jsonl").read_text()
    write_study(tmp_path, seeds=2, methods={"none": {}, "low": {"x": 0.15}, "high": {"x": 0.2}})
    code, line = failure(capsys, *flags)
    assert code == 2
    assert (
        "holds another study: methods/low/x was 0.1 and is 0.15; seeds was 1 and is 2. Runs of both would be" in line
    )
    write_study(tmp_path, seeds=1, methods={"none": {}, "low": {"x": 0.1}, "high": {"x": 0.2}, "other": {}})
    assert "holds another study: methods/other was None and is 'there'." in failure(capsys, *flags)[1]
    assert (tmp_path / "out" / "results.jsonl").read_text() == results


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(
        "hf_attentiondrop.cli.compare.find_spec", lambda name: None if name in ("optuna", "yaml") else 1
    )
    line = failure(capsys, "compare", write_study(tmp_path))[1]
    assert "compare needs optuna, pyyaml: `pip install optuna pyyaml`." in line


def test_a_study_is_what_it_was_written_as(tmp_path: Path) -> None:
    study = parse_study({**STUDY, "search": SEARCH})
    assert parse_study(study.to_dict()) == study
    assert study.size == 3 * (2 + 5)
    text = "{title: 2026-01-01, script: a.py, methods: {a: {}, b: {lr: 1e-3}}, reference: a, metrics: {m: lower}}"
    (tmp_path / "study.yaml").write_text(text)
    assert read_study(tmp_path / "study.yaml").title == "2026-01-01"


def test_the_seeds_pair_the_runs() -> None:
    study = parse_study({**STUDY, "arguments": {"x": 1, "size": 3}})
    runs = study.test_runs({"high": (4, {"x": 9})})
    assert [(run.seed, run.method) for run in runs] == [(s, m) for s in (0, 1) for m in ("none", "low", "high")]
    assert [run.arguments for run in runs[:3]] == [{"x": 1, "size": 3}, {"x": 0.1, "size": 3}, {"x": 9, "size": 3}]
    assert [run.trial for run in runs[:3]] == [0, 0, 4]


def test_all_presets_and_files_of_the_repository_are_studies() -> None:
    for path in (*preset_path("regularizers").parent.glob("*.yaml"), *(ROOT / "studies").glob("*.yaml")):
        assert read_study(path).seeds >= 3
