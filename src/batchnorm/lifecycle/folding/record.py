"""One eager run of a model, written down: which layer was called with what memory, and what else touched that memory.

The run is watched from the dispatcher, where every operation of PyTorch passes, scripted functions and
operations inside composite ones included. A tensor is known by its storage, so that views are seen for what
they are; storages are held weakly, so that the record costs no memory and says at the end what is still held.
torch.export traces one example as well, but refuses models whose way depends on values: one recording serves all.
"""

from __future__ import annotations

import gc
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.kernels import COMPOSITE, use_backend

Key = int  # of a storage


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its storage and its geometry there."""

    key: Key
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Touch:
    """A read or a write of a storage, at one moment of the run."""

    moment: int
    what: str  # the operation and the module it ran in, for messages
    writes: bool


@dataclass(frozen=True)
class Convolution:
    """What one call of ``aten.convolution`` was given.

    ``even``: every output position sees every input channel with the same sum of weights, as it does without zero
    padding and without the gaps of a transposed convolution.
    """

    input: Place
    weight: Place
    bias: Place | None
    output: Place
    even: bool


@dataclass
class Call:
    """One call of a layer.

    Arguments:
        path: the layer's name in the model
        begin, end: moments
        input: the first argument, None if that is no tensor
        options: the other arguments by name, with a Place for each tensor
        given: every tensor among the arguments
        training: the layer's flag during the call
        output: None where the layer gave anything but one tensor
        convolutions: those inside the call
    """

    path: str
    begin: int
    input: Place | None
    options: Mapping[str, object]
    given: tuple[Place, ...]
    training: bool
    end: int = -1
    output: Place | None = None
    convolutions: list[Convolution] = field(default_factory=list)


@dataclass
class Record:
    """The run. ``touches`` is by storage, in order of time; ``held`` are the storages that outlived it."""

    calls: list[Call] = field(default_factory=list)
    touches: dict[Key, list[Touch]] = field(default_factory=lambda: defaultdict(list))
    held: set[Key] = field(default_factory=set)
    made: dict[Key, str] = field(default_factory=dict)  # by which operation; inputs and parameters are not there
    normalized_elsewhere: int = 0  # calls of batch norm as a function, outside any layer
    reads_values: list[str] = field(default_factory=list)  # where a tensor's value became a Python number

    def of(self, path: str) -> list[Call]:
        return [call for call in self.calls if call.path == path]

    def stray(self, key: Key, calls: Iterable[Call], begin: int = 0) -> Touch | None:
        """The first touch of the storage from ``begin`` on that is in none of the calls."""
        inside = [(call.begin, call.end) for call in calls]
        for touch in self.touches.get(key, ()):
            if touch.moment >= begin and not any(a <= touch.moment <= b for a, b in inside):
                return touch
        return None

    def written(self, key: Key, begin: int, end: int) -> Touch | None:
        """The first write of the storage between two moments."""
        return next((t for t in self.touches.get(key, ()) if t.writes and begin <= t.moment <= end), None)


def record(
    model: nn.Module, layers: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Record:
    """Run the model once and note the calls of ``layers``, the outermost where one stands inside another.

    The hooks that this takes are on ``model`` while it runs, so it should be a copy.
    """
    watch = _Watch({id(layer): path for path, layer in layers.items()})
    handles = []
    try:
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(
                    module.register_forward_pre_hook(watch.entering(path or type(module).__name__), with_kwargs=True)
                )
                handles.append(module.register_forward_hook(watch.leaving(), with_kwargs=True))
        # Our own layers run as operations that can be watched, whatever kernel was named.
        with use_backend(COMPOSITE), watch:
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    held = watch.held()
    known = {place.key for t in (*tensors_in(result), *model.parameters(), *model.buffers()) if (place := place_of(t))}
    if any(key in watch.record.made for key in held - known):
        gc.collect()  # a reference cycle is no owner
        held = watch.held()
    watch.record.held = held
    return watch.record


class _Watch(TorchDispatchMode):
    def __init__(self, layers: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record()
        self.storages: dict[Key, StorageWeakRef] = {}
        self._layers = layers
        self._where: list[str] = []
        self._inside: Call | None = None
        self._now = 0

    def held(self) -> set[Key]:
        """The storages that somebody still holds."""
        return {key for key, ref in self.storages.items() if not ref.expired()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._now += 1
        what = f"{func.overloadpacket} in {self._where[-1]}" if self._where else str(func.overloadpacket)
        for key, writes in self._touched(func, args, kwargs).items():
            self.record.touches[key].append(Touch(self._now, what, writes))
        out = func(*args, **kwargs)
        for tensor in tensors_in(out):
            known = len(self.storages)
            place = self._place(tensor)
            if place is not None and len(self.storages) > known:
                self.record.made[place.key] = what
        if func is torch.ops.aten.convolution.default and self._inside is not None:
            self._inside.convolutions.append(self._convolution(args, kwargs, out))
        elif func is torch.ops.aten._local_scalar_dense.default:
            self.record.reads_values.append(what)
        elif self._inside is None and "batch_norm" in func._schema.name:
            self.record.normalized_elsewhere += 1
        return out

    def _touched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Key, bool]:
        """Storages that the operation reads or writes, and whether it writes; one that it only views is not among."""
        touched: dict[Key, bool] = {}
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            alias = argument.alias_info
            if alias is not None and not alias.is_write:
                continue
            for tensor in tensors_in(value):
                place = self._place(tensor)
                if place is not None:
                    touched[place.key] = touched.get(place.key, False) or alias is not None
        return touched

    def _place(self, tensor: Tensor) -> Place | None:
        place = place_of(tensor)
        if place is not None and place.key not in self.storages:
            # A weak reference keeps the address from being used again.
            self.storages[place.key] = StorageWeakRef(tensor.untyped_storage())
        return place

    def _convolution(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Convolution:
        names = [argument.name for argument in torch.ops.aten.convolution.default._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        x, weight, y = (self._place(t) for t in (given["input"], given["weight"], out))
        assert x is not None and weight is not None and y is not None
        bias = None if given.get("bias") is None else self._place(given["bias"])
        even = not any(given["padding"])
        if given["transposed"]:
            single = all(size == 1 for size in (*weight.shape[2:], *given["stride"]))
            even = even and single and not any(given["output_padding"])
        return Convolution(x, weight, bias, y, even)

    def entering(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._where.append(path)
            if id(module) in self._layers and self._inside is None:
                self._now += 1
                path_ = self._layers[id(module)]
                first, *others = [
                    (name, self._place(value) if isinstance(value, Tensor) else value)
                    for name, value in _arguments(module, args, kwargs)
                ]
                places = [self._place(tensor) for tensor in tensors_in((args, kwargs))]
                given = tuple(place for place in places if place is not None)
                x = first[1] if isinstance(first[1], Place) else None
                self._inside = Call(path_, self._now, x, dict(others), given, module.training)
                self.record.calls.append(self._inside)
                # A kernel of its own may read its inputs without an operation that could be seen.
                for place in self._inside.given:
                    self.record.touches[place.key].append(Touch(self._now, path_, False))

        return hook

    def leaving(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            self._where.pop()
            call = self._inside
            # The call's own end: what runs inside it, itself called again included, is not noted.
            if call is not None and self._layers.get(id(module)) == call.path:
                self._now += 1
                call.end = self._now
                call.output = self._place(output) if isinstance(output, Tensor) else None
                self._inside = None

        return hook


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, object]]:
    """Names and values as the module's forward takes them, in its order."""
    signature = inspect.signature(module.forward)
    found: list[tuple[str, object]] = []
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found += [(f"{name}[{i}]", each) for i, each in enumerate(value)]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found += value.items()
        else:
            found.append((name, value))
    return found or [("", None)]


def place_of(tensor: Tensor) -> Place | None:
    """None for a tensor without a storage of the usual kind: sparse, or a layer's that is not initialized yet."""
    try:
        key = tensor.untyped_storage()._cdata
        return Place(key, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def tensors_in(value: object) -> list[Tensor]:
    """Every tensor in a value made of tuples, lists, dicts and dataclasses.

    >>> [t.shape for t in tensors_in({"a": (torch.zeros(2), 1), "b": [torch.zeros(3)]})]
    [torch.Size([2]), torch.Size([3])]
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for each in value.values() for tensor in tensors_in(each)]
    if isinstance(value, (tuple, list, set, frozenset)):
        return [tensor for each in value for tensor in tensors_in(each)]
    if is_dataclass(value) and not isinstance(value, type):
        return [tensor for each in fields(value) for tensor in tensors_in(getattr(value, each.name, None))]
    return []
