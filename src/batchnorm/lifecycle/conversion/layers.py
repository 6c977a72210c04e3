"""Which layer becomes which, in both directions, and why another is left as it is."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from batchnorm import functional
from batchnorm.nn.batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.distributed import WORLD, Ranks
from batchnorm.nn.frozen import BUFFERS, FrozenBatchNorm2d, has_frozen_statistics
from batchnorm.nn.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.nn.options import check_options

# What a converted layer remembers. It stands on the layer alone, is copied and pickled with it, and goes with `revert`.
MEMORY = "_converted_from"

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: BatchNorm,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
TORCHS = {ours: theirs for theirs, ours in OURS.items() if ours is not BatchNorm}
STATE = (*BUFFERS, "num_batches_tracked")
# Keyword-only arguments of our layers that have a meaning of their own for `revert`, or for torch's layers too.
UNDERSTOOD = frozenset({"bias", "activation", "negative_slope", "process_group"})
UNCHANGED: Literal["unchanged"] = "unchanged"
"""In place of a process group: every layer keeps the one that it has."""
# The eps of frozen layers that hold none, as transformers' do.
USUAL_EPS = 1e-5


@dataclass(frozen=True)
class Origin:
    """What a layer was: its class, the attributes that it was given since, and whether an activation was joined."""

    kind: type[nn.Module]
    added: tuple[str, ...] = ()
    fused: bool = False


@dataclass(frozen=True)
class Swap:
    """A layer's new class, with the attributes that it gets and loses."""

    to: type[nn.Module]
    gets: dict[str, Any]
    loses: tuple[str, ...] = ()


def is_ours(layer: nn.Module) -> bool:
    return isinstance(layer, (BatchNorm, FrozenBatchNorm2d))


def is_norm(layer: nn.Module) -> bool:
    """Whether the layer is a batch normalization of any maker, frozen ones by their buffers."""
    return isinstance(layer, (_BatchNorm, FrozenBatchNorm2d)) or looks_frozen(layer)


def looks_frozen(layer: nn.Module) -> bool:
    found = {name: buffer for name, buffer in layer._buffers.items() if buffer is not None}
    sizes = {tuple(found[name].shape) for name in BUFFERS if name in found}
    without_parameters = all(p is None for p in layer._parameters.values())
    return set(found) == set(BUFFERS) and without_parameters and len(sizes) == 1 and len(sizes.pop()) == 1


def class_name(layer: nn.Module) -> str:
    """The name of its class, without the one that a parametrization puts on top."""
    return plain_class(layer).__name__


def plain_class(layer: nn.Module) -> type[nn.Module]:
    kind: type[nn.Module] = parametrize.type_before_parametrizations(layer)
    return kind


def to_ours(layer: nn.Module, ranks: Ranks | Literal["unchanged"] | None = UNCHANGED) -> Swap | str:
    """What ``layer`` is swapped for, or in words why it is left.

    Arguments:
        ranks: of the process group that it gets, None for none

    Raises:
        ArgumentError: a process group for a layer with virtual batches
    """
    if is_ours(layer):
        if ranks == UNCHANGED or not isinstance(layer, BatchNorm) or layer._ranks == ranks:
            return "is ours already"
        if ranks is not None and layer.virtual_batch_size is not None:
            check_options("convert", ["process_group", "virtual_batch_size"])
        return Swap(type(layer), _group_attributes(ranks))
    if not isinstance(layer, _BatchNorm):
        return _frozen_to_ours(layer)
    kind = plain_class(layer)
    theirs = next((t for t in kind.__mro__ if t in OURS), None)
    if theirs is None:
        return f"{kind.__name__} is none of torch.nn's layers"
    own = _members_of_its_own(kind, theirs)
    if own:
        return f"{kind.__name__} is a subclass of torch.nn.{theirs.__name__} with {own} of its own"
    ours = OURS[theirs]
    reason = _instance_reason(layer, theirs, ours)
    if reason:
        return reason
    swap = _swap(layer, kind, ours, _built_like(layer, ours))
    if theirs is nn.SyncBatchNorm:
        # Kept in our form: a ProcessGroup cannot be pickled.
        its = layer.process_group
        swap = replace(swap, loses=("process_group",))
        swap.gets.update(_group_attributes(Ranks.of("convert", WORLD if its is None else its)))
    if ranks != UNCHANGED:
        swap.gets.update(_group_attributes(ranks))
    return swap


def _group_attributes(ranks: Ranks | None) -> dict[str, Any]:
    """What a layer of ours keeps of its process group."""
    return {"_ranks": ranks, "_exchanges": ranks is not None}


def to_torchs(layer: nn.Module) -> Swap | str:
    """What ``layer``, one of ours, is swapped for, or in words why it is left. Its activation is not looked at."""
    kind, memory = plain_class(layer), layer.__dict__.get(MEMORY)
    ranks = layer._ranks if isinstance(layer, BatchNorm) else None
    if isinstance(memory, Origin) and not issubclass(memory.kind, (BatchNorm, FrozenBatchNorm2d)):
        theirs, loses = memory.kind, (*memory.added, MEMORY)
        if issubclass(theirs, nn.modules.batchnorm._LazyNormBase) and kind not in TORCHS.keys() & LAZY:
            theirs = theirs.cls_to_become  # type: ignore[assignment]
    elif kind in TORCHS or (kind is BatchNorm and ranks is not None):
        if ranks is not None and kind in LAZY:
            return "torch.nn has no lazy layer with a process group"
        theirs = TORCHS[kind] if ranks is None else nn.SyncBatchNorm
        ours, before = _built_like(layer, kind), _built_like(layer, theirs)
        loses = (*(set(ours.__dict__) - set(before.__dict__)), MEMORY)
    elif kind is BatchNorm:
        return "BatchNorm takes an input of any rank, and torch.nn has no such layer"
    elif kind is FrozenBatchNorm2d:
        return "torch.nn has no frozen layer, and this one was built as ours"
    else:
        return f"{kind.__name__} is a subclass of batchnorm.{_ours_below(kind).__name__}"
    extras = _extras_in_use(layer)
    if extras:
        return f"torch.nn.{theirs.__name__} has nothing for {extras}"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    gets: dict[str, Any] = {}
    if issubclass(theirs, nn.SyncBatchNorm):
        if ranks is None:
            return "it lost its process group since, and torch.nn.SyncBatchNorm always has one"
        given = ranks.given()
        if isinstance(given, Ranks):
            return f"this process does not have its {given!r}"
        gets["process_group"] = None if given == WORLD else given
    return Swap(_parametrized_like(layer, theirs), gets, tuple(n for n in loses if n in layer.__dict__))


LAZY = {LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d}


def with_activation(layer: nn.Module, name: str | None, negative_slope: float = 0.01) -> dict[str, Any]:
    """The attributes by which ``layer``, one of ours, gets that activation, and remembers that it was joined."""
    kind = plain_class(layer)
    plain = _built_like(layer, kind).__dict__
    active = _built_like(layer, kind, activation=name, negative_slope=negative_slope).__dict__
    # Only what the activation decides: tensors and hooks of the models are never equal by `is`.
    gets = {key: active[key] for key in plain if key not in _COMMON and plain[key] != active[key]}
    before = layer.__dict__.get(MEMORY, Origin(kind))
    return {**gets, MEMORY: replace(before, fused=True)}


def without_activation(layer: nn.Module) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The attributes that take a joined activation away again, and those to remove."""
    kind, memory = plain_class(layer), layer.__dict__[MEMORY]
    plain = _built_like(layer, kind).__dict__
    active = _built_like(layer, kind, activation="relu").__dict__
    gets = {key: plain[key] for key in plain if key not in _COMMON and plain[key] != active[key]}
    if issubclass(memory.kind, (BatchNorm, FrozenBatchNorm2d)):
        return gets, (MEMORY,)
    return {**gets, MEMORY: replace(memory, fused=False)}, ()


_COMMON = frozenset(nn.Module().__dict__)


def _swap(layer: nn.Module, kind: type[nn.Module], ours: type[nn.Module], template: nn.Module) -> Swap:
    gets = {name: value for name, value in template.__dict__.items() if name not in layer.__dict__}
    return Swap(_parametrized_like(layer, ours), {**gets, MEMORY: Origin(kind, tuple(gets))})


def _parametrized_like(layer: nn.Module, kind: type[nn.Module]) -> type[nn.Module]:
    """``kind``, or what torch's parametrization of ``layer`` would have made of it."""
    if not parametrize.is_parametrized(layer):
        return kind
    members = {n: m for n, m in vars(type(layer)).items() if n not in ("__dict__", "__weakref__", "__doc__")}
    return type(f"Parametrized{kind.__name__}", (kind,), members)


def _built_like(layer: nn.Module, kind: type[nn.Module], **options: Any) -> nn.Module:
    """A layer of class ``kind`` with the options of ``layer``, on no device."""
    with torch.no_grad():
        if kind is FrozenBatchNorm2d:
            return FrozenBatchNorm2d(1, device="meta", **options)
        arguments: dict[str, Any] = {
            "affine": layer.affine,
            "track_running_stats": layer.track_running_stats,
            "device": "meta",
            **options,
        }
        if "bias" in inspect.signature(kind.__init__).parameters:
            arguments["bias"] = "bias" not in layer._parameters or layer._parameters["bias"] is not None
        if not issubclass(kind, nn.modules.batchnorm._LazyNormBase):
            arguments["num_features"] = 1
        return kind(**arguments)


def _members_of_its_own(kind: type[nn.Module], theirs: type[nn.Module]) -> str:
    """What the classes between ``kind`` and torch's define, named for a message."""
    between = kind.__mro__[: kind.__mro__.index(theirs)]
    usual = {"__module__", "__doc__", "__qualname__", "__annotations__", "__firstlineno__", "__static_attributes__"}
    names = sorted({name for c in between if not issubclass(theirs, c) for name in vars(c)} - usual)
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _instance_reason(layer: nn.Module, theirs: type[nn.Module], ours: type[nn.Module]) -> str:
    """Why this instance cannot be swapped though its class can; "" if it can."""
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    missing = [name for name in STATE if not hasattr(layer, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    template = _built_like(layer, ours)
    own = set(layer.__dict__) - set(_built_like(layer, theirs).__dict__)
    if has_frozen_statistics(layer):
        own.discard("train")  # which does the same on ours
    clash = sorted(own & (set(template.__dict__) | set(dir(ours)) | {MEMORY}))
    return f"it has an attribute of its own where ours has one: {', '.join(clash)}" if clash else ""


def _extras_in_use(layer: nn.Module) -> str:
    """The options of our layer that torch's has no place for, as ``too_few='running'``."""
    options = inspect.signature(BatchNorm.__init__).parameters if isinstance(layer, BatchNorm) else {}
    found = {
        name: getattr(layer, name)
        for name, option in options.items()
        if option.kind is inspect.Parameter.KEYWORD_ONLY
        and name not in UNDERSTOOD
        and getattr(layer, name, option.default) != option.default
    }
    if isinstance(layer, BatchNorm) and layer._domains:
        found["domains"] = list(layer._domains)
    return ", ".join(f"{name}={value!r}" for name, value in found.items())


def _ours_below(kind: type[nn.Module]) -> type[nn.Module]:
    return next(c for c in kind.__mro__ if c in (*TORCHS, BatchNorm, FrozenBatchNorm2d))


def _frozen_to_ours(layer: nn.Module) -> Swap | str:
    kind = plain_class(layer)
    if layer._modules:
        return f"{kind.__name__} has modules of its own: {', '.join(layer._modules)}"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    if parametrize.is_parametrized(layer):
        return "a frozen layer with parametrizations"
    clash = sorted((set(layer.__dict__) - _COMMON) & ({MEMORY} | set(dir(FrozenBatchNorm2d))))
    if clash:
        return f"it has an attribute of its own where ours has one: {', '.join(clash)}"
    if not computes_frozen(layer, getattr(layer, "eps", USUAL_EPS)):
        return f"{kind.__name__} holds the buffers of a frozen layer and computes something else"
    template = FrozenBatchNorm2d(1, USUAL_EPS, device="meta")
    return _swap(layer, kind, FrozenBatchNorm2d, template)


@torch.no_grad()
def computes_frozen(layer: nn.Module, eps: float) -> bool:
    """Whether the layer's forward is the frozen normalization by its buffers, tried on made-up values in float64.

    The variances are of the size of eps, so that another place for it would show. No hook runs and the layer
    itself is not touched.
    """
    channels = layer._buffers["weight"].shape[0]  # type: ignore[union-attr]
    made_up = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.rand(shape, generator=made_up, dtype=torch.float64) + 0.5

    twin = object.__new__(type(layer))
    state = dict(zip(BUFFERS, (values(channels) for _ in BUFFERS), strict=True))
    state["running_var"] = state["running_var"] * eps
    twin.__dict__.update(layer.__dict__, _buffers={**layer._buffers, **state})
    x = values(2, channels, 3, 2)
    right = functional.batch_norm(
        x, state["running_mean"], state["running_var"], state["weight"], state["bias"], eps=eps
    )
    try:
        for training in (True, False):
            twin.training = training
            y = type(layer).forward(twin, x.clone())
            if not isinstance(y, Tensor) or y.shape != x.shape or not torch.allclose(y, right, rtol=1e-9, atol=0):
                return False
    except Exception:  # whatever a stranger's forward raises, it is not this normalization
        return False
    return True
