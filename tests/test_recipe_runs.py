"""A run of a recipe from its first to its last step: locked folder, interruption, resumption, reported steps."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock
from sklearn.datasets import load_digits
from transformers import TrainerCallback

from .recipe_runs import NO_EVALUATION, error_line, load


QUICK = ["--consistency_weight", "0", "--num_hidden_layers", "1", *NO_EVALUATION]
# Two steps, then a checkpoint.
TWO_STEPS = ["--save_strategy", "steps", "--save_steps", "2"]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("text_classification", monkeypatch)


def read(folder: Path, name: str = "metrics.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def add_callback(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    """Adds a callback to the Trainer of a recipe."""
    trainer = recipe.AttentionDropTrainer
    monkeypatch.setattr(
        recipe,
        "AttentionDropTrainer",
        lambda callbacks=(), **options: trainer(callbacks=[*callbacks, callback], **options),
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Another process that holds the lock of a folder."""
    script = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, folder / "_lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        try:
            yield
        finally:
            process.kill()


def test_folder_of_another_run_is_an_error(
    recipe: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max_steps", "1", *QUICK, "--output_dir", str(tmp_path)]
    with locked(tmp_path):
        line = error_line(recipe, capfd, *flags)
        assert f"--output_dir: another run is writing into {tmp_path}" in line
        assert [path.name for path in tmp_path.iterdir()] == ["_lock"]
    # Killing the other process releases its lock; the leftover file does not matter.
    recipe.main(flags)
    assert read(tmp_path)["train_loss"] > 0
    assert not (tmp_path / "_lock").exists()


def test_a_run_holds_its_folder_until_it_ends(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            lock = FileLock(tmp_path / "_lock", timeout=0)
            try:
                lock.acquire()
                held.append(False)
                lock.release()
            except TimeoutError:
                held.append(True)

    add_callback(recipe, monkeypatch, Look())
    recipe.main(["--max_steps", "2", *QUICK, "--output_dir", str(tmp_path)])
    assert held == [True, True]


def end_of(recipe: ModuleType, capfd: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    """The exit code of a failing run, and its last line on stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        recipe.main(list(flags))
    return exit_.value.code, capfd.readouterr().err.rstrip("\n").splitlines()[-1]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Restores Python's handler of Ctrl-C, which background processes of a shell lack."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def interrupt_at(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends the signal of Ctrl-C after a number of steps."""

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGINT)

    add_callback(recipe, monkeypatch, Interrupt())


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("step", "hint"),
    [
        (1, "No checkpoint was saved yet: the same command with --overwrite_output_dir starts again."),
        (3, "The same command with --resume_from_checkpoint continues from {folder}/checkpoint-2."),
    ],
)
def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], step: int, hint: str
) -> None:
    recipe = load("text_classification", monkeypatch)
    interrupt_at(recipe, monkeypatch, step)
    flags = ["--max_steps", "4", *TWO_STEPS, *QUICK, "--output_dir", str(tmp_path)]
    code, line = end_of(recipe, capfd, *flags)
    assert (code, line) == (130, f"text_classification.py: interrupted. {hint.format(folder=tmp_path)}")
    monkeypatch.undo()
    recipe = load("text_classification", monkeypatch)
    recipe.main([*flags, "--resume_from_checkpoint" if step == 3 else "--overwrite_output_dir"])
    assert read(tmp_path).get("resumed_from_step") == (2 if step == 3 else None)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_before_the_training_ends_in_one_line(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "load_data", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    code, line = end_of(recipe, capfd, "--output_dir", str(tmp_path / "out"))
    assert code == 130 and line.endswith("interrupted before the training; nothing was written.")
    assert not (tmp_path / "out").exists()


# Bytes: less than the weights; more than the weights, but less than the optimizer state.
@pytest.mark.parametrize("room", [200_000, 1_000_000])
def test_a_disk_without_room_ends_in_one_line_that_says_how_to_go_on(
    recipe: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str], room: int
) -> None:
    flags = ["--max_steps", "4", *TWO_STEPS, *QUICK, "--output_dir", str(tmp_path)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Writes beyond it fail as on a full disk, for this process alone.
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        code, line = end_of(recipe, capfd, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert line.startswith(f"text_classification.py: error: a file in {tmp_path} cannot be written: ")
    assert line.endswith("Make room on that disk. No checkpoint was saved yet: the same command with "
                         "--overwrite_output_dir starts again.")  # fmt: skip


def test_a_resumed_run_says_which_steps_it_reports(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = ["--max_steps", "4", *TWO_STEPS, *QUICK, "--logging_steps", "1", "--save_total_limit", "9"]
    recipe.main([*flags, "--output_dir", str(whole)])
    assert re.search("^training +4 steps in", capsys.readouterr().out, re.MULTILINE)
    resumed.mkdir()
    (whole / "checkpoint-2").rename(resumed / "checkpoint-2")
    recipe.main([*flags, "--output_dir", str(resumed), "--resume_from_checkpoint"])
    assert re.search("^training +steps 3 to 4, resumed, in", capsys.readouterr().out, re.MULTILINE)
    metrics = read(resumed)
    assert metrics["resumed_from_step"] == 2 and "resumed_from_step" not in read(whole)
    losses = [entry["loss"] for entry in read(resumed / "checkpoint-4", "trainer_state.json")["log_history"][-2:]]
    assert metrics["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-3)
    assert metrics["train_steps_per_second"] == pytest.approx(2 / metrics["train_runtime"], rel=0.01)
    # Of all steps, because the log has them.
    assert metrics["gradient_norms"] == read(whole)["gradient_norms"]
    assert metrics["gradient_norms"]["steps"] == 4


@pytest.mark.parametrize("name", ["causal_lm", "image_classification", "text_classification"])
def test_the_trained_model_is_evaluated_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    recipe = load(name, monkeypatch)
    evaluated = []

    class Count(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            evaluated.append((state.global_step, kwargs["metrics"]["eval_loss"]))

    add_callback(recipe, monkeypatch, Count())
    flags = [*QUICK, "--do_eval", "--eval_strategy", "steps", "--eval_steps", "2", "--max_eval_samples", "16"]
    flags += ["--save_model", "false", "--save_strategy", "no", "--output_dir", str(tmp_path)]
    recipe.main(["--max_steps", "2", *flags])
    assert evaluated == [(2, read(tmp_path)["eval_loss"])]
    # Of the model, a run that saves none keeps only its card.
    assert (tmp_path / "README.md").exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt")]
    if name == "causal_lm":
        # If training ends after the last evaluation, the weights differ.
        recipe.main(["--max_steps", "3", *flags, "--overwrite_output_dir"])
        assert [step for step, _ in evaluated] == [2, 2, 3]
        assert read(tmp_path)["eval_loss"] == evaluated[-1][1]


def test_images_have_a_trivial_baseline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load("image_classification", monkeypatch)
    recipe.main(["--max_steps", "1", "--num_hidden_layers", "1", "--output_dir", str(tmp_path)])
    baseline = read(tmp_path)["majority_accuracy"]
    labels = recipe.load_data(recipe.ImageDataArguments())["train"]["label"][:]
    assert len(labels) < len(load_digits().target) and 0.08 < baseline < 0.12
    assert f"(always the most frequent class: {baseline:.4f})" in capsys.readouterr().out
    assert "| Accuracy |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("translation", "--generation_num_beams"),
        ("translation", "--generation_max_length"),
        ("text_classification", "--per_device_eval_batch_size"),
        ("text_classification", "--max_eval_samples"),
        ("image_classification", "--max_train_samples"),
    ],
)
def test_counts_of_zero_are_errors_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, flag: str
) -> None:
    line = error_line(load(name, monkeypatch), capfd, flag, "0", "--max_steps", "1", "--output_dir", tmp_path / "out")
    assert f"error: {flag}: expected at least 1, got 0." in line
    assert not (tmp_path / "out").exists()
