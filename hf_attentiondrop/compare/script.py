"""The script of a study: where it is, and which arguments it takes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..validation import suggestion
from .study import RESERVED, Study


# Seconds. Importing the libraries of a recipe can take a minute on a busy machine.
HELP_TIMEOUT = 600


@dataclass(frozen=True)
class Flag:
    """A flag of a script.

    Args:
        spelling (`str`): such as `"--learning_rate"`.
        metavar (`str`): how the help shows its value, such as `"LAYERS [LAYERS ...]"`; empty if it takes none.
    """

    spelling: str
    metavar: str


@dataclass(frozen=True)
class Script:
    """A program with flags.

    Args:
        path (`Path`): of its file.
        flags (`dict`): name, with underscores, to [`Flag`].
    """

    path: Path
    flags: dict[str, Flag]

    @classmethod
    def load(cls, path: Path) -> "Script":
        """Finds out which flags a script takes, by running it with `--help`.

        Raises:
            ValueError: if that fails, and if the script does not take what every run needs.
        """
        try:
            result = subprocess.run(
                [sys.executable, str(path), "--help"],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=HELP_TIMEOUT,
                # A long text of help would be wrapped, and a flag that it mentions could begin a line.
                env={**os.environ, "COLUMNS": "10000"},
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"{path} --help did not end within {HELP_TIMEOUT} seconds: it should print the flags of the script."
            ) from error
        if result.returncode != 0:
            last = (result.stderr.strip() or "no message").splitlines()[-1]
            raise ValueError(f"{path} --help ended with exit code {result.returncode}, expected its flags: {last}")
        script = cls(path, parse_flags(result.stdout))
        if missing := [f"--{name}" for name in RESERVED if name not in script.flags]:
            raise ValueError(
                f"{path} does not take {' and '.join(missing)}, which every run needs: a seed of its own, and a "
                "folder for metrics.json. Add them to its parser."
            )
        return script

    def check(self, study: Study) -> None:
        """Raises a `ValueError` for arguments of a study that the script does not take."""
        for where, arguments in study.given_arguments().items():
            for name, value in arguments.items():
                flag = self.flags.get(name.replace("-", "_"))
                if flag is None:
                    raise ValueError(
                        f"`{where}` has {name!r}, which {self.path.name} does not take."
                        f"{suggestion(name, self.flags)} `{self.path.name} --help` shows its flags."
                    )
                is_space = where.startswith("search.spaces")
                if not flag.metavar and not is_space and not isinstance(value, bool | None):
                    raise ValueError(
                        f"`{where}`: {flag.spelling} of {self.path.name} takes no value, expected true or false for "
                        f"{name!r}, got {value!r}."
                    )

    def command_line(self, arguments: Mapping[str, Any]) -> list[str]:
        """The path of the script and its arguments as flags.

        `None` leaves a flag out. `True` and `False` set a flag that takes no value, or leave it out. Mappings become
        JSON, and so do lists, if the flag does not take several values.
        """
        line = [str(self.path)]
        for name, value in arguments.items():
            flag = self.flags[name.replace("-", "_")]
            if value is None:
                continue
            if not flag.metavar:
                negation = self.flags.get(f"no_{name.replace('-', '_')}")
                line += [flag.spelling] if value else [negation.spelling] if negation else []
            elif isinstance(value, list) and "..." in flag.metavar:
                line += [flag.spelling, *map(_as_text, value)]
            else:
                line += [flag.spelling, _as_text(value)]
        return line


def find_script(script: str, folder: Path) -> Path:
    """Finds the script of a study.

    Args:
        script (`str`): its path, relative to the folder or to the working directory.
        folder (`Path`): of the study's file.

    Raises:
        ValueError: if it is in neither.
    """
    for path in (folder / script, Path(script)):
        if path.is_file():
            return path.resolve()
    folders = " or ".join(dict.fromkeys((str(folder.resolve()), str(Path.cwd()))))
    raise ValueError(
        f"found no script {script!r} in {folders}. The recipes are in the repository and not "
        "in the installed package: run this command in a clone, or name the path of the script."
    )


def parse_flags(text: str) -> dict[str, Flag]:
    """Reads the flags from the help of a program, as argparse and click print it.

    Example:

    >>> parse_flags("  -s S, --seed S  the seed\\n  --layers L [L ...]\\n  --fast  ")
    {'seed': Flag(spelling='--seed', metavar='S'), 'layers': Flag(spelling='--layers', metavar='L [L ...]'),
     'fast': Flag(spelling='--fast', metavar='')}
    """
    flags: dict[str, Flag] = {}
    for line in text.splitlines():
        if not re.match(r"\s+-", line):
            continue
        shown = re.split(r"\s{2,}", line.strip())[0]
        spellings = re.findall(r"(?:^|[\s/])(--[\w-]+)", shown)
        metavar = re.split(r"--[\w-]+", shown)[-1].strip(" ,/=")
        for spelling in spellings:
            flags.setdefault(spelling[2:].replace("-", "_"), Flag(spelling, metavar))
    return flags


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value)
