"""A shared trunk: the layers below the first random one run once for both passes of the consistency term."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..attention.parts import configs_of
from .comparison import are_close, generator_states, preserved
from .deterministic import KEEP_OUT, leading_layers, random_parts, settings_of_config
from .repeated_rows import RepeatedRows


logger = logging.getLogger(__name__)

# What a model collects from all layers. The layers of the trunk would return it for fewer rows.
COLLECTED = ("output_hidden_states", "output_attentions", "output_router_logits")
LOGITS = ("logits", "start_logits", "end_logits")


class SharedTrunk:
    """Runs the layers below the first random one on `B` rows, in a forward of `B` rows and their repetitions.

    The model is called with all rows. Hooks cut the arguments of the trunk's layers to the first `B` rows, and repeat
    the rows of what the last of them returns; everything else computes all rows. The loss and the gradients equal
    those without a trunk up to rounding, because a matrix product with another number of rows rounds differently.

    Args:
        model (`torch.nn.Module`): The model, without the wrappers of a launcher.

    Raises:
        ValueError: if no layer can be shared, see [`~training.deterministic.leading_layers`].

    Example:

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_attentiondrop import AttentionDropConfig
    >>> config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=4, intermediate_size=64)
    >>> config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    >>> config.attention_drop = AttentionDropConfig(p=0.1, layers=[2, 3])
    >>> model = BertForSequenceClassification._from_config(config, attn_implementation="attentiondrop")
    >>> list(SharedTrunk(model).layers)
    ['bert.encoder.layer.0', 'bert.encoder.layer.1']
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stacks = leading_layers(model)
        self._is_installed = self._is_active = self._is_comparing = False
        self._has_checked = self._has_skipped = False
        self._layout = RepeatedRows(0)
        self._generators: list[Tensor] = []

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The shared layers by name."""
        return {name: layer for stack in self.stacks for name, layer in stack.items()}

    def fits(self, model: nn.Module) -> bool:
        """True if these are layers of `model` and still not random: `configure` may have started a perturbation."""
        return model is self.model and not any(any(random_parts(*item)) for item in self.layers.items())

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Installs the hooks for one forward and its backward pass, which may recompute layers."""
        handles: list[Any] = []
        for stack in self.stacks:
            *_, last = layers = list(stack.values())
            for layer in layers:
                hook = partial(self._before, is_first=layer is layers[0])
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            handles.append(last.register_forward_hook(self._after))
        self._is_installed = True
        try:
            yield
        finally:
            self._is_installed = self._is_active = False
            for handle in handles:
                handle.remove()

    def start(self, model: nn.Module, inputs: Mapping[str, Any], batch_size: int, rows: Tensor | None = None) -> None:
        """Shares the trunk in the next forward and its backward pass. Does nothing unless the hooks are installed and
        some row is repeated.

        Args:
            model (`torch.nn.Module`): The module that the Trainer calls.
            inputs (`Mapping[str, Any]`): The inputs of all rows: the `B` rows of the batch, then their repetitions.
            batch_size (`int`): `B`.
            rows (`torch.Tensor` of shape `(n,)`, *optional*):
                Which of the `B` rows are repeated, each once, in the order of the inputs. By default all.

        Raises:
            ValueError:
                If outputs of all layers are requested, or documents are packed with offsets. On the first batch, also
                if something is random below the trunk or in it, or if sharing it changes the logits in evaluation
                mode.
        """
        if not self._is_installed or (rows is not None and len(rows) == 0):
            return
        self._check_inputs(inputs)
        self._layout = RepeatedRows(batch_size, rows)
        if not self._has_checked:
            self._check(model, inputs)
        self._is_active = True

    # --- hooks

    def _before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_first: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Cuts the arguments of a layer to the first `B` rows."""
        if not self._is_active:
            return None
        layout = self._layout
        states = self._checked_states(layer, args[0] if args else kwargs.get("hidden_states"))
        if is_first and layout.is_ambiguous(states, (args, kwargs)):
            self._has_skipped = True
            return None
        if self._is_comparing:
            if is_first:
                self._generators = generator_states(states.device)
            layout.map((args, kwargs), partial(self._compare, layer), layer)
            return None
        if len(states) == layout.num_rows and not is_first:
            return None  # The first layer did not cut the batch.
        if is_first:
            _check_empty_cache((*args, *kwargs.values()))
        return (
            tuple(layout.map(value, layout.cut, layer) for value in args),
            {name: layout.map(value, layout.cut, layer) for name, value in kwargs.items()},
        )

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Repeats the rows of what the last layer of a trunk returns."""
        if not self._is_active:
            return None
        states = self._checked_states(layer, output[0] if isinstance(output, tuple) else output)
        if len(states) == self._layout.num_rows:
            if self._is_comparing and not self._has_skipped:
                self._compare(layer, states, 0)
                self._check_generators(layer, states.device)
            return None
        return (self._layout.repeat(states), *output[1:]) if isinstance(output, tuple) else self._layout.repeat(states)

    def _checked_states(self, layer: nn.Module, states: Any) -> Tensor:
        sizes = self._layout.batch_size, self._layout.num_rows
        if isinstance(states, Tensor) and states.dim() > 2 and len(states) in sizes:
            return states
        got = f"shape {tuple(states.shape)}" if isinstance(states, Tensor) else f"a {type(states).__name__}"
        raise ValueError(
            f"Expected hidden states of shape ({self._layout.num_rows}, length, features) to enter and leave "
            f"{type(layer).__name__}, got {got}: the shared trunk cuts and repeats their rows, and a wrong guess "
            "would mix them up. Set `consistency_shared_trunk=False` for this model."
        )

    # --- checks

    def _check(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Checks on one batch that the trunk changes nothing, without any effect on the training."""
        with preserved(self.model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            self._is_active = self._is_comparing = True
            has_warned, self._has_skipped = self._has_skipped, False
            try:
                model(**inputs)
                self._is_comparing = False
                if self._has_skipped:
                    if not has_warned:
                        logger.warning(
                            f"A batch runs without the shared trunk: its {self._layout.num_rows} rows are also the "
                            "length of its sequences, so tensors do not show which dimension is the batch. Choose "
                            "another batch size if this is true of all batches."
                        )
                    return
                self.model.eval()
                shared = self._logits(model, inputs)
                self._is_active = False
                plain = self._logits(model, inputs)
            except RuntimeError as error:  # Rows of two numbers do not fit together, which is found before any step.
                if self._is_comparing or not self._is_active or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise self._changes_outputs(f"fails with {error!r}") from error
            finally:
                self._is_active = self._is_comparing = False
        dtypes = [parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()]
        device = next(self.model.parameters()).device.type
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
        for name, logits in plain.items():
            if not are_close(shared[name], logits, dtypes):
                raise self._changes_outputs(f"has other `{name}`")
        self._has_checked = True

    def _logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        outputs = model(**inputs)
        outputs = outputs if isinstance(outputs, Mapping) else {}
        return {name: outputs[name] for name in LOGITS if isinstance(outputs.get(name), Tensor)}

    def _changes_outputs(self, difference: str) -> ValueError:
        return ValueError(
            f"The shared trunk must not change {type(self.model).__name__}, which {difference} with it in evaluation "
            f"mode: its layers {', '.join(self.layers)} do not compute each row by itself, or return more than hidden "
            "states. Set `consistency_shared_trunk=False` for this model."
        )

    def _compare(self, layer: nn.Module, value: Tensor, dim: int) -> Tensor:
        """Compares the rows with their repetitions."""
        if not are_close(self._layout.repeat(self._layout.cut(value, dim), dim), value):
            raise self._is_random(
                layer,
                "a row and its repetition differ",
                "something below is random, such as a dropout of the embeddings",
            )
        return value

    def _check_generators(self, layer: nn.Module, device: torch.device) -> None:
        """Checks that no layer of a trunk has drawn random numbers, which may change its output only rarely."""
        if not all(map(torch.equal, self._generators, generator_states(device))):
            raise self._is_random(layer, "its layers draw random numbers", "one of them is random")

    def _is_random(self, layer: nn.Module, found: str, reason: str) -> ValueError:
        name = next(name for name, other in self.layers.items() if other is layer)
        config = settings_of_config(self.model)
        return ValueError(
            f"The shared trunk needs equal passes up to its last layer, but in training mode {found} at {name}: "
            f"{reason}{f' (above 0 in the config: {config})' if config else ''}. Sharing would change the training. "
            f"Set it to 0, {KEEP_OUT}."
        )

    def _check_inputs(self, inputs: Mapping[str, Any]) -> None:
        config = getattr(self.model, "config", None)
        parts = [vars(part) for part in configs_of(config)] if config is not None else []
        for name in COLLECTED:
            if inputs.get(name) or any(part.get(name) or part.get(f"_{name}") for part in parts):
                raise ValueError(
                    f"The shared trunk does not work with `{name}`: the shared layers return it for fewer rows than "
                    f"the others. Set it to False in the config and the inputs, {KEEP_OUT}."
                )
        if offsets := [name for name in inputs if name.startswith("cu_seq")]:
            raise ValueError(
                f"The shared trunk does not work with `{offsets[0]}`: the offsets of packed documents count the "
                f"tokens of all rows. Pack without offsets, {KEEP_OUT}."
            )


def _check_empty_cache(arguments: tuple[Any, ...]) -> None:
    if any(isinstance(value, Cache) and value.get_seq_length() > 0 for value in arguments):
        raise ValueError(
            "The shared trunk needs an empty cache of keys and values, got one with tokens for all rows (as in prefix "
            f"tuning), which cannot be cut. Remove it, {KEEP_OUT}."
        )
