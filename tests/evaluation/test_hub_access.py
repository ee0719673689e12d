"""A name of nothing is refused immediately, with or without a reachable Hub."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from hf_attentiondrop import cli
from hf_attentiondrop.evaluation import hub_access
from hf_attentiondrop.evaluation.hub_access import check_path, offline_if_cut_off

from ..hub_server import running_hub
from ..recipe_runs import error_line, load


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Hub that does not listen, with libraries in online mode."""
    with socket.socket() as taken:  # but not listening
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        yield endpoint


@pytest.mark.parametrize(
    "arguments",
    [["check", "nope"], ["check", "nope/nothing"], ["evaluate", "nope", "--data", "x", "--output_dir", "report"]],
)
def test_a_missing_model_is_refused_immediately(
    arguments: list[str],
    cut_off: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert cli.main(arguments) == 2
    assert time.monotonic() - start < 10
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and f"{arguments[1]!r} is no folder here" in line, line
    assert constants.HF_HUB_OFFLINE is False and datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--dataset_name"])
def test_a_recipe_does_not_wait_for_the_hub(
    flag: str, cut_off: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load("text_classification", monkeypatch)
    start = time.monotonic()
    line = error_line(recipe, capfd, flag, "nope/nothing", "--output_dir", tmp_path / "out")
    assert time.monotonic() - start < 10
    assert "nope/nothing" in line and not (tmp_path / "out").exists()
    assert constants.HF_HUB_OFFLINE is False and datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("nothere.csv", True),
        ("data/nothere.PARQUET", True),
        ("./nothere", True),
        ("/nothere", True),
        ("some/where/else", True),
        ("someone/model-v0.1", False),
        ("squad.v2", False),
    ],
)
def test_the_hub_is_not_asked_for_a_missing_path(
    name: str, is_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if is_path:
        with pytest.raises(ValueError, match="^expected a file; there is nothing at"):
            check_path(name, "a file")
    else:
        check_path(name, "a file")


def test_only_an_unreachable_hub_counts_as_offline(
    cut_off: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with offline_if_cut_off("someone/model"):
        assert constants.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        with offline_if_cut_off("someone/model"):
            assert not constants.is_offline_mode()
    # No request is made for a local path.
    monkeypatch.setattr(hub_access, "_answers", pytest.fail)
    with offline_if_cut_off(str(tmp_path)):
        assert not constants.is_offline_mode()
