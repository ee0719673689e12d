"""An error in a library function reaches the user with the flag that caused it."""

import pytest

from hf_attentiondrop.cli.flags import naming_flag


def test_the_flag_is_put_before_the_message() -> None:
    with pytest.raises(ValueError, match="^--data: it has no rows") as error, naming_flag("--data"):
        raise ValueError("it has no rows")
    assert str(error.value.__cause__) == "it has no rows"


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(OSError, match="^disk full$"), naming_flag("--data"):
        raise OSError("disk full")
