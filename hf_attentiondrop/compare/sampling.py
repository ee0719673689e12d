"""The arguments that a search tries, by Optuna's TPE sampler. They depend on the results of earlier trials alone, not
on the number of workers or their order: a study that was killed and continued tries the same ones."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import optuna
from optuna.samplers import TPESampler
from optuna.trial import Trial

from .results import Direction, Run
from .search import Space


OPTUNA_DIRECTION: dict[Direction, Literal["maximize", "minimize"]] = {"higher": "maximize", "lower": "minimize"}
# Trials of a method that can run at the same time. Each is sampled from the results of all earlier rounds.
ROUND = 4


def round_of(trial: int) -> range:
    """The trials that are sampled from the same results as this one, and that it need not wait for.

    >>> round_of(5)
    range(4, 8)
    """
    start = trial // ROUND * ROUND
    return range(start, start + ROUND)


def sample(
    trial: int, space: Mapping[str, Space], metric: str, direction: Direction, earlier: Sequence[Run]
) -> dict[str, Any]:
    """Samples the arguments of a trial.

    Args:
        trial (`int`): its number.
        space (`Mapping`): argument to [`Space`].
        metric (`str`): of the search.
        direction (`str`): of the metric.
        earlier (`Sequence`): the complete runs of all earlier rounds.
    """
    study = optuna.create_study(sampler=TPESampler(seed=trial), direction=OPTUNA_DIRECTION[direction])
    for run in sorted(earlier, key=lambda run: run.trial):
        study.enqueue_trial({name: run.arguments[name] for name in space})
        told = study.ask()
        suggest(told, space)
        study.tell(told, run.metrics[metric])
    return suggest(study.ask(), space)


def suggest(trial: Trial, space: Mapping[str, Space]) -> dict[str, Any]:
    """Samples the arguments in a trial of Optuna, or returns those that it was added with."""
    return {name: _suggest(trial, name, values) for name, values in space.items()}


def _suggest(trial: Trial, name: str, space: Space) -> Any:
    if space.choices:
        return trial.suggest_categorical(name, space.choices)
    if isinstance(space.low, int) and isinstance(space.high, int):
        return trial.suggest_int(name, space.low, space.high, log=space.log)
    return trial.suggest_float(name, space.low, space.high, log=space.log)
