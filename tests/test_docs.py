"""The documentation: its examples run, its commands parse, it describes the public API, and the site builds."""

import argparse
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments, ViTImageProcessorPil

import hf_attentiondrop
from hf_attentiondrop.cli.main import COMMANDS

from .consistency_tasks import tokenizer
from .models import VOCAB_SIZE, build
from .recipe_runs import ROOT, load


DOCS = ROOT / "docs"
PAGES = ["../README.md", *sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))]
# Blocks of these need a GPU with FlashAttention, or the Hub.
NEED_MORE = ("flash_attention_2", "push_to_hub")


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def documented_names() -> list[str]:
    return [name for page in PAGES for name in re.findall(r"^::: (\S+)", (DOCS / page).read_text(), re.MULTILINE)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer that loads as a language model and as a classifier."""
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCAB_SIZE, pad_token_id=0, **sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def names_of_readers(page: str, checkpoint: Path) -> dict[str, Any]:
    """What the reader of a page has: a path, data, a model."""
    datasets = pytest.importorskip("datasets")
    ids = torch.randint(2, VOCAB_SIZE, (4, 8))
    rows = [{"input_ids": row, "labels": index % 2} for index, row in enumerate(ids.tolist())]
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 0, 1])}
    names: dict[str, Any] = {"path": str(checkpoint), "dataset": rows, "train_loader": [batch], "batches": [batch]}
    names["texts"] = datasets.Dataset.from_dict({"text": ["w2 w3 w4", "w5 w6"]})
    if page == "consistency.md":
        names["batch"] = {"input_ids": ids, "labels": ids}
    elif page == "schedules.md":
        model = LlamaForSequenceClassification.from_pretrained(checkpoint, attn_implementation="attentiondrop")
        names["model"] = model
    elif page == "evaluation.md":
        images = [{"pixel_values": torch.rand(1, 8, 8), "labels": index % 2} for index in range(4)]
        model = build("vit", attn_implementation="sdpa")
        arguments = TrainingArguments("out", report_to="none", per_device_eval_batch_size=2)
        names |= {
            "image_processor": ViTImageProcessorPil(image_mean=[0.5], image_std=[0.5]),
            "loader": [{"pixel_values": torch.zeros(2, 1, 8, 8), "labels": torch.tensor([0, 1])}],
            "model": model,
            "trainer": Trainer(model, arguments, train_dataset=images, eval_dataset=images),
        }
        for prefix in ("", "validation_", "test_"):
            names |= {f"{prefix}logits": torch.randn(20, 2), f"{prefix}labels": torch.arange(20) % 2}
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(
    page: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of_readers(page, checkpoint)
    for block in blocks(page, "python"):
        if not any(need in block for need in NEED_MORE):
            # TRL trains in bf16 by default, which takes a GPU.
            exec(compile(block.replace('SFTConfig("out")', 'SFTConfig("out", bf16=False)'), page, "exec"), names)
    printed = capsys.readouterr().out
    if page == "../README.md":
        assert blocks(page, "text")[0] in printed
    if page == "getting_started.md":
        assert float(re.search(r"accuracy (\S+)", printed)[1]) > 0.9
        assert blocks(page, "text")[0].splitlines()[0] in printed


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield page, shlex.split(line, comments=True)


def test_commands_in_the_documentation_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    cli = argparse.ArgumentParser()
    subcommands = cli.add_subparsers()
    for declare in COMMANDS:
        declare(subcommands)
    monkeypatch.syspath_prepend(ROOT / "recipes")
    from shared.parser import RecipeParser

    class Parsed(Exception):
        """The flags are valid. Without it the recipe would train."""

    parse = RecipeParser.parse

    def parse_only(*args: Any) -> None:
        parse(*args)
        raise Parsed

    monkeypatch.setattr(RecipeParser, "parse", parse_only)
    seen = set()
    for _, words in commands():
        if "hf-attentiondrop" in words:
            seen.add("hf-attentiondrop")
            cli.parse_args(words[words.index("hf-attentiondrop") + 1 :])
        recipes = [index for index, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word)]
        for index in recipes:
            seen.add(words[index])
            with pytest.raises(Parsed):
                load(Path(words[index]).stem, monkeypatch).main(words[index + 1 :])
    assert {"hf-attentiondrop", "recipes/image_classification.py", "recipes/causal_lm.py"} <= seen


def test_everything_public_is_documented_once() -> None:
    names = documented_names()
    assert sorted(set(names)) == sorted(names)
    on_site = [described(name) for name in names]
    public = [name for name in hf_attentiondrop.__all__ if name != "__version__"]
    assert [name for name in public if not any(getattr(hf_attentiondrop, name) is each for each in on_site)] == []


def described(name: str) -> Any:
    folder, _, attribute = name.rpartition(".")
    # First the attribute: the functions `configure` and `report` have the names of their modules.
    return getattr(importlib.import_module(folder), attribute, None) or importlib.import_module(name)


def public_members(value: Any) -> dict[str, Any]:
    """Returns what the site shows of a module or class: its own functions, classes and properties."""
    members = {name: member for name, member in vars(value).items() if not name.startswith("_")}
    if inspect.ismodule(value):
        exported = getattr(value, "__all__", ())
        members = {
            name: member
            for name, member in members.items()
            if name in exported or getattr(member, "__module__", "") == value.__name__
        }
    return {
        name: getattr(value, name)
        for name, member in members.items()
        if inspect.isfunction(member) or inspect.isclass(member) or isinstance(member, property)
    }


def test_everything_on_the_site_has_a_docstring() -> None:
    missing = []
    for name in documented_names():
        value = described(name)
        members = public_members(value) if inspect.ismodule(value) or inspect.isclass(value) else {}
        described_here = {name: value} | {f"{name}.{member}": of_member for member, of_member in members.items()}
        for path, each in described_here.items():
            text = inspect.getdoc(each)  # Also finds the docstring of an overridden method.
            is_generated = inspect.isclass(each) and (text or "").startswith(f"{each.__name__}(")
            if not text or is_generated:
                missing.append(path)
    assert missing == []


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "api" / "training.html").is_file()
