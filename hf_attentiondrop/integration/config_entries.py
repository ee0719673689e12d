"""The entries `attention_drop` and `attention_reweighting` of every Transformers config and config.json.

If no part of a model uses `attention_drop`, its origin decides. An entry read from config.json is kept without effect,
because checkpoints also load with stock attention. An entry given in code (to `from_pretrained`, to the constructor of
a config, or by assignment) must have an effect, so building a model that would ignore it raises an error. The
exception is a constructor call with all settings: it cannot be told from a copy made through `to_dict`.
"""

import copy
import functools
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

from transformers import PreTrainedConfig

from ..attention.parts import configs_of
from ..methods.learned import LEARNED_KEY, LearnedMethod
from ..methods.method import ATTENTION_DROP_KEY, Perturbation, check_selection
from ..methods.parsing import PerturbationLike, learned_method_from, perturbations_from
from ..methods.state import states_of
from ..version import __version__


logger = logging.getLogger(__name__)


class GivenDict(dict):
    """An entry that was given in code and that no model has used yet."""


class GivenList(list):
    """The same for a list of methods."""


def register_config_entries() -> None:
    """Adds both entries to [`~transformers.PreTrainedConfig`].

    Raises:
        RuntimeError: if another package has already added an attribute of that name.
    """
    for entry in (AttentionDropEntry(ATTENTION_DROP_KEY), LearnedMethodEntry(LEARNED_KEY)):
        existing = PreTrainedConfig.__dict__.get(entry.key)
        if existing is not None and not isinstance(existing, (AttentionDropEntry, LearnedMethodEntry)):
            raise RuntimeError(
                f"`PreTrainedConfig.{entry.key}` already exists ({existing!r}), added by another package: the two "
                "would overwrite each other's entry in config.json. Import only one of them in a process."
            )
        setattr(PreTrainedConfig, entry.key, entry)


class LearnedMethodEntry:
    """The entry `attention_reweighting`, which describes a model's learned weights and is fixed once they exist.

    The config stores it as a plain dict attribute, so it is saved to config.json and restored, and stock Transformers
    ignores it. Because it is a data descriptor, `from_pretrained(..., attention_reweighting=...)` sets it. Reading it
    returns the method, or `None` if it is not set.

    Once weights exist, the config and config.json also name the `attn_implementation`: the checkpoint loads without
    that argument, and raises an error where the name is unknown.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def __get__(self, config: PreTrainedConfig | None, owner: type | None = None) -> LearnedMethod | None:
        value = None if config is None else config.__dict__.get(self.key)
        return None if value is None else learned_method_from(value)

    def __set__(self, config: PreTrainedConfig, value: LearnedMethod | Mapping[str, Any] | None) -> None:
        existing = self.__get__(config)
        is_attached = existing is not None and "attn_implementation" in config.__dict__
        if is_attached and (value is None or learned_method_from(value) != existing):
            raise ValueError(
                f"`{self.key}` cannot change to {value!r}: a model with learned weights for {existing!r} was built "
                "with this config, and its weights would be misinterpreted. Build a new model from a new config."
            )
        if value is None:
            config.__dict__.pop(self.key, None)
            return
        try:
            config.__dict__[self.key] = learned_method_from(value).to_dict()
        except (TypeError, ValueError) as error:
            if not _is_read_from_file(config):
                raise
            raise ValueError(_unreadable(self.key, config, error)) from error


class AttentionDropEntry:
    """The entry `attention_drop`, which a composite config shares with its sub-configs.

    Like [`LearnedMethodEntry`], the config stores it as plain JSON: a dict, or a list of dicts. Reading it returns one
    [`Perturbation`], a tuple of them for a list, or `None` if it is not set. An assignment takes effect in the models
    that were built with the config.

    An entry from config.json that this release cannot parse is kept with a warning, because the model can run without
    it. Reading it then returns the plain value.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def __get__(self, config: PreTrainedConfig | None, owner: type | None = None) -> Any:
        value = None if config is None else config.__dict__.get(self.key)
        if value is None:
            return None
        try:
            perturbations = perturbations_from(value)
        except (TypeError, ValueError):
            return value
        return perturbations if isinstance(value, list) else perturbations[0]

    def __set__(self, config: PreTrainedConfig, value: PerturbationLike | list[PerturbationLike] | None) -> None:
        entry = None if value is None else self._entry(config, value)
        configs = list(configs_of(config))
        previous = [part.__dict__.get(self.key) for part in configs]
        # While a config is being built, its sub-configs keep their own values: they may have been saved with different
        # ones.
        self._share(config, entry, keeps_own=_is_being_built(config))
        try:
            _configure_states(configs)
        except ValueError:
            for part, before in zip(configs, previous, strict=True):
                _put(part, self.key, before)
            raise

    def _entry(self, config: PreTrainedConfig, value: Any) -> Any:
        is_read = _is_read_from_file(config)
        try:
            entry = to_entry(value)
        except (TypeError, ValueError) as error:
            if not is_read:
                raise
            _warn_once(f"{_unreadable(self.key, config, error)} It is kept: other implementations ignore it.")
            return value
        # A config that is built from all settings is a copy made through `to_dict`.
        is_copied = _is_being_built(config) and _is_complete(value, entry)
        is_given = isinstance(value, (GivenDict, GivenList)) or not (is_read or is_copied)
        if not is_given:
            return entry
        return GivenList(entry) if isinstance(entry, list) else GivenDict(entry)

    def _share(self, config: PreTrainedConfig, entry: Any, keeps_own: bool) -> None:
        _put(config, self.key, copy.deepcopy(entry))
        for name in config.sub_configs:
            sub_config = getattr(config, name, None)
            if isinstance(sub_config, PreTrainedConfig) and not (keeps_own and self.key in sub_config.__dict__):
                self._share(sub_config, entry, keeps_own)


def to_entry(value: PerturbationLike | list[PerturbationLike]) -> dict[str, Any] | list[dict[str, Any]]:
    """Returns one perturbation, or a list of them, as config.json stores it.

    Raises:
        ValueError: as [`perturbations_from`].
        TypeError: as [`perturbations_from`].
    """
    entries = [perturbation.to_dict() for perturbation in perturbations_from(value)]
    return entries if isinstance(value, (list, tuple)) else entries[0]


def perturbations_of(config: PreTrainedConfig) -> tuple[Perturbation, ...]:
    """Returns the perturbations that a config holds, the default one if it has no entry.

    Raises:
        ValueError: if the entry was read from config.json and this release cannot parse it.
    """
    entry = config.__dict__.get(ATTENTION_DROP_KEY)
    try:
        return perturbations_from({} if entry is None else entry)
    except (TypeError, ValueError) as error:
        raise ValueError(_unreadable(ATTENTION_DROP_KEY, config, error)) from error


def accept_given_entries(configs: Iterable[PreTrainedConfig]) -> None:
    """Marks the given entries of these configs as used by a model."""
    for config in configs:
        entry = config.__dict__.get(ATTENTION_DROP_KEY)
        if isinstance(entry, (GivenDict, GivenList)):
            config.__dict__[ATTENTION_DROP_KEY] = list(entry) if isinstance(entry, list) else dict(entry)


def check_given_entries(name: str, configs: Iterable[PreTrainedConfig]) -> None:
    """Checks that no given perturbation is ignored.

    Args:
        name: class of the model.
        configs: its config and sub-configs whose entry no part of the model uses.

    Raises:
        ValueError: if one of them has an entry that was given in code.
    """
    for config in configs:
        if isinstance(config.__dict__.get(ATTENTION_DROP_KEY), (GivenDict, GivenList)):
            raise ValueError(
                f"`{ATTENTION_DROP_KEY}` was given for {name} ({type(config).__name__}) with attn_implementation="
                f"{config._attn_implementation!r}: it would have no effect, and attention would train unperturbed. "
                f'Add attn_implementation="attentiondrop" or a learned method, or leave `{ATTENTION_DROP_KEY}` out.'
            )


def _configure_states(configs: Iterable[PreTrainedConfig]) -> None:
    """Configures the running attention modules that these configs govern, once all models they belong to allow it.

    Raises:
        ValueError: as [`check_selection`]; no module has changed then.
    """
    running = [state for state in states_of(configs) if state.peers]
    for state in {id(state.peers): state for state in running}.values():
        selections = [(peer.place, perturbations_of(peer.config)) for peer in state.peers if peer.is_configured]
        check_selection(state.owner, ATTENTION_DROP_KEY, selections)
    for state in running:
        state.configure(perturbations_of(state.config))


def _put(config: PreTrainedConfig, key: str, entry: Any) -> None:
    if entry is None:
        config.__dict__.pop(key, None)
    else:
        config.__dict__[key] = entry


def _is_complete(value: Any, entry: Any) -> bool:
    """Returns whether a value names all settings of the entry made from it."""
    if isinstance(entry, list):
        return all(_is_complete(*pair) for pair in zip(value, entry, strict=True))
    return isinstance(value, Mapping) and value.keys() >= entry.keys()


def _is_being_built(config: PreTrainedConfig) -> bool:
    return any(_builds(frame, config) for frame in _stack())


def _is_read_from_file(config: PreTrainedConfig) -> bool:
    """Returns whether a config is being built from a file, as opposed to a constructor call in user code."""
    # Both end in the same constructor call, so only the call stack shows the difference.
    stack = list(_stack())
    return any(_builds(frame, config) for frame in stack) and any(map(_reads, stack))


def _builds(frame: FrameType, config: PreTrainedConfig) -> bool:
    return frame.f_code.co_name in ("__init__", "__post_init__") and frame.f_locals.get("self") is config


def _reads(frame: FrameType) -> bool:
    cls = frame.f_locals.get("cls")
    is_config = isinstance(cls, type) and issubclass(cls, PreTrainedConfig)
    return is_config and frame.f_code.co_name in ("from_dict", "from_json_file")


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _unreadable(key: str, config: PreTrainedConfig, error: Exception) -> str:
    names = (frame.f_locals.get("pretrained_model_name_or_path") for frame in _stack())
    name = getattr(config, "_name_or_path", "") or next((str(name) for name in names if name), "")
    return (
        f"hf_attentiondrop {__version__} cannot use the `{key}` entry of {name or 'a config'}: {error} If a newer "
        "release wrote it, upgrade hf_attentiondrop; otherwise correct the entry in config.json."
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
