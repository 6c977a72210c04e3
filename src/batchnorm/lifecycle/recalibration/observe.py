"""A model under observation: every batch normalization is reported before it happens, however it is reached."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from batchnorm.errors import ArgumentError, expected
from batchnorm.functional import batch_moments
from batchnorm.lifecycle.recalibration.dependence import Dependence
from batchnorm.moments import Moments, broadcast_weights
from batchnorm.nn import BatchNorm

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_ABSENT = object()


@dataclass(frozen=True, eq=False)
class Use:
    """A layer is about to normalize ``input``, channels in dimension 1."""

    name: str
    layer: _BatchNorm
    input: Tensor
    mask: Tensor | None = None
    sample_weight: Tensor | None = None

    def moments(self) -> Moments:
        """Of what the layer is about to normalize."""
        x = self.input.detach()
        mask, weight = self.mask, self.sample_weight
        mask = None if mask is None else broadcast_weights("recalibrate", "mask", x, mask)
        weight = None if weight is None else broadcast_weights("recalibrate", "sample_weight", x, weight.detach())
        return batch_moments(x, mask, weight)


# Told of each use; says whether the layer normalizes it by the batch's own statistics. May raise to end the forward.
OnUse = Callable[[Use], bool]


class Observation:
    """Holds a model in eval mode, its layers on statistics of their own making, and reports each use of a layer.

    Between ``begin`` and ``end`` the layers have copies of their buffers, so nothing that a forward does reaches
    the real ones. A use is seen in three ways, since not every module calls its norm as a module:

    - A call of ``torch.nn.functional.batch_norm`` or ``torch.batch_norm`` with a layer's ``running_mean``,
      by whatever code: torch's layers, subclasses of them that prepare their input first, functional uses.
    - A layer of this library has a ``forward`` of its own meanwhile, which ``layer(x)`` and ``layer.forward(x)``
      both go through.
    - So has every other layer; if neither of the above was seen in it, it computes by hand, and what it is given
      is what it normalizes.

    Not seen: a scripted module, a layer's buffers used in arithmetic outside of it, ``functional_call`` with other
    buffers, and the class's own ``forward`` or a lower-level function called beside the instance for a layer of
    this library.
    """

    def __init__(self, model: nn.Module, layers: dict[str, _BatchNorm]) -> None:
        self.layers = layers
        self.dependence: Dependence | None = None
        self._modes = [(module, module.training) for module in model.modules()]
        self._originals = {name: {b: layer._buffers.get(b) for b in BUFFERS} for name, layer in layers.items()}
        self._others = [m for m in model.modules() if isinstance(m, BatchNorm) and m not in layers.values()]
        self._own = [
            (layer, layer.__dict__.get("forward", _ABSENT), layer.track_running_stats)
            for layer in (*layers.values(), *self._others)
        ]
        self._copies: dict[str, dict[str, Tensor | None]] = {}
        self._on_use: OnUse = lambda use: False
        self._open: list[_Open] = []
        self._calls = _Calls(self)
        self._stack = _get_current_function_mode_stack()

    def begin(self) -> None:
        """Flags are set one by one: a ``train`` or ``eval`` of the model's own may do more than that."""
        for module, _ in self._modes:
            module.training = False
        for name, layer in self.layers.items():
            self._copies[name] = {b: None if t is None else t.clone() for b, t in self._originals[name].items()}
            layer._buffers.update(self._copies[name])
            layer.__dict__["forward"] = self._forward(name, layer, layer.forward)
        for other in self._others:
            other.__dict__["forward"] = self._passing(other.forward)

    def end(self) -> None:
        """Everything as it was; may be called again."""
        _set_stack(self._stack)
        for layer, forward, tracked in self._own:
            if forward is _ABSENT:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward
            layer.track_running_stats = tracked
        for layer, originals in zip(self.layers.values(), self._originals.values(), strict=True):
            layer._buffers.update({b: t for b, t in originals.items() if b in layer._buffers})
        for module, mode in self._modes:
            module.training = mode

    def put(self, name: str, mean: Tensor, var: Tensor) -> None:
        """Let a layer normalize by these statistics, rounded as its buffers are."""
        held = self._copies[name]
        for b, value in (("running_mean", mean), ("running_var", var)):
            held_tensor = held[b]
            assert held_tensor is not None
            held_tensor.copy_(value)

    def statistics(self, name: str) -> tuple[Tensor, Tensor]:
        """What a layer normalizes by now, float64."""
        mean, var = self._copies[name]["running_mean"], self._copies[name]["running_var"]
        assert mean is not None and var is not None
        return mean.double(), var.double()

    @contextmanager
    def reporting(self, on_use: OnUse) -> Iterator[None]:
        """One forward, its uses told to ``on_use``; graphs compiled before are run as the Python they came from."""
        self._on_use, self._open = on_use, []
        with torch.no_grad(), without_compiled_graphs(), self._modes_of_torch([*self._stack, self._calls]):
            yield

    def _forward(self, name: str, layer: _BatchNorm, original: Callable[..., Any]) -> Callable[..., Any]:
        run = self._run_ours if isinstance(layer, BatchNorm) else self._run_other

        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(name, layer, original, args, kwargs)

        return forward

    def _passing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a layer of ours that is not measured."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._unfollowed():
                y = original(*args, **kwargs)
                if self.dependence is not None:
                    self.dependence.made((args, kwargs), y)
            return y

        return forward

    def _run_ours(
        self, name: str, layer: _BatchNorm, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        x = _input_of(args, kwargs)
        if not _fits(layer, x):
            with self._unfollowed():
                original(*args, **kwargs)  # the layer's own error is the better one
            todo = "Its class changes the input before it normalizes: let it hold a layer instead of being one."
            invariant = f"an input of {name} with its {layer.num_features} channels in dimension 1"
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(expected("recalibrate", invariant, got, todo))
        with self._unfollowed():
            given = dict(zip(("input", "residual", "mask", "sample_weight"), args, strict=False)) | kwargs
            use = Use(name, layer, x, given.get("mask"), given.get("sample_weight"))
            training = layer.training  # a module may set it for the call
            try:
                layer.training = False
                if self._on_use(use):  # without buffers a layer in eval mode has nothing else to normalize by
                    layer._buffers.update(dict.fromkeys(BUFFERS))
                y = original(*args, **kwargs)
            finally:
                layer.training = training
                layer._buffers.update(self._copies[name])
            self._ran(name, (args, kwargs), y)
        return y

    def _run_other(
        self, name: str, layer: _BatchNorm, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        opened = _Open(name)
        self._open.append(opened)
        try:
            y = original(*args, **kwargs)
        finally:
            self._open.pop()
        x = _input_of(args, kwargs)
        if opened.seen or not _fits(layer, x):
            return y
        with self._unfollowed():
            if self._on_use(Use(name, layer, x)):
                tracked = layer.track_running_stats
                try:
                    layer.training, layer.track_running_stats = True, False
                    y = original(*args, **kwargs)
                finally:
                    layer.training, layer.track_running_stats = False, tracked
                    layer._buffers.update(self._copies[name])
            self._ran(name, (args, kwargs), y)
        return y

    @contextmanager
    def _unfollowed(self) -> Iterator[None]:
        """What we and our layers do ourselves is no part of the model, and with no mode on the kernels may run."""
        with self._modes_of_torch([mode for mode in _get_current_function_mode_stack() if mode is not self._calls]):
            yield

    @contextmanager
    def _modes_of_torch(self, stack: list[TorchFunctionMode]) -> Iterator[None]:
        """Set as a whole: a mode may not lie on top of the stack when it has to go, and an interrupt may come."""
        before = _get_current_function_mode_stack()
        try:
            _set_stack(stack)
            yield
        finally:
            _set_stack(before)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Every function of torch that a forward calls goes through here."""
        order = _ARGUMENTS.get(func)
        if order is not None:
            given = dict(zip(order, args, strict=False)) | kwargs
            name = self._owner(given.get("running_mean"))
            if name is not None and _fits(self.layers[name], given["input"]):
                return self._normalize(name, func, given)
        if self.dependence is None:
            return func(*args, **kwargs)
        return self.dependence.follow(func, args, kwargs)

    def _normalize(self, name: str, func: Callable[..., Any], given: dict[str, Any]) -> Any:
        for opened in self._open:
            opened.seen = opened.seen or opened.name == name
        by_batch = self._on_use(Use(name, self.layers[name], given["input"]))
        given["training"] = by_batch
        if by_batch:
            given["running_mean"] = given["running_var"] = None
        # torch.batch_norm knows its arguments by place alone in some releases.
        y = func(*(given[key] for key in _ARGUMENTS[func] if key in given))
        self._ran(name, given, y)
        return y

    def _owner(self, mean: object) -> str | None:
        if not isinstance(mean, Tensor):
            return None
        return next((name for name, held in self._copies.items() if held["running_mean"] is mean), None)

    def _ran(self, name: str, inputs: object, output: object) -> None:
        if self.dependence is not None:
            self.dependence.ran(name, inputs, output)


@dataclass
class _Open:
    """A layer's forward that is running, and whether its normalization was seen in it."""

    name: str
    seen: bool = False


class _Calls(TorchFunctionMode):
    def __init__(self, observation: Observation) -> None:
        super().__init__()
        self._observation = observation

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._observation._call(func, args, kwargs or {})


_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    nn.functional.batch_norm: (
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
    ),
    torch.batch_norm: (
        "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled",
    ),
}  # fmt: skip


def _set_stack(stack: list[TorchFunctionMode]) -> None:
    while _get_current_function_mode_stack():
        _pop_mode()
    for mode in stack:
        _push_mode(mode)


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input", kwargs.get("x"))


def _fits(layer: _BatchNorm, x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() >= 2 and x.shape[1] == layer.num_features


def without_compiled_graphs() -> AbstractContextManager[object]:
    """A compiled graph would run as it was recorded, past everything above. Without dynamo there is none."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return cast(AbstractContextManager[object], torch.compiler.set_stance("force_eager"))
