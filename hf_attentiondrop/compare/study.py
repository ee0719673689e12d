"""A study: which methods a script runs with, on how many seeds, and what is measured. `docs/compare.md` describes its
YAML file."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..validation import Config, suggestion
from .parsing import (
    check_spellings,
    flatten,
    from_mapping,
    is_directions,
    is_mapping,
    is_nested,
    is_positive,
    is_recordable,
    is_text,
    read_yaml,
)
from .results import Direction, Run
from .search import Search


PRESETS = Path(__file__).parent / "presets"
LAUNCHERS = ("accelerate", "python")
# Tuning runs have this seed or larger ones, and test runs smaller ones.
TUNING_SEED = 1000
# What a study sets for each run.
RESERVED = ("seed", "output_dir")


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study that may not have run yet.

    Args:
        method (`str`): its name.
        phase (`str`): `"tune"` or `"test"`.
        seed (`int`): of the script.
        trial (`int`): number of the settings that were tried.
        arguments (`dict`): of the script, without `seed` and `output_dir`.
    """

    method: str
    phase: Literal["tune", "test"]
    seed: int
    trial: int
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """What identifies the run in its study."""
        return name_of(self)


def name_of(run: PlannedRun | Run) -> str:
    """The name of a run, and of its folder: the phase, the method, and the number of the trial or the test seed."""
    return f"{run.phase}/{run.method}-{run.trial if run.phase == 'tune' else run.seed}"


@dataclass(frozen=True, repr=False)
class Study(Config):
    """A comparison of methods.

    Args:
        title (`str`): of the report, and the name of the study in a database.
        script (`str`):
            Path of a program that trains and measures one model. It takes the flags `seed` and `output_dir`, and
            writes `metrics.json` into that folder.
        methods (`dict`): name of each method to its arguments of the script.
        reference (`str`): the method that the others are compared with.
        metrics (`dict`): entry of metrics.json to `"higher"` or `"lower"`; `"a/b"` is the entry b of the mapping a.
        arguments (`dict`): of all runs.
        seeds (`int`, defaults to 5): the test runs of each method have the seeds 0 to `seeds - 1`.
        search ([`Search`], *optional*): how arguments are chosen before the test.
        launcher (`str`, defaults to `"accelerate"`): or `"python"`, for scripts that need no launcher.

    Raises:
        ValueError: for a field that does not fit.
    """

    key = "study"

    title: str
    script: str
    methods: dict[str, dict[str, Any]]
    reference: str
    metrics: dict[str, Direction]
    arguments: dict[str, Any] = field(default_factory=dict)
    seeds: int = 5
    search: Search | None = None
    launcher: str = "accelerate"

    def __post_init__(self) -> None:
        self._check("title", is_text, "a text", "It heads the report.")
        self._check("script", is_text, "the path of a Python file", "Each run is a run of this script.")
        if is_mapping(self.methods) and None in self.methods.values():
            empty = [f"{method}: {{}}" for method, arguments in self.methods.items() if arguments is None]
            raise ValueError(
                f"Study: `methods` needs arguments for every method, write {' and '.join(empty)} for none."
            )
        self._check(
            "methods",
            lambda value: is_nested(value) and len(value) > 1,
            "a mapping from at least two methods to their arguments, {} for none",
            "A comparison needs a reference and something else.",
        )
        for method in self.methods:
            if not re.fullmatch(r"\w[\w.+=-]*", method):
                raise ValueError(
                    f"Study: expected methods named with letters, digits and _.+=-, got {method!r}: it names a folder."
                )
        self._check_method("reference", self.reference)
        self._check(
            "metrics",
            lambda value: is_directions(value) and len(value) > 0,
            "a mapping from at least one metric to higher or lower",
            "Without a direction there is no better and no worse.",
        )
        self._check("arguments", is_mapping, "a mapping from arguments to values", "The script gets them.")
        self._check(
            "seeds",
            lambda value: is_positive(value) and value <= TUNING_SEED,
            f"an integer from 1 to {TUNING_SEED}",
            "It is the number of test runs of each method.",
        )
        self._check("launcher", lambda value: value in LAUNCHERS, " or ".join(LAUNCHERS), "It starts the script.")
        if self.search is not None and not isinstance(self.search, Search):
            object.__setattr__(self, "search", from_mapping(Search, self.search))
        for where, arguments in self.given_arguments().items():
            for name in arguments:
                if name.replace("-", "_") in RESERVED:
                    raise ValueError(
                        f"Study: `{where}` sets {name!r}, which the study sets for each run. Leave it out."
                    )
                if not is_recordable(arguments[name]):
                    raise ValueError(
                        f"Study: `{where}` sets {name!r} to {arguments[name]}, and records of runs hold finite "
                        "numbers only. Write a large one."
                    )
        for method, own in self.methods.items():
            searched = () if self.search is None else (*self.search.arguments, *self.search.spaces.get(method, ()))
            check_spellings([*self.arguments, *own, *searched])
        if self.search is not None:
            for method, space in self.search.spaces.items():
                self._check_method("search.spaces", method)
                if both := sorted(space.keys() & self.search.arguments.keys()):
                    raise ValueError(
                        f"Study: `search.spaces.{method}` searches {both[0]!r}, which `search.arguments` sets, too. "
                        "Leave one of them out."
                    )
            self._check_objective(self.search)

    def _check_method(self, where: str, name: Any) -> None:
        if not is_text(name) or name not in self.methods:
            raise ValueError(
                f"Study: `{where}` must name one of the methods {', '.join(self.methods)}, got {name!r}."
                f"{suggestion(str(name), self.methods)}"
            )

    def _check_objective(self, search: Search) -> None:
        """Checks the metric of the search, and gives it the direction that it has among the metrics."""
        if isinstance(search.metric, str):
            if search.metric not in self.metrics:
                raise ValueError(
                    f"Study: `search.metric` {search.metric!r} is none of the metrics, so its direction is unknown. "
                    f"Write metric: {{{search.metric}: higher}}, or lower."
                )
            metric = {search.metric: self.metrics[search.metric]}
            object.__setattr__(self, "search", replace(search, metric=metric))
        name, _ = self.objective
        if name.startswith("test_"):
            raise ValueError(
                f"Study: `search.metric` must be measured on validation data, got {name!r}: settings chosen by the "
                "test data flatter their method. Name a metric such as eval_accuracy."
            )

    @property
    def objective(self) -> tuple[str, Direction]:
        """The metric of the search and its direction."""
        return next(iter(self.search.metric.items()))  # type: ignore[union-attr]

    def given_arguments(self) -> dict[str, Mapping[str, Any]]:
        """All arguments of the script, by the place in the study that gives them."""
        given: dict[str, Mapping[str, Any]] = {"arguments": self.arguments}
        given |= {f"methods.{method}": arguments for method, arguments in self.methods.items()}
        if self.search is not None:
            given["search.arguments"] = self.search.arguments
            given |= {f"search.spaces.{method}": space for method, space in self.search.spaces.items()}
        return given

    @property
    def size(self) -> int:
        """The number of runs."""
        return len(self.methods) * (self.seeds + (self.search.trials if self.search else 0))

    def tuning_run(self, method: str, trial: int, chosen: Mapping[str, Any]) -> PlannedRun:
        """A tuning run.

        All trials of a method with a space have one seed: their differences come from their arguments then, and not
        from easier data. A method without a space has another seed in each trial, or it would repeat itself.
        """
        assert self.search is not None
        seed = TUNING_SEED if method in self.search.spaces else TUNING_SEED + trial
        arguments = {**self.arguments, **self.methods[method], **self.search.arguments, **chosen}
        return PlannedRun(method, "tune", seed, trial, arguments)

    def test_runs(self, best: Mapping[str, tuple[int, Mapping[str, Any]]]) -> list[PlannedRun]:
        """The test runs seed by seed, so that at any time the methods have about equally many.

        Args:
            best (`Mapping`): method to the trial that the search chose and its arguments; empty without a search.
        """
        planned = []
        for seed in range(self.seeds):
            for method, arguments in self.methods.items():
                trial, chosen = best.get(method, (0, {}))
                planned.append(PlannedRun(method, "test", seed, trial, {**self.arguments, **arguments, **chosen}))
        return planned

    def to_dict(self) -> dict[str, Any]:
        """The study as plain values, which [`parse_study`] reads."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def differences(self, earlier: Mapping[str, Any], changeable: Collection[str] = ()) -> str:
        """What differs from an earlier study, in words; empty if nothing does. The folder of the script does not
        count, because it may differ between machines.

        Args:
            earlier (`Mapping`): from [`Study.to_dict`].
            changeable (`Collection[str]`): what may differ, from [`changeable`].
        """
        old, new = (
            # Methods without arguments leave nothing else behind.
            dict.fromkeys((f"methods/{name}" for name in values["methods"]), "there")
            | flatten({**values, "script": Path(values["script"]).name})
            for values in (earlier, self.to_dict())
        )
        fixed = [name for name in {**old, **new} if not name.startswith(tuple(changeable))]
        changed = [name for name in fixed if old.get(name) != new.get(name)]
        return "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in changed)


def changeable(runs: Iterable[Run]) -> list[str]:
    """What a study may still change: its metrics before the first complete test run, and the metric of its search
    before the first complete tuning run.

    Args:
        runs (`Iterable[Run]`): those of the study that have ended.
    """
    complete = {run.phase for run in runs if run.state == "complete"}
    return [name for phase, name in (("test", "metrics"), ("tune", "search/metric")) if phase not in complete]


def parse_study(values: Any) -> Study:
    """Builds a study from the values of its YAML file.

    Raises:
        ValueError: for unknown and missing keys, and for values that do not fit.
    """
    return from_mapping(Study, values)


def read_study(path: str | Path) -> Study:
    """Reads a study from its YAML file.

    Raises:
        ValueError: if it is none; the message says what was expected.
    """
    return parse_study(read_yaml(path))


def preset_path(name: str) -> Path:
    """The file of a study that comes with the package.

    Raises:
        ValueError: if there is none of that name.
    """
    known = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if name not in known:
        raise ValueError(f"expected one of {', '.join(known)}, got {name!r}.{suggestion(name, known)}")
    return known[name]
