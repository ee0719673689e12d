"""The command line: its help, its version, and exit code 2 for arguments that do not parse."""

import pytest

from hf_attentiondrop import __version__
from hf_attentiondrop.cli import main


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in ((["--help"], "check"), (["check", "--help"], "--attention_drop")):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 0
        assert expected in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"hf-attentiondrop {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["inspect"], "invalid choice: 'inspect'"),
        (["check"], "the following arguments are required: MODEL"),
        (["check", "x", "--attn_implementation", "sdpa"], "invalid choice: 'sdpa' (choose from 'attentiondrop'"),
        (["check", "x", "--attention_drop", "{p: 1}"], "expected JSON such as '{\"p\": 0.2}', got '{p: 1}'"),
        (
            ["check", "x", "--attention_drop", '{"q": 1}'],
            "Unknown key 'q' in `attention_drop`: variant='hard' does not use it",
        ),
        (["check", "x", "--attention_drop", '{"varient": 1}'], "so 1 would have no effect. Did you mean 'variant'?"),
        (["check", "x", "--attention_drop", '{"p": 2}'], "`p` must be a probability in [0, 1], got 2"),
        (
            ["evaluate", "x", "--data", "y", "--seed", "-1"],
            "expected an integer from 0 to 9223372036854775807, got '-1",
        ),
        (
            ["evaluate", "x", "--data", "y", "--seed", str(2**63)],
            "from 0 to 9223372036854775807, got '92233720368547758",
        ),
        (["check", "x", "--attention_drop", "[1]"], "`attention_drop` must be one of HardMasking, "),
    ],
)
def test_invalid_arguments_end_in_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
