"""The flags of a script, from its help."""

import argparse
from pathlib import Path

import pytest

from hf_attentiondrop.compare.script import Flag, Script, find_script, parse_flags

from .studies import TINY


def test_the_flags_of_argparse() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-r", "--learning_rate", "--learning-rate", type=float, help="such as --lr")
    parser.add_argument("--layers", nargs="+")
    parser.add_argument("--fp16", nargs="?", const=True)
    parser.add_argument("--mode", choices=["a", "b c"])
    parser.add_argument("--a_long_name_that_fills_the_line", metavar="VALUE", help="text")
    parser.add_argument("--fast", action="store_true", help="text")
    parser.add_argument("--cache", action=argparse.BooleanOptionalAction)
    flags = parse_flags(parser.format_help())
    assert flags["learning_rate"].spelling == "--learning_rate" and "lr" not in flags
    assert "..." in flags["layers"].metavar
    assert flags["a_long_name_that_fills_the_line"].metavar == "VALUE"
    assert [flags[name].metavar for name in ("fast", "cache", "no_cache")] == ["", "", ""]
    script = Script(Path("train.py"), flags)
    arguments = {"learning-rate": 1e-5, "layers": [0, -1], "fp16": False, "fast": True, "cache": False, "mode": None}
    line = ["train.py", "--learning_rate", "1e-05", "--layers", "0", "-1", "--fp16", "false", "--fast", "--no-cache"]
    assert script.command_line(arguments) == line
    assert script.command_line({"fast": False}) == ["train.py"]


def test_structured_values_become_json() -> None:
    script = Script(Path("train.py"), {"p": Flag("--p", "YAML")})
    assert script.command_line({"p": [0.1, 0.2]})[-1] == "[0.1, 0.2]"
    assert script.command_line({"p": {"from": 0.2, "to": 0}})[-1] == '{"from": 0.2, "to": 0}'
    assert script.command_line({"p": [{"variant": "hard"}]})[-1] == '[{"variant": "hard"}]'


def test_a_script_without_what_a_run_needs(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("import argparse\np = argparse.ArgumentParser()\np.add_argument('--seed')\np.parse_args()")
    with pytest.raises(ValueError, match="train.py does not take --output_dir, which every run needs"):
        Script.load(path)
    path.write_text("import missing_module")
    with pytest.raises(ValueError, match="ended with exit code 1, expected its flags: ModuleNotFoundError: No module"):
        Script.load(path)
    assert Script.load(TINY).flags["x"] == Flag("--x", "X")


def test_a_flag_that_a_help_text_mentions_is_not_its_definition(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    text = "word " * 10 + "--seed"  # Which argparse would begin a line with, if lines had 80 characters.
    flags = f"p.add_argument('--epochs', help={text!r})\np.add_argument('--seed')\np.add_argument('--output_dir')"
    path.write_text(f"import argparse\np = argparse.ArgumentParser()\n{flags}\np.parse_args()")
    assert Script.load(path).command_line({"seed": 1}) == [str(path), "--seed", "1"]


def test_a_script_is_found_next_to_the_study_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "a.py").touch()
    (tmp_path / "here" / "b.py").touch()
    assert find_script("a.py", tmp_path) == tmp_path / "a.py"
    assert find_script("b.py", tmp_path) == tmp_path / "here" / "b.py"
    with pytest.raises(ValueError, match=f"found no script 'c.py' in {tmp_path} or {tmp_path / 'here'}\\. The"):
        find_script("c.py", tmp_path)
    with pytest.raises(ValueError, match=f"found no script 'c.py' in {tmp_path / 'here'}\\. The"):
        find_script("c.py", Path())
