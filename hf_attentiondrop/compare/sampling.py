"""The arguments that a search tries: first a Latin hypercube, then Optuna's TPE sampler. They depend on the results of
earlier trials alone, not on the number of workers or their order: a study that was killed and continued tries the same
ones."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
from optuna.samplers import TPESampler
from optuna.trial import Trial
from scipy.stats.qmc import LatinHypercube

from .results import Direction, Run
from .search import Space


OPTUNA_DIRECTION: dict[Direction, Literal["maximize", "minimize"]] = {"higher": "maximize", "lower": "minimize"}
# Trials of a method that can run at the same time. Each is sampled from the results of all earlier rounds.
ROUND = 4
# Trials before the results of earlier ones count, three rounds.
FIRST = 12


def round_of(trial: int) -> range:
    """The trials that are sampled from the same results as this one, and that it need not wait for.

    >>> round_of(5)
    range(4, 8)
    """
    start = trial // ROUND * ROUND
    return range(start, start + ROUND)


def sample(
    trial: int, trials: int, space: Mapping[str, Space], metric: str, direction: Direction, earlier: Sequence[Run]
) -> dict[str, Any]:
    """Samples the arguments of a trial.

    The first trials divide the space of each argument into as many equal parts and take the middle of one, each in
    another random order. It depends on the argument's name, so that methods try the same values of an argument that
    they have in common.

    Args:
        trial (`int`): its number.
        trials (`int`): how many there are.
        space (`Mapping`): argument to [`Space`].
        metric (`str`): of the search.
        direction (`str`): of the metric.
        earlier (`Sequence`): the complete runs of all earlier rounds.

    Example:

    >>> space = {"p": Space(0.0, 0.4)}
    >>> sorted(round(sample(trial, 4, space, "eval_accuracy", "higher", [])["p"], 3) for trial in range(4))
    [0.05, 0.15, 0.25, 0.35]
    """
    first = min(trials, FIRST)
    if trial < first:
        return {name: values.at(_position(name, trial, first)) for name, values in space.items()}
    study = optuna.create_study(sampler=TPESampler(seed=trial), direction=OPTUNA_DIRECTION[direction])
    for run in sorted(earlier, key=lambda run: run.trial):
        study.enqueue_trial({name: run.arguments[name] for name in space})
        told = study.ask()
        suggest(told, space)
        study.tell(told, run.metrics[metric])
    return suggest(study.ask(), space)


def _position(name: str, trial: int, trials: int) -> float:
    """Where in the space of an argument the trial is, from 0 to 1."""
    generator = np.random.default_rng(list(name.encode()))
    return float(LatinHypercube(1, scramble=False, rng=generator).random(trials)[trial, 0])


def suggest(trial: Trial, space: Mapping[str, Space]) -> dict[str, Any]:
    """Samples the arguments in a trial of Optuna, or returns those that it was added with."""
    return {name: _suggest(trial, name, values) for name, values in space.items()}


def _suggest(trial: Trial, name: str, space: Space) -> Any:
    if space.choices:
        return trial.suggest_categorical(name, space.choices)
    if isinstance(space.low, int) and isinstance(space.high, int):
        return trial.suggest_int(name, space.low, space.high, log=space.log)
    return trial.suggest_float(name, space.low, space.high, log=space.log)
