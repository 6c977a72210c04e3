"""Domains of a model: each layer has one set of running statistics for each, and the same weight and bias."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from batchnorm.errors import ArgumentError, StateError, expected
from batchnorm.nn import BatchNorm
from batchnorm.nn import domains as state
from batchnorm.nn.followers import followers

Model = TypeVar("Model", bound=nn.Module)

_lock = threading.Lock()
_users: WeakKeyDictionary[BatchNorm, list[tuple[int, str]]] = WeakKeyDictionary()
"""Who holds a layer's domain, outermost first: the thread, and the function that it is in."""


def domains(model: Model, names: Sequence[str]) -> Model:
    """Give every batch normalization layer one set of running statistics for each domain, in place.

    Weight and bias are shared. Each domain begins with the statistics that the layer has. The first one is in use
    until ``use_domain`` says otherwise, and its keys in the state dict are the usual ones; those of another domain
    are ``running_mean__target``, ``running_var__target`` and ``num_batches_tracked__target``. Which domain is in use
    makes no difference to the state dict. To load a checkpoint that has domains, call this first.

    Domains are kept by deepcopy, pickle, ``to`` and ``half``. ``recalibrate``, ``fold`` and exporters work on the
    domain in use. ``revert`` leaves layers with domains as they are: ``keep_domain`` first.

    Arguments:
        model: holds layers of this library
        names: of the domains, Python identifiers

    Returns:
        the model

    Raises:
        ArgumentError: names that are not, or layers of torch.nn, without channels yet, or with domains already
        StateError: inside a block of ``defer_updates`` or ``accumulate_statistics``

    Source: Li et al. 2016, "Revisiting Batch Normalization For Practical Domain Adaptation"; Chang et al. 2019,
    "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation" (there weight and bias are per domain too).

    >>> import torch, batchnorm as bn
    >>> model = domains(torch.nn.Sequential(bn.BatchNorm1d(3)), ["source", "target"])
    >>> with use_domain(model, "target"):
    ...     y = model(torch.randn(8, 3) + 5)
    >>> [key for key in model.state_dict() if "mean" in key]
    ['0.running_mean', '0.running_mean__target']
    >>> bool(model[0].running_mean__target.abs().min() > model[0].running_mean.abs().max())
    True
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        todo = 'Give a list such as ["source", "target"].'
        raise ArgumentError(expected("domains", "a list of different names", repr(names), todo))
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            todo = "It becomes part of a key in the state dict: use letters, digits and underscores."
            raise ArgumentError(expected("domains", "names that are Python identifiers", repr(name), todo))
    layers = followers("domains", model, resting=True)
    for path, layer in layers.items():
        if layer._domains:
            got, todo = f"{path or 'a layer'} with {list(layer._domains)}", "Call keep_domain(model, name) first."
            raise ArgumentError(expected("domains", "layers without domains", got, todo))
        _refuse_staged("domains", layer)
    for layer in layers.values():
        state.add(layer, tuple(names))
    return model


def keep_domain(model: Model, name: str) -> Model:
    """Make layers with domains plain again, in place, with the statistics of one domain; the others are dropped.

    Arguments:
        model: a model that was given ``domains``
        name: of the domain to keep

    Returns:
        the model

    Raises:
        ArgumentError: no layer has domains, or one has none of that name
        StateError: inside a block of ``use_domain``, ``defer_updates`` or ``accumulate_statistics``

    >>> import batchnorm as bn
    >>> layer = domains(bn.BatchNorm1d(3), ["source", "target"])
    >>> list(keep_domain(layer, "target").state_dict())
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    layers = _with_domain("keep_domain", model, name)
    for layer in layers:
        _refuse_staged("keep_domain", layer)
        if _users.get(layer):
            todo = "Leave the block first."
            raise StateError(expected("keep_domain", "a call outside of use_domain", "one inside", todo))
    for layer in layers:
        state.keep(layer, name)
    return model


@contextmanager
def use_domain(model: nn.Module, name: str) -> Iterator[None]:
    """A block in which the layers use the running statistics of one domain: eval mode reads them, training moves them.

    Blocks can be nested; the end of each brings back the domain before. Like ``train`` and ``eval`` it is a state of
    the model, which every thread sees: that is right for threads that a forward starts, and a second thread that wants
    another domain of the same model at the same time is refused (give it a copy). A copy that is made in the block
    keeps the domain in use.

    What uses statistics has to happen in the block. That includes the backward of an activation checkpoint whose
    layers are in eval mode, as its forward runs again there. ``AveragedModel.update_parameters`` pairs buffers by
    their order: call it outside.

    Arguments:
        model: a model that was given ``domains``
        name: of the domain

    Raises:
        ArgumentError: no layer has domains, or one has none of that name
        StateError: another thread is in such a block, or the forward of ``recalibrate`` chooses a domain

    >>> import torch, batchnorm as bn
    >>> layer = domains(bn.BatchNorm1d(3), ["source", "target"])
    >>> with use_domain(layer, "target"):
    ...     y = layer(torch.randn(8, 3))
    >>> int(layer.num_batches_tracked), int(layer.num_batches_tracked__target)
    (0, 1)
    """
    layers = _with_domain("use_domain", model, name)
    with held("use_domain", layers):
        before = {layer: layer._domain for layer in layers}
        try:
            for layer in layers:
                state.use(layer, name)
            yield
        finally:
            for layer, domain in before.items():
                assert domain is not None
                state.use(layer, domain)


@contextmanager
def held(user: str, layers: Sequence[BatchNorm]) -> Iterator[None]:
    """A block in which no other thread may choose a domain of these layers, nor anyone under "recalibrate"."""
    me = (threading.get_ident(), user)
    with _lock:
        for layer in layers:
            thread, other = _users.get(layer, [me])[-1]
            if thread != me[0] or (other == "recalibrate" and user == "use_domain"):
                got = f"one in the {other} of another thread" if thread != me[0] else f"one inside {other}"
                todo = "Choose it around recalibrate, and give each thread a copy of the model."
                raise StateError(expected(user, "a model whose domain nobody else holds", got, todo))
        for layer in layers:
            _users.setdefault(layer, []).append(me)
    try:
        yield
    finally:
        with _lock:
            for layer in layers:
                _users[layer].pop()
                if not _users[layer]:
                    del _users[layer]


def _with_domain(function: str, model: nn.Module, name: str) -> list[BatchNorm]:
    """The model's layers with domains, all of which must have this one."""
    layers = [layer for layer in model.modules() if isinstance(layer, BatchNorm) and layer._domains]
    if not layers:
        todo = 'Call domains(model, ["source", "target"]) first.'
        raise ArgumentError(expected(function, "a model with domains", "one without", todo))
    for layer in layers:
        if name not in layer._domains:
            todo = "Correct the name."
            raise ArgumentError(expected(function, f"one of the domains {list(layer._domains)}", repr(name), todo))
    return layers


def _refuse_staged(function: str, layer: BatchNorm) -> None:
    if layer._staged is not None:
        todo = "Leave the block first."
        invariant = "a call outside of defer_updates and accumulate_statistics"
        raise StateError(expected(function, invariant, "one inside", todo))
