"""``freeze`` and ``unfreeze``: batch normalization that stays as it is while the rest is trained."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError, expected
from batchnorm.nn.frozen import FROZEN, Frozen, FrozenBatchNorm2d, StaysInEval

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, statistics: bool = True, affine: bool = False) -> Model:
    """Freeze every batch normalization layer, in place, and return the model.

    With ``statistics`` the layers stay in eval mode, whatever ``model.train()`` says: they normalize by their running
    statistics and do not move them. With ``affine`` weight and bias no longer require grad. With both, backward keeps
    two values a channel and not the input, in layers of this library. What is frozen already stays so.

    It is a state of the layer, of any layer of this library or of torch.nn, their subclasses included. deepcopy, pickle
    and ``convert`` keep it; a state dict does not hold it, so call ``freeze`` again where a model is built anew.
    Loading a state dict into frozen layers gives them its statistics. ``recalibrate`` leaves frozen statistics alone.
    Only ``train()`` and ``eval()`` are caught: ``layer.training = True`` undoes the freezing until the next of them.
    ``FrozenBatchNorm2d`` layers are frozen by their class, and are left as they are.

    Arguments:
        model: any module
        statistics: freeze the running statistics. Layers without any stay as they are
        affine: freeze weight and bias

    Returns:
        the model

    Raises:
        ArgumentError: no batch normalization layer in the model, or nothing to freeze

    >>> import torch, batchnorm as bn
    >>> model = freeze(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).train()
    >>> y = model(torch.randn(2, 3, 8, 8))
    >>> model.training, model[1].training, int(model[1].num_batches_tracked)
    (True, False, 0)
    >>> unfreeze(model)[1].training
    True
    """
    if not statistics and not affine:
        todo = "Choose one of them or both; unfreeze(model) is the way back."
        raise ArgumentError(expected("freeze", "statistics or affine to freeze", "neither", todo))
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not layers and not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules()):
        todo = "Give the model that holds the layers."
        raise ArgumentError(expected("freeze", "a model with batch normalization layers", "one without", todo))
    for layer in layers:
        before = layer.__dict__.get(FROZEN, Frozen())
        requires_grad = before.requires_grad
        if affine and requires_grad is None:
            requires_grad = {name: p.requires_grad for name, p in layer.named_parameters(recurse=False)}
            for p in layer.parameters(recurse=False):
                p.requires_grad_(False)
        layer.__dict__[FROZEN] = Frozen(requires_grad)
        if statistics and layer.track_running_stats and "train" not in layer.__dict__:
            layer.__dict__["train"] = StaysInEval(layer)
            layer.training = False
    return model


def unfreeze(model: Model) -> Model:
    """Undo ``freeze``, in place, and return the model.

    Each layer gets back the mode that the last ``train()`` or ``eval()`` asked for, and its parameters require grad as
    they did before they were frozen. Layers that were never frozen stay as they are.

    Arguments:
        model: any module

    Returns:
        the model

    >>> import batchnorm as bn
    >>> layer = freeze(bn.BatchNorm1d(3), affine=True)
    >>> [p.requires_grad for p in layer.parameters()]
    [False, False]
    >>> [p.requires_grad for p in unfreeze(layer).parameters()]
    [True, True]
    """
    for layer in model.modules():
        frozen: Frozen | None = layer.__dict__.pop(FROZEN, None)
        if frozen is None:
            continue
        for name, p in layer.named_parameters(recurse=False):
            if frozen.requires_grad is not None:
                p.requires_grad_(frozen.requires_grad.get(name, p.requires_grad))
        stays = layer.__dict__.get("train")
        if isinstance(stays, StaysInEval):
            del layer.__dict__["train"]
            layer.training = stays.mode
    return model
