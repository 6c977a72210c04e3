"""What becomes of each norm's output, recorded in a run of an example."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

# Functions that look at a tensor without reading its values.
METADATA = frozenset(
    {
        *("size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "storage_offset", "__len__"),
        *("is_contiguous", "is_floating_point", "is_complex", "get_device"),
    }
)
ADDITIONS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
ACTIVATIONS = frozenset(
    {
        *("relu", "relu_", "leaky_relu", "leaky_relu_", "silu", "gelu"),
        *("sigmoid", "sigmoid_", "tanh", "tanh_"),
    }
)


@dataclass(frozen=True)
class Activity:
    """An activation that our layers have: its name and, of leaky_relu, the slope below zero."""

    name: str
    negative_slope: float = 0.01

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class Use:
    """One function that took a value.

    Arguments:
        function: its name
        caller: the module in whose forward it was called
        activity: the activation it is, or None
        module: the module that is nothing but this activation, or None; ``caller`` is then the module that called it
        result: the sum it gave, where it was an addition
    """

    function: str
    caller: nn.Module
    activity: Activity | None = None
    module: nn.Module | None = None
    result: Value | None = None


@dataclass(eq=False)
class Value:
    """A norm's output, or the sum of one and something else.

    Arguments:
        norms: the norms whose outputs it holds: one, or two where two outputs were added up
        caller: the module in whose forward the norm was called, or the sum was formed
        is_sum: whether it is a sum
        in_place: whether that was formed in place
        uses: what took it
        trouble: why it cannot be joined with what follows, whatever that is
    """

    norms: tuple[nn.Module, ...]
    caller: nn.Module
    is_sum: bool = False
    in_place: bool = False
    uses: list[Use] = field(default_factory=list)
    trouble: str = ""
    tensor: weakref.ReferenceType[Tensor] | None = None


@dataclass(eq=False)
class _Frame:
    """A module that is being run."""

    module: nn.Module
    given: tuple[Any, ...]
    functions: int = 0
    use: Use | None = None
    gave: Any = None


class Recording(TorchFunctionMode):
    """Run a model within it, without gradients; then ``close`` and read ``values`` and ``calls``.

    Arguments:
        norms: the layers whose outputs are followed
    """

    def __init__(self, norms: set[nn.Module]) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.calls: Counter[nn.Module] = Counter()
        self._norms = norms
        self._now: Any = WeakTensorKeyDictionary()
        self._frames: list[_Frame] = []
        self._hooks = ExitStack()

    def __enter__(self) -> Recording:
        self._hooks.callback(register_module_forward_pre_hook(self._enter).remove)
        self._hooks.callback(register_module_forward_hook(self._leave, always_call=True).remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def close(self) -> None:
        """Find out which outputs are still held by someone, after the result of the run was let go."""
        gc.collect()
        for value in self.values:
            if value.tensor is not None and value.tensor() is not None:
                value.trouble = value.trouble or "it is returned or kept beside what follows"

    # Modules

    def _enter(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        self.calls[module] += 1
        if module in self._norms and self._frames:
            # Counted here: a compiled kernel takes its input without a function of torch's.
            for value in self._found(given):
                value.uses.append(Use(type(module).__name__, self._frames[-1].module))
        self._frames.append(_Frame(module, given))
        self._handed_through(module, given)

    def _leave(self, module: nn.Module, given: tuple[Any, ...], gave: Any) -> None:
        frame = self._frames.pop()
        self._handed_through(module, gave)
        caller = self._frames[-1].module if self._frames else module
        if module in self._norms:
            if isinstance(gave, Tensor):
                self._now[gave] = self._new(Value((module,), caller), gave)
        elif frame.use is not None and frame.functions == 1 and frame.gave is gave and _is_stateless(module):
            # A module that is one activation and nothing else, whatever it is called.
            frame.use.module, frame.use.caller = module, caller

    def _handed_through(self, module: nn.Module, handed: Any) -> None:
        if module in self._norms or not _has_hooks(module):
            return
        for value in self._found(handed):
            value.trouble = value.trouble or f"{type(module).__name__}, which has hooks, sees it"

    # Functions

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._frames or self._frames[-1].module in self._norms:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", str(function))
        taken = list(self._found((args, kwargs)))
        frame = self._frames[-1]
        result = function(*args, **kwargs)
        if name != "__get__" and name not in METADATA:
            frame.functions += 1
        if not taken or ((name in METADATA or name == "__get__") and not isinstance(result, Tensor)):
            return result
        activity = activation_of(name, args, kwargs)
        if activity is not None and isinstance(args[0], Tensor) and args[0] in self._now:
            self._activated(frame, name, activity, args[0], result)
        elif name in ADDITIONS and _is_plain_sum(args, kwargs):
            self._added(frame, name, args, result)
        else:
            for value in taken:
                value.uses.append(Use(name, frame.module))
        return result

    def _activated(self, frame: _Frame, name: str, activity: Activity, given: Tensor, gave: Tensor) -> None:
        value = self._now[given]
        use = Use(name, frame.module, activity)
        value.uses.append(use)
        if frame.given and frame.given[0] is given:
            frame.use, frame.gave = use, gave
        if gave is given:
            self._over(value, given)

    def _added(self, frame: _Frame, name: str, args: tuple[Any, ...], gave: Tensor) -> None:
        parts = [self._now[t] for t in args[:2] if t in self._now]
        norms = tuple(norm for part in parts for norm in part.norms)
        total = Value(norms, frame.module, is_sum=True, in_place=name in ("add_", "__iadd__"))
        if any(part.is_sum for part in parts):
            total.trouble = "it is a sum of more than two"
        if gave.shape != args[0].shape or gave.shape != args[1].shape:
            total.trouble = "its two parts differ in shape"
        if gave is args[0] and args[0] not in self._now:
            total.trouble = "it is added in place to a tensor that is not the norm's"
        for part in parts:
            part.uses.append(Use(name, frame.module, result=total))
        if gave is args[0] and args[0] in self._now:
            self._over(self._now[args[0]], args[0])
        self._now[gave] = self._new(total, gave)

    def _new(self, value: Value, tensor: Tensor) -> Value:
        value.tensor = weakref.ref(tensor)
        self.values.append(value)
        return value

    def _over(self, value: Value, tensor: Tensor) -> None:
        """The tensor was changed in place: whoever holds it sees what follows, in a joined run as well."""
        value.tensor = None
        del self._now[tensor]

    def _found(self, holder: Any) -> Iterator[Value]:
        for leaf in tree_leaves(holder):
            if isinstance(leaf, Tensor) and leaf in self._now:
                yield self._now[leaf]


def activation_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activity | None:
    """The activation that a call is, if it is one that our layers have."""
    if name not in ACTIVATIONS or not args or kwargs.get("out") is not None:
        return None
    name = name.removesuffix("_")
    if name == "leaky_relu":
        slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
        return Activity(name, float(slope)) if isinstance(slope, (int, float)) else None
    if name == "gelu" and kwargs.get("approximate", "none") != "none":
        return None
    return Activity(name)


def _is_plain_sum(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return len(args) == 2 and all(isinstance(t, Tensor) for t in args) and not kwargs and args[0] is not args[1]


def _is_stateless(module: nn.Module) -> bool:
    return not (module._modules or module._parameters or module._buffers)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
