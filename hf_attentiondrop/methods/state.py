"""The state of an attention module: its governing config, perturbations, their current values and number of calls."""

import copy
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any
from weakref import ReferenceType, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention.call import SDPA
from ..attention.entropy import EntropyMeter
from ..attention.modules import Place
from .method import ATTENTION_DROP_KEY, Perturbation
from .profile import Value


# The modules that each config governs, so that an assignment to its entry takes effect in them.
_states: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _number(dtype: torch.dtype) -> Tensor:
    # On CPU even if the model is built on the meta device, which has no storage.
    return torch.zeros((), dtype=dtype, device="cpu")


@dataclass(eq=False)
class ModuleState:
    """The state of one attention module, kept on it as `attention_drop_state`.

    Args:
        config: the config whose `attention_drop` entry governs the module: the nearest one that belongs to the whole
            model's config (T5 gives its stacks copies, in which later changes would have no effect).
        place: kind and layer of the module.
        calls: number of perturbed attention calls.
        base: attention implementation that computes the base attention.
        factor: the factor of a schedule on the configured values, in [0, 1]; `None` without a schedule.
        gains: factors on the values of each head, float64 `(H,)`, from an adaptive strength; `None` without one.
        meter: measures the entropy of the heads in the next call, for an adaptive strength.
        governor: weak reference to the Transformers model that `config` belongs to; `None` after unpickling.
        owner: class of the whole model.
        peers: states of all modules of that model that run an implementation of this package, including this one; a
            configuration is checked for all of them together.
        perturbations: all configured perturbations, including those that select other modules.
        active: the perturbations that act on the module, each with its current value.
        earlier: the perturbations that acted in calls before the current ones were configured.
        calls_before: the number of these calls.

    `calls` and the values are tensors, because `torch.compile` would treat numbers as constants and recompile when
    they change.

    A copy of a single module (a duplicated layer, a module that PEFT copies to train it) stays governed by the model's
    config; a copy of the whole model is governed by the copied config.
    """

    config: PreTrainedConfig
    place: Place
    calls: Tensor = field(default_factory=lambda: _number(torch.int64))
    base: str = SDPA
    factor: float | None = None
    gains: Tensor | None = None
    meter: EntropyMeter | None = None
    governor: "ReferenceType[PreTrainedModel] | None" = None
    owner: str = ""
    peers: "list[ModuleState]" = field(default_factory=list, repr=False)
    perturbations: tuple[Perturbation, ...] = ()
    active: tuple[tuple[Perturbation, Tensor], ...] = ()
    earlier: tuple[Perturbation, ...] = ()
    calls_before: int = 0
    _values: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        _states.setdefault(self.config, WeakSet()).add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "governor": None}  # Weak references cannot be pickled.

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self.__post_init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModuleState":
        governor = None if self.governor is None else self.governor()
        is_alone = governor is not None and id(governor) not in memo
        other = memo[id(self)] = object.__new__(type(self))  # Peers refer to it while they are copied.
        for name, value in self.__getstate__().items():
            is_shared = is_alone and name not in ("calls", "active", "_values")
            other.__dict__[name] = value if is_shared else copy.deepcopy(value, memo)
        if governor is not None:
            other.governor = weakref.ref(governor if is_alone else memo[id(governor)])
        other.__post_init__()
        return other

    def outside_of(self, model: nn.Module) -> "list[ModuleState]":
        """The peers in the rest of a larger model, if `model` is a part of one. Those that have left `model`, or whose
        model no longer exists, are not among them."""
        governors = {id(peer): None if peer.governor is None else peer.governor() for peer in self.peers}
        inside = {None, *model.modules()}
        return [peer for peer in self.peers if governors[id(peer)] not in inside]

    @property
    def is_configured(self) -> bool:
        """Whether the governing config has an entry; otherwise the defaults apply."""
        return self.config.__dict__.get(ATTENTION_DROP_KEY) is not None

    def configure(self, perturbations: Sequence[Perturbation]) -> None:
        """Sets the configured perturbations, without a schedule or gains."""
        if self.perturbations:  # Not while the model is built.
            self.earlier, self.calls_before = self.applied, int(self.calls)
        self.perturbations = tuple(perturbations)
        self.scale(None)

    def scale(self, factor: float | None, gains: Tensor | None = None) -> None:
        """Scales the configured values, by a factor and by one gain per head; `None` stands for 1."""
        self.factor, self.gains = factor, gains
        acting = [perturbation for perturbation in self.perturbations if perturbation.acts_at(self.place)]
        values = [self._scaled(perturbation.value_at(self.place)) for perturbation in acting]
        # A compiled model recompiles for new tensors, so fill existing ones.
        self._values = [
            value if previous is None or previous.shape != value.shape else previous.copy_(value)
            for previous, value in zip_longest(self._values[: len(values)], values)
        ]
        self.active = tuple(zip(acting, self._values, strict=True))

    def _scaled(self, value: Value) -> Tensor:
        scaled = torch.tensor(value, dtype=torch.float64, device="cpu")
        if self.gains is not None:
            scaled = scaled * self.gains
        if self.factor is not None:
            scaled = scaled * self.factor
        return scaled

    def take_over(self, previous: "ModuleState") -> None:
        """Continues the state of the same module under another config."""
        self.calls, self.base, self.perturbations = previous.calls, previous.base, previous.perturbations
        self.earlier, self.calls_before = previous.earlier, previous.calls_before
        self.scale(previous.factor, previous.gains)

    @property
    def applied(self) -> tuple[Perturbation, ...]:
        """The perturbations that have acted in calls, also if others are configured now; of each class the last."""
        current = [perturbation for perturbation, _ in self.active] if self.calls > self.calls_before else []
        replaced = {type(perturbation) for perturbation in current}
        return (*(earlier for earlier in self.earlier if type(earlier) not in replaced), *current)

    @property
    def is_scaled(self) -> bool:
        """Whether a schedule or an adaptive strength is in effect."""
        return self.factor is not None or self.gains is not None

    @property
    def values(self) -> list[Value]:
        """The current values of the active perturbations, a tuple for one per head."""
        plain = [value.tolist() for value in self._values]
        return [tuple(value) if isinstance(value, list) else value for value in plain]

    def restore(self, attributes: Mapping[str, Any]) -> None:
        """Restores an earlier state, see [`~integration.switching.all_or_nothing`]."""
        self.__dict__.update(attributes)
        self.scale(self.factor, self.gains)


def states_of(configs: Iterable[PreTrainedConfig]) -> Iterator[ModuleState]:
    """Yields the states of all attention modules that one of these configs governs."""
    for config in configs:
        yield from list(_states.get(config, ()))
