"""``convert`` and ``revert``: torch's layers to ours and back, in place, with nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from batchnorm.errors import ArgumentError, expected
from batchnorm.lifecycle.conversion import fuse as fusing
from batchnorm.lifecycle.conversion.layers import UNCHANGED, Swap, class_name, is_norm, is_ours, to_ours, to_torchs
from batchnorm.lifecycle.conversion.places import places
from batchnorm.lifecycle.conversion.report import Conversion, Fusion, LayerChange
from batchnorm.lifecycle.conversion.transaction import Transaction, transaction
from batchnorm.nn.distributed import Ranks

if TYPE_CHECKING:
    from batchnorm.nn.distributed import GroupLike

Report = Callable[[Conversion], object]
Names = dict[nn.Module, list[str]]


def convert(
    model: nn.Module,
    *,
    fuse: bool = False,
    example_inputs: Tensor | tuple[Any, ...] | list[Any] | dict[str, Any] | None = None,
    process_group: GroupLike | Literal["unchanged"] = UNCHANGED,
    report: Report | None = None,
) -> nn.Module:
    """Swap every batch normalization layer for the one of this library, in place, and return the model.

    ``torch.nn.BatchNorm1d/2d/3d``, ``SyncBatchNorm``, their lazy forms and ``FrozenBatchNorm2d`` as torchvision,
    detectron2 and transformers define it become ours. A layer changes its class and stays the same object, so
    references to it, optimizers that hold its parameters and hook handles keep working. Parameters, buffers, hooks,
    modes, frozen state, options, parametrizations, attributes, names and their order do not change, and deepcopy and
    pickle keep working. A layer used in several places stays one layer. A model that is itself a layer is returned as
    a new object with the same tensors and hooks. ``revert`` undoes it.

    Left as they are, with the reason in the report: subclasses of torch's layers with members of their own (as
    timm's ``BatchNormAct2d``), layers whose ``forward`` was replaced on the instance, layers with attributes
    where ours has its own.

    ``process_group`` gives every layer that group, layers of ours included: their training batches are then those
    of all its ranks together (docs/distributed.md). A ``SyncBatchNorm`` has its own group without it.

    ``fuse=True`` also joins a norm with the activation after it, and a norm with an addition and the activation
    after that, where that changes nothing but speed and memory. ``example_inputs`` is run through a copy of the
    model, in training and in eval mode, and what becomes of each norm's output is recorded:

    - an activation module that follows norms alone, and joined ones, becomes an identity in its place;
    - a function, an addition, or an activation module that has other uses, in the forward that calls the norm
      itself, is taken out of that forward: the module that has it gets a subclass of its own class whose
      forward is the rest, recorded by ``torch.fx``. Refused where the recording would fix something that may
      change: a branch, a ``with`` block, an attribute that is no module, an assignment.
    - Refused too: an output with another use, hooks that would see other values, a norm and activation in
      different forwards with an addition between.

    Then one step in training mode and one forward in eval mode of the joined copy are compared with the unjoined
    one's, in float64 where the model can run so: outputs, gradients of the parameters and inputs, buffers.
    Without agreement nothing is joined. Hooks of the model run during this.

    Arguments:
        model: any module
        fuse: also join norms with what follows them
        example_inputs: a tensor, a tuple of the forward's arguments, or a dict of its keyword arguments; at least
            two values a channel, as training asks for. Without it nothing is joined
        process_group: a ProcessGroup, "world" for the default group whenever there is one, None for no exchange, or
            "unchanged": each layer keeps its own
        report: called with the ``Conversion``, what was done and what was left: ``report=print`` shows it,
            ``report=some_list.append`` keeps it

    Returns:
        the model; another object only where the model itself is a layer

    Raises:
        ArgumentError: a model that is no module, ``example_inputs`` without ``fuse=True``, a process group that
            is none of the above, or one for a layer with virtual batches
        On any error, Ctrl-C included, the model is left exactly as it was.

    >>> import torch, batchnorm as bn
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> model = convert(model, fuse=True, example_inputs=torch.randn(2, 3, 8, 8), report=print)
    convert: 1 layers changed, 0 left as they were
      1  BatchNorm2d  ->  BatchNorm2d
    fusions: 1 joined, 0 left as they were
      1  relu    2 is an identity now
    check: ...
    >>> type(model[1]) is bn.BatchNorm2d, model[1].activation
    (True, 'relu')
    """
    _check_model("convert", model)
    if example_inputs is not None and not fuse:
        todo = "They are for finding out what can be joined: add fuse=True."
        raise ArgumentError(expected("convert", "example_inputs with fuse=True alone", "fuse=False", todo))
    layers = _layers(model, is_norm)
    ranks = UNCHANGED if process_group == UNCHANGED else Ranks.of("convert", process_group)
    plan = {layer: to_ours(layer, ranks) for layer in layers}
    with transaction() as changes:
        result, rows = _carry_out(changes, model, layers, plan)
        fusions: tuple[Fusion, ...] = ()
        check = ""
        if fuse:
            fusions, check = fusing.fuse(changes, result, example_inputs)
        done = Conversion("convert", rows, fusions, check)
        if report is not None:
            report(done)
    return result


def revert(model: nn.Module, *, report: Report | None = None) -> nn.Module:
    """Swap every layer of this library for torch's, in place, and return the model: ``convert`` undone.

    A converted layer becomes what it was: ``SyncBatchNorm`` with its process group, a frozen layer of its own
    class, a ``BatchNorm2d`` without the process group that ``convert`` gave it. What ``convert(fuse=True)`` joined is
    taken apart first: activation modules and forwards are those of before. A layer that was built as ours becomes
    torch's of the same rank, or ``SyncBatchNorm`` if it has a process group; its activation becomes a module
    after it where both stand in an ``nn.Sequential`` (under a name of its own, so that no key of the state
    dict changes; positions after it move by one). Tensors, hooks and the rest stay as with ``convert``.

    Left as they are, with the reason in the report: ``BatchNorm`` of any rank without a process group and
    ``FrozenBatchNorm2d``, which torch.nn does not have; an activation that has no place; options such as
    ``too_few`` that torch's layers do not have; subclasses.

    Arguments:
        model: any module
        report: called with the ``Conversion``, as in ``convert``

    Returns:
        the model; another object only where the model itself is a layer

    Raises:
        ArgumentError: a model that is no module
        On any error, Ctrl-C included, the model is left exactly as it was.

    >>> import torch, batchnorm as bn
    >>> model = torch.nn.Sequential(bn.BatchNorm1d(4), bn.BatchNorm1d(4, activation="relu"))
    >>> revert(model)
    Sequential(
      (0): BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, ...track_running_stats=True)
      (1): BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, ...track_running_stats=True)
      (1_activation): ReLU()
    )
    """
    _check_model("revert", model)
    with transaction() as changes:
        fusions = fusing.unfuse(changes, model)
        layers = _layers(model, is_ours)
        activations = places(model, layers)
        plan: dict[nn.Module, Swap | str] = {}
        for layer in layers:
            swap = to_torchs(layer)
            reason = activations.reasons.get(layer)
            plan[layer] = reason if reason and isinstance(swap, Swap) else swap
        result, rows = _carry_out(changes, model, layers, plan)
        activations.insert(changes, {layer for layer, swap in plan.items() if isinstance(swap, Swap)})
        done = Conversion("revert", rows, fusions)
        if report is not None:
            report(done)
    return result


def _layers(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Names:
    """Every layer that is wanted, once, with all its names in the model."""
    found: Names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if wanted(module):
            found.setdefault(module, []).append(name)
    return found


def _carry_out(
    changes: Transaction, model: nn.Module, layers: Names, plan: dict[nn.Module, Swap | str]
) -> tuple[nn.Module, tuple[LayerChange, ...]]:
    result, rows = model, []
    for layer, names in layers.items():
        swap, before = plan[layer], class_name(layer)
        path = ", ".join(names)
        if isinstance(swap, str):
            rows.append(LayerChange(path, before, None, swap))
            continue
        if layer is model:
            result = layer = changes.successor(layer)
        changes.change(layer, swap.to, swap.gets, swap.loses)
        rows.append(LayerChange(path, before, class_name(layer)))
    return result, tuple(rows)


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        todo = "Hand over the module that holds the layers."
        raise ArgumentError(expected(function, "a torch.nn.Module", type(model).__name__, todo))
