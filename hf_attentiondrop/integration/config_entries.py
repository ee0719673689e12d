"""The place of configurations in every Transformers config, and so in config.json.

Where no part of a model uses an entry, it matters where it came from. One that was read from config.json waits:
checkpoints load with stock attention too. One that was given in a call, to `from_pretrained`, to the constructor of a
config or by assignment to one, asks for something, and a model that is built with it and would ignore it is refused.
All fields at once in a call of the constructor are the exception: a copy made by way of `to_dict` looks the same.
"""

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

from transformers import PreTrainedConfig

from ..methods.configuration import CONFIG_KEY, AttentionDropConfig, Configuration
from ..version import __version__


logger = logging.getLogger(__name__)


class GivenEntry(dict):
    """An entry that was given in a call, and that no model was built for yet."""


class ConfigEntry:
    """Makes a configuration a first-class entry of every Transformers config.

    The value lives as a plain dict among the config's own attributes, so it is saved to config.json and restored, and
    stock Transformers carries it along unread. Being a data descriptor it also makes `from_pretrained(..., key=...)`
    reach the config. Reading it gives a [`Configuration`], or `None` where nothing was set.

    Args:
        key: the name of the entry.
        parse: makes the configuration of an object or a dict.
    """

    def __init__(self, key: str, parse: Callable[[Any], Configuration]) -> None:
        self.key, self.parse = key, parse

    def __get__(self, config: PreTrainedConfig | None, owner: type | None = None) -> Configuration | None:
        value = None if config is None else config.__dict__.get(self.key)
        return None if value is None else self.parse(value)

    def __set__(self, config: PreTrainedConfig, value: Configuration | Mapping[str, Any] | None) -> None:
        if value is None:
            config.__dict__.pop(self.key, None)
            return
        try:
            config.__dict__[self.key] = self.parse(value).to_dict()
        except (TypeError, ValueError) as error:
            if not _is_read_from_file(config):
                raise
            raise ValueError(_unreadable(self.key, config, error)) from error

    def register(self) -> None:
        """Adds the entry to [`~transformers.PreTrainedConfig`].

        Raises:
            RuntimeError: if something else already put an attribute of that name there.
        """
        existing = PreTrainedConfig.__dict__.get(self.key)
        if existing is not None and not isinstance(existing, ConfigEntry):
            raise RuntimeError(
                f"`PreTrainedConfig.{self.key}` already exists ({existing!r}), put there by another package: two "
                "owners of one key in config.json would overwrite each other. Import only one of them in this process."
            )
        setattr(PreTrainedConfig, self.key, self)


class SharedConfigEntry(ConfigEntry):
    """An entry that a composite config shares with its sub-configs, since a module reads the one of its own model.

    One that was read from config.json and that this release does not understand stays as it is, with a warning, since
    the model may run without it. Reading it gives the plain dict.
    """

    def __get__(self, config: PreTrainedConfig | None, owner: type | None = None) -> Any:
        try:
            return super().__get__(config, owner)
        except (TypeError, ValueError):
            return config.__dict__[self.key]

    def __set__(self, config: PreTrainedConfig, value: Configuration | Mapping[str, Any] | None) -> None:
        # While a config is being built the sub-configs bring their own values, which a saved difference between them
        # must survive.
        self._share(config, None if value is None else self._entry(config, value), _is_being_built(config))

    def _entry(self, config: PreTrainedConfig, value: Any) -> dict[str, Any]:
        is_read = _is_read_from_file(config)
        try:
            entry = self.parse(value).to_dict()
        except (TypeError, ValueError) as error:
            if not is_read:
                raise
            _warn_once(
                f"{_unreadable(self.key, config, error)} It is kept as it is; other attention implementations do not "
                "need it."
            )
            return value
        # A config that is built from all fields is a copy, made by way of `to_dict`.
        is_copied = _is_being_built(config) and isinstance(value, Mapping) and value.keys() == entry.keys()
        is_given = isinstance(value, GivenEntry) or not (is_read or is_copied)
        return GivenEntry(entry) if is_given else entry

    def _share(self, config: PreTrainedConfig, entry: Any, keeps_own: bool) -> None:
        if entry is None:
            config.__dict__.pop(self.key, None)
        else:
            config.__dict__[self.key] = type(entry)(entry)
        for name in config.sub_configs:
            sub_config = getattr(config, name, None)
            if isinstance(sub_config, PreTrainedConfig) and not (keeps_own and self.key in sub_config.__dict__):
                self._share(sub_config, entry, keeps_own)


def register_config_entry() -> None:
    """Adds the entry `attention_drop` to [`~transformers.PreTrainedConfig`].

    Raises:
        RuntimeError: if something else already put an attribute of that name there.
    """
    SharedConfigEntry(CONFIG_KEY, AttentionDropConfig.from_dict).register()


def attention_drop_of(config: PreTrainedConfig) -> AttentionDropConfig:
    """The configuration of AttentionDrop that a config holds, the defaults if it holds none.

    Raises:
        ValueError: if it was read from config.json and this release does not understand it.
    """
    entry = config.__dict__.get(CONFIG_KEY)
    try:
        return AttentionDropConfig.from_dict({} if entry is None else entry)
    except (TypeError, ValueError) as error:
        raise ValueError(_unreadable(CONFIG_KEY, config, error)) from error


def accept_given_entries(configs: Iterable[PreTrainedConfig]) -> None:
    """Makes the entries of these configs those of the model that is being built with them."""
    for config in configs:
        if isinstance(config.__dict__.get(CONFIG_KEY), GivenEntry):
            config.__dict__[CONFIG_KEY] = dict(config.__dict__[CONFIG_KEY])


def refuse_given_entries(name: str, configs: Iterable[PreTrainedConfig]) -> None:
    """Refuses a configuration of AttentionDrop that was given for what does not run it.

    Args:
        name: the model's class.
        configs: those of its config and sub-configs that no part runs.

    Raises:
        ValueError: if one of them holds an entry that was given in a call.
    """
    for config in configs:
        if isinstance(config.__dict__.get(CONFIG_KEY), GivenEntry):
            raise ValueError(
                f"`{CONFIG_KEY}` was given for {name} ({type(config).__name__}) with attn_implementation="
                f"{config._attn_implementation!r}: it would have no effect, and attention would train unperturbed. "
                f'Add attn_implementation="attentiondrop" or a learned method, or leave `{CONFIG_KEY}` out.'
            )


def _is_being_built(config: PreTrainedConfig) -> bool:
    return any(_builds(frame, config) for frame in _stack())


def _is_read_from_file(config: PreTrainedConfig) -> bool:
    """Whether a config is being built from the contents of a file, and not by a call of its constructor."""
    # Transformers tells neither its configs, and both end in the same call of the constructor.
    stack = _stack()
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
